"""How the result depends on a number: the learning rate, the batch size."""

import math
from collections.abc import Sequence
from typing import Any

from train import pictures
from train.claims.wording import accuracy, listed, with_range
from train.comparison import has_learnt, spread
from train.page import Picture, Section, Table
from train.series import Run, Series
from train.several import text

Point = dict[str, Any]  # the values of the keys of which a sweep has several


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
    ticks = sorted({point[key] for point in values})
    log = _spans_decades(ticks)

    def describe(axes, error=False):
        for index, (line, curve) in enumerate(curves.items()):
            at, middle, low, high = zip(*curve)
            if error:
                middle, low, high = map(_errors, (middle, high, low))
            pictures.line(axes, at, middle, low=low, high=high, name=line or "test", index=index)
        what = "error" if error else "accuracy"
        axes.set(xlabel=short(key), xscale="log" if log else "linear")
        if log and len(ticks) <= 8:
            axes.set_xticks(ticks, labels=[f"{at:g}" for at in ticks])
        axes.set(ylabel=f"final test {what}", yscale="log" if error else "linear")

    shown = (
        Picture(
            pictures.draw(describe, label=f"Final test accuracy over {short(key)}"),
            "Test accuracy after the last step. A gap in a line is a job that did not come to its end.",
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


def _curves(key: str, values: Sequence[Point], runs: Sequence[Run]) -> dict[str, list[tuple]]:
    """Returns value, median, lowest and highest accuracy over seeds, for each combination of other keys."""
    found: dict[str, dict[float, list[float | None]]] = {}
    for point, run in zip(values, runs):
        others = {other: value for other, value in point.items() if other != key}
        found.setdefault(name(others), {}).setdefault(point[key], []).append(run.final_accuracy)
    return {
        others: [(at, *spread(of_value[at], worst=-math.inf)) for at in sorted(of_value)]
        for others, of_value in found.items()
    }


def name(point: Point) -> str:
    """Names a job of a sweep by its values, whatever its seed: "norm = batch, learning rate = 0.1"."""
    return ", ".join(f"{short(key)} = {text(value)}" for key, value in point.items() if key != "seed")


def short(key: str) -> str:
    """Returns a key as one would say it."""
    return key.rpartition(".")[2].replace("_", " ")


def _errors(accuracies: Sequence[float | None]) -> list[float | None]:
    # Rounded, as matplotlib warns of a logarithmic axis on which there is nothing but 1 - 0.9.
    return [None if accuracy is None else round(1 - accuracy, 9) for accuracy in accuracies]


def _spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 10


def _sentence(line: str, what: str, curve: list[tuple], classes: int) -> str:
    """Says where a line is best, and where it does not learn."""
    who = f"With {line}" if line else "Here"
    found = [(median, at) for at, median, *_ in curve if median is not None]
    if not found:
        return f"{who} no job came to its end."
    reached, at = max(found)
    idle = [f"{at:g}" for median, at in found if not has_learnt(median, classes)]
    failed = [f"{at:g}" for at, median, *_ in curve if median is None]
    said = [f"{who} the best final test accuracy was {accuracy(reached)}, at a {what} of {at:g}"]
    said += [f"at {listed(idle)} it did not learn"] if idle else []
    said += [f"at {listed(failed)} it did not come to its end"] if failed else []
    if not idle and not failed:
        said.append(f"it learnt at every value, and ended at {accuracy(min(found)[0])} at the worst")
    return f"{'; '.join(said)}."
