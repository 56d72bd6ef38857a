"""Pages on several runs: a comparison, a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

from train.config import Config
from train.studies import page
from train.studies.sections import (
    covariate_shift,
    dependence,
    evaluation_gap,
    linear_regime,
    smoothness,
    training_speed,
)
from train.studies.sections.wording import listed
from train.studies.series import Run, Series, group

CLAIMS = (training_speed, covariate_shift, linear_regime, smoothness, evaluation_gap)


def comparison(compared: Sequence[Series], *, unfinished: str | None = None) -> str:
    """Returns the page on a comparison, whose first series is the baseline, and what is `unfinished`."""
    baseline, others = compared[0], [job.name for job in compared[1:]]
    intro = f"The baseline is {baseline.name}" + (f"; beside it {listed(others)}." if others else ".")
    intro = " ".join(filter(None, [intro, _setting([job.config for job in compared]), unfinished]))
    sections = [section for claim in CLAIMS if (section := claim.section(compared))]
    return page.render(
        f"Comparison with {baseline.name}",
        intro,
        sections,
        _footer([run for job in compared for run in job.runs]),
    )


def sweep(
    title: str,
    values: Sequence[Mapping[str, Any]],
    runs: Sequence[Run],
    *,
    unfinished: str | None = None,
) -> str:
    """Returns the page on a sweep; `values` are those of the keys of which it has several, run by run."""
    compared = group([dependence.name(point) or title for point in values], runs)
    sections = dependence.sections(values, runs)
    sections += [
        section for section in (evaluation_gap.section(compared), dependence.results(compared)) if section
    ]
    keys = f", over {listed(map(dependence.short, values[0]))}" if values[0] else ""
    intro = [f"{_counted(len(runs), 'job')}{keys}.", _setting([run.config for run in runs]), unfinished]
    return page.render(f"Sweep: {title}", " ".join(filter(None, intro)), sections, _footer(runs))


def _setting(configs: Sequence[Config]) -> str:
    """Says what all jobs have in common of data, length and batch size."""
    said = (
        {f"on {config.data.name}" for config in configs},
        {f"for {c.epochs:g} epochs" if c.steps is None else f"for {c.steps:,} steps" for c in configs},
        {f"in batches of {config.batch_size}" for config in configs},
    )
    common = [text for texts in said if len(texts) == 1 for text in texts]
    return f"All {', '.join(common)}." if common else ""


def _footer(runs: Sequence[Run]) -> str:
    seconds = sum(run.summary["wall_seconds"] or 0 for run in runs)
    said = (
        f"Made from {_counted(len(runs), 'run')}, which took {seconds:,.0f} "
        "seconds in all. Every sentence is computed from what was measured."
    )
    if len({run.config.seed for run in runs}) > 1 and any(run.inspections for run in runs):
        said += " What was measured inside the networks is that of the first seed."
    return said


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)
