"""How far the network of evaluation, with running statistics, is from the network that was trained."""

from collections.abc import Sequence

from train.studies import charts as pictures
from train.studies.page import Picture, Section, Table
from train.studies.sections.wording import number
from train.studies.series import Series, inspected


def section(compared: Sequence[Series]) -> Section | None:
    """Shows accuracy with the examples' own statistics less that with the running ones, over training."""
    seen = list(filter(_has_statistics, inspected(compared)))
    if not seen:
        return None
    sentences = [
        "Accuracy with the examples' own statistics and with the running ones is measured on the same "
        "training examples, so that all of the gap comes from the statistics."
    ]
    worst = max(seen, key=lambda job: _largest(job))
    at, gap = max(_gaps(worst), key=lambda pair: abs(pair[1]))
    sentences.append(
        f"The largest gap was {number(100 * gap, 2)} points of accuracy, in {worst.name} after {at:,} steps."
    )
    last = f"{number(100 * _gaps(worst)[-1][1], 2)} points in {worst.name}"
    closed = [job for job in seen if abs(_gaps(job)[-1][1]) < 0.01]
    sentences.append(
        f"At the end it was {last}."
        if len(seen) == 1
        else f"At the end it was below one point in {len(closed)} of {len(seen)} jobs"
        + ("." if worst in closed else f", and {last}.")
    )

    def describe(axes):
        for index, job in enumerate(seen):
            steps, gaps = zip(*_gaps(job))
            pictures.line(axes, steps, [100 * gap for gap in gaps], name=job.name, index=index)
        axes.set(xlabel="step", ylabel="gap, points of accuracy")

    picture = Picture(
        pictures.draw(describe, label="Accuracy with batch statistics less with running statistics"),
        "Accuracy with the examples' own statistics less that with the running ones.",
    )
    header = ("gap, points of accuracy", "first", "largest", "last", "loss, running", "loss, own")
    return Section(
        "Training and evaluation", tuple(sentences), (picture,), Table(header, tuple(map(_row, seen)))
    )


def _has_statistics(job: Series) -> bool:
    return job.config.model.norm in ("batch", "ghost", "flax")


def _gaps(job: Series) -> list[tuple[int, float]]:
    """Returns step and gap, without step 0, at which nothing has been trained."""
    return [
        (line["step"], line["batch_statistics"]["accuracy"] - line["running_statistics"]["accuracy"])
        for line in job.inspections[1:] or job.inspections
    ]


def _largest(job: Series) -> float:
    return max(abs(gap) for _, gap in _gaps(job))


def _row(job: Series) -> tuple[str, ...]:
    gaps, last = [gap for _, gap in _gaps(job)], job.inspections[-1]
    points = (gaps[0], max(gaps, key=abs), gaps[-1])
    losses = (last[f"{kind}_statistics"]["loss"] for kind in ("running", "batch"))
    return (job.name, *(number(100 * gap, 2) for gap in points), *map(number, losses))
