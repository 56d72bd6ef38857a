"""The report of a study: report.html, comparison.json or results.json, and what the terminal shows."""

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table

from train.config import RenderingName
from train.errors import UserError
from train.runs.files import read_json, replace, write_json
from train.runs.summary import SAID, Summary
from train.studies import results
from train.studies.plan import Planned, short
from train.studies.results import Curve, Group, Run, Spread, group, read, speedups, spread
from train.studies.runner import Outcome
from train.studies.sections import CLAIMS, sweep
from train.studies.sections.section import Section, listed

TEMPLATES = Path(__file__).parent / "page"
IN_TERMINAL = (
    "best of the test curve",
    "steps to the baseline's best",
    "speed-up",
    *(f"final test {name}" for name in SAID.values()),
    *(
        name.format(what)
        for what in ("balanced accuracy", *get_args(RenderingName))
        for name in ("{} at the best validation", "final {}")
    ),
    "seconds",
    "ended",
)


def write_numbers(
    out: Path, planned: Sequence[Planned], outcomes: Sequence[Outcome], *, compare: bool
) -> None:
    """Write comparison.json or results.json, unless every job was refused: then the file stays as it is."""
    if any(outcome.status != "refused" for outcome in outcomes):
        found = (
            entries(group([*map(read, planned, outcomes)])) if compare else [*map(_result, planned, outcomes)]
        )
        write_json(numbers(out, compare=compare), found)


def write_report(
    out: Path, planned: Sequence[Planned], outcomes: Sequence[Outcome], *, compare: bool
) -> None:
    """Write report.html, and print a table, what it says, and where the files are."""
    runs = [read(job, outcome) for job, outcome in zip(planned, outcomes)]
    groups, waiting = group(runs), _waiting(len(planned), outcomes)
    sections = [s for claim in CLAIMS if (s := claim.section(groups))] if compare else sweep.sections(groups)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(_table(sections[0 if compare else -1]))
    said = [sentence for section in sections[: 1 if compare else None] for sentence in section.sentences]
    if any(outcome.status != "refused" for outcome in outcomes):
        title = f"Comparison with {groups[0].name}" if compare else f"Sweep: {out.name}"
        page = render(title, " ".join(_intro(groups, compare) + waiting), sections, _footer(runs, compare))
        replace(out / "report.html", page.encode(errors="replace"))
        waiting += [f"Numbers: {numbers(out, compare=compare)}", f"Report: {out / 'report.html'}"]
    for sentence in said + waiting:
        console.print(sentence, soft_wrap=True)


def numbers(out: Path, *, compare: bool) -> Path:
    """Return the file of a study's numbers."""
    return out / ("comparison.json" if compare else "results.json")


def check_folder(out: Path, planned: Sequence[Planned], *, compare: bool) -> None:
    """Raise a UserError if the folder of a study has another one's numbers, which this one would replace.

    A study may grow, and what was refused has left nothing. A file that is spoilt counts as none.
    """
    kind, other = ("comparison", "sweep") if compare else ("sweep", "comparison")
    if numbers(out, compare=not compare).exists():
        raise UserError(f"--out = '{out}' holds a {other}; give another --out for this {kind}.")
    try:
        found = read_json(path) if (path := numbers(out, compare=compare)).exists() else []
        ended = [seed for job in found for seed in (job["seeds"] if compare else [job])]
        held = {Path(run["run_dir"]).name for run in ended if run["status"] != "refused"}
    except (UserError, TypeError, KeyError):
        return
    if lost := sorted(held - {Path(job.config.run_dir).name for job in planned}):
        more = f" and {len(lost) - 1} more" * (len(lost) > 1)
        raise UserError(
            f"--out = '{out}' holds another {kind}, with {lost[0]}{more}, which this one does not have; give "
            "another --out, or its values, configs and seeds too, to go on with it."
        )


def render(title: str, intro: str, sections: Sequence[Section], footer: str) -> str:
    """Return the page."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    # Names like `runs/key=value,key=value` may go on in another line.
    environment.filters["parts"] = lambda name: re.findall(r"[^/,_]+[/,_]?|[/,_]", name)
    return environment.get_template("page.html.j2").render(
        title=title,
        intro=intro,
        sections=sections,
        footer=footer,
        style=(TEMPLATES / "style.css").read_text(),
    )


def entries(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return comparison.json: one object a job, in their order, the first of them the baseline.

    `best_test_accuracy` (the maximum of the test curve; of numbers it is null, and there is `best_test_r2`),
    `steps_to_target`, `speedup` and `wall_seconds` are medians over seeds, each of which is compared with the
    same seed of the baseline; `ranges` has their lowest and highest. The target is the baseline's best. What
    was not reached is null. `speedup_over` takes each job as the baseline.
    """
    baseline = groups[0]
    found = []
    for job in groups:
        seeds = [_of_seed(run, theirs) for run, theirs in zip(job.runs, baseline.curves)]
        spreads = {
            "best_test_accuracy": Spread(None, None, None),
            f"best_test_{job.runs[0].headline}": job.best,
            "steps_to_target": spread((seed["steps_to_target"] for seed in seeds), worst=math.inf),
            "speedup": speedups(job, baseline),
            "wall_seconds": job.over(lambda run: run.wall_seconds, worst=math.inf),
        }
        found.append(
            {
                "name": job.name,
                **{key: values.median for key, values in spreads.items()},
                "ranges": {key: [values.low, values.high] for key, values in spreads.items()},
                "speedup_over": {other.name: speedups(job, other).median for other in groups},
                "seeds": seeds,
            }
        )
    return found


def _of_seed(run: Run, baseline: Curve) -> dict[str, Any]:
    return {
        "seed": run.config.seed,
        "run_dir": run.config.run_dir,
        "status": run.outcome.status,
        "error": run.outcome.error,
        "test_accuracy": None,
        "best_test_accuracy": None,
        f"test_{run.headline}": run.validated,
        f"best_test_{run.headline}": results.best_of(run.curve),
        "steps_to_target": results.steps_to_best_of(run.curve, baseline),
        "speedup": results.speedup(run.curve, baseline),
        "wall_seconds": run.wall_seconds,
    }


def _result(job: Planned, outcome: Outcome) -> dict[str, Any]:
    """Return an object of results.json: the values, the run directory, the summary, and how it ended."""
    summary = dataclasses.asdict(outcome.summary or Summary(status="failed"))
    ended = {"status": outcome.status, "error": outcome.error}
    return job.values | {"run_dir": job.config.run_dir} | summary | ended


def _table(section: Section) -> Table:
    """Return the columns of a section's table that the terminal shows."""
    table = Table(box=box.SIMPLE)
    kept = [index for index, name in enumerate(section.header) if name in IN_TERMINAL or not index]
    for index in kept:
        table.add_column(section.header[index], justify="right" if index else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*(row[index].replace("\N{NO-BREAK SPACE}", " ") for index in kept))
    return table


def _waiting(planned: int, outcomes: Sequence[Outcome]) -> list[str]:
    """Say how many jobs have finished, if a stop kept the others from it."""
    if planned == len(outcomes) and not any(outcome.status == "stopped" for outcome in outcomes):
        return []
    finished = sum(outcome.status == "finished" for outcome in outcomes)
    return [f"{finished} of {planned} jobs have finished; the same line again goes on with the others."]


def _intro(groups: Sequence[Group], compare: bool) -> list[str]:
    """Say what is compared, and what all jobs have in common of data, length and batch size."""
    configs, others = [job.config for job in groups], [job.name for job in groups[1:]]
    keys = [short(key) for key in groups[0].runs[0].values if key != "seed"]
    over = f" over {listed(keys)}" if keys else ""
    said = f"{len(groups)} job{'s' * (len(groups) > 1)}{over}"
    if compare:
        said = f"The baseline is {groups[0].name}" + (
            f"; compared with it: {listed(others)}" if others else ""
        )
    seeds = max(len(job.runs) for job in groups)
    common = [
        {f"on {config.data.name}" for config in configs},
        {f"for {c.epochs:g} epochs" if c.steps is None else f"for {c.steps:,} steps" for c in configs},
        {f"in batches of {config.batch_size}" for config in configs},
        {f"with {seeds} seeds"} if seeds > 1 else set(),
    ]
    texts = [text for shared in common if len(shared) == 1 for text in shared]
    return [f"{said}.", *([f"All {', '.join(texts)}."] if texts else [])]


def _footer(runs: Sequence[Run], compare: bool) -> str:
    seconds = sum(run.wall_seconds or 0 for run in runs)
    said = (
        f"Made from {len(runs)} run{'s' * (len(runs) > 1)}, which took {seconds:,.0f} seconds in all. Every "
        "sentence is computed from measurements. The best of the test curve "
        f"(best_test_{runs[0].headline}) is its maximum over all evaluations, as papers report it."
    )
    if compare:
        headline = SAID[runs[0].headline]
        weighted = "balanced " * any(run.config.model.class_weights for run in runs)
        chosen = f"{weighted}accuracy on the validation split was best, and of equal ones the loss lowest"
        if headline != "accuracy":
            chosen = "loss on the validation split was lowest"
        said += (
            f" At the best validation is the test {headline} after best_step, at which the {chosen} (without "
            "such a split, the last step)."
        )
    if len({run.config.seed for run in runs}) > 1 and any(run.inspections for run in runs):
        said += " What was measured inside the networks is that of the first seed."
    return said
