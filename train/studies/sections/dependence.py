"""How the result depends on a number: the learning rate, the batch size."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from train.studies import charts as pictures
from train.studies.page import Picture, Section, Table
from train.studies.runner import text
from train.studies.sections.wording import accuracy, listed, with_range
from train.studies.series import Run, Series
from train.studies.statistics import has_learnt, spread

Point = dict[str, Any]  # the values of the keys of which a sweep has several
Curves = dict[str, dict[float, list[float | None]]]  # line -> value -> final accuracy of each seed


def sections(values: Sequence[Point], runs: Sequence[Run]) -> list[Section]:
    """Shows, for each key of a sweep that takes numbers, the final accuracy over its values.

    There is a line for each combination of the other keys, and its range over seeds.
    """
    keys = [key for key in values[0] if key != "seed" and _is_number([point[key] for point in values])]
    return [section for key in keys if (section := _section(key, values, runs))]


def results(compared: Sequence[Series]) -> Section:
    """Lists how each job ended."""
    rows = [
        (
            job.name,
            listed(dict.fromkeys(job.over(lambda run: run.summary["status"]))),
            with_range(spread(job.over(lambda run: run.final_accuracy), worst=-math.inf), accuracy),
            with_range(
                spread(job.over(lambda run: run.summary["best_test_accuracy"]), worst=-math.inf), accuracy
            ),
        )
        for job in compared
    ]
    return Section("All jobs", table=Table(("job", "status", "final test accuracy", "best"), tuple(rows)))


def _is_number(found: Sequence[Any]) -> bool:
    return len(set(found)) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in found)


def _section(key: str, values: Sequence[Point], runs: Sequence[Run]) -> Section | None:
    classes = next((run.classes for run in runs if run.classes), None)
    if classes is None:
        return None
    curves = _curves(key, values, runs)
    seeds = len({run.config.seed for run in runs})
    over = f", median of {seeds} seeds; the shade is their range" if seeds > 1 else ""
    ticks = sorted({point[key] for point in values})
    log = _grows_by_factors(ticks)

    def describe(axes, error=False):
        for index, (line, curve) in enumerate(curves.items()):
            middle, low, high = zip(*(spread(reached, worst=-math.inf) for reached in curve.values()))
            if error:
                middle, low, high = map(_errors, (middle, high, low))
            pictures.line(axes, list(curve), middle, low=low, high=high, name=line or "test", index=index)
        what = "error" if error else "accuracy"
        axes.set(xlabel=short(key), xscale="log" if log else "linear")
        if log and len(ticks) <= 8:  # more would not be told apart
            axes.set_xticks(ticks, labels=[f"{at:g}" for at in ticks])
            axes.set_xticks([], minor=True)
        axes.set(ylabel=f"final test {what}", yscale="log" if error else "linear")

    shown = (
        Picture(
            pictures.draw(describe, label=f"Final test accuracy over {short(key)}"),
            f"Test accuracy after the last step{over}. A gap is a job that did not come to its end.",
        ),
        Picture(
            pictures.draw(
                lambda axes: describe(axes, error=True), label=f"Final test error over {short(key)}"
            ),
            "The same as an error, in which differences between good jobs can be seen.",
        ),
    )
    sentences = [_sentence(line, short(key), curve, classes) for line, curve in curves.items()]
    return Section(f"Over the {short(key)}", tuple(sentences), shown)


def _curves(key: str, values: Sequence[Point], runs: Sequence[Run]) -> Curves:
    """Returns the final accuracies of all seeds at each value, for each combination of other keys."""
    found: Curves = {}
    for point, run in zip(values, runs):
        others = {other: value for other, value in point.items() if other != key}
        found.setdefault(name(others), {}).setdefault(point[key], []).append(run.final_accuracy)
    return {others: dict(sorted(of_value.items())) for others, of_value in found.items()}


def name(point: Point) -> str:
    """Names a job of a sweep by its values, whatever its seed: "norm = batch, learning rate = 0.1"."""
    return ", ".join(f"{short(key)} = {text(value)}" for key, value in point.items() if key != "seed")


def short(key: str) -> str:
    """Returns a key as one would say it."""
    return key.rpartition(".")[2].replace("_", " ")


def _errors(accuracies: Sequence[float | None]) -> list[float | None]:
    # Rounded, as matplotlib warns of a logarithmic axis on which there is nothing but 1 - 0.9.
    return [None if accuracy is None else round(1 - accuracy, 9) for accuracy in accuracies]


def _grows_by_factors(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 4


def _sentence(line: str, what: str, curve: dict[float, list[float | None]], classes: int) -> str:
    """Says where a line is best, and where it does not learn, or fails, and with how many seeds."""
    who = f"With {line}" if line else "Here"
    medians = {at: spread(reached, worst=-math.inf).median for at, reached in curve.items()}
    ended = {at: median for at, median in medians.items() if median is not None}
    if not ended:
        return f"{who} no job came to its end."
    idle = lambda reached: reached is not None and not has_learnt(reached, classes)
    failed = lambda reached: reached is None
    best = max(ended, key=ended.get)
    said = [f"{who} the best final test accuracy was {accuracy(ended[best])}, at a {what} of {best:g}"]
    said += _where("it did not learn", idle, curve) + _where("it did not come to its end", failed, curve)
    if len(said) == 1:
        said.append(f"it learnt at every value, and ended at {accuracy(min(ended.values()))} at the worst")
    return f"{'; '.join(said)}."


def _where(what: str, holds: Callable[[float | None], bool], curve: dict[float, list]) -> list[str]:
    counts = {at: (sum(map(holds, reached)), len(reached)) for at, reached in curve.items()}
    places = [
        f"{at:g}" if count == seeds else f"{at:g} (with {count} of {seeds} seeds)"
        for at, (count, seeds) in counts.items()
        if count
    ]
    return [f"at {listed(places)} {what}"] if places else []
