"""The page of one run, report.html in its directory: its diagnosis, and what a comparison shows of a job."""

import dataclasses
from pathlib import Path

from jbn.inspection import Diagnosis
from train.runs import directory
from train.runs.files import replace
from train.runs.summary import read_summary
from train.studies.plan import Planned
from train.studies.report import render
from train.studies.results import group, read
from train.studies.runner import Outcome
from train.studies.sections import CLAIMS, diagnosis


def write(run_dir: Path, found: Diagnosis) -> Path:
    """Write the page, and return its path."""
    config = dataclasses.replace(directory.read_config(run_dir), run_dir=str(run_dir))
    summary = read_summary(run_dir)
    name = run_dir.absolute().name
    outcome = Outcome(summary.status if summary else "stopped", summary, None, 0)
    groups = group([read(Planned(name, {}, config), outcome)])
    sections = [diagnosis.section(found)]
    sections += [section for claim in CLAIMS if (section := claim.section(groups))]
    reached = f" It reached {summary.reached}." if summary else ""
    intro = f"{config.model.name} with norm = {config.model.norm} on {config.data.name}.{reached}"
    footer = "Every sentence is computed from measurements."
    path = run_dir / "report.html"
    with directory.usable(run_dir):
        replace(path, render(f"Run: {name}", intro, sections, footer).encode(errors="replace"))
    return path
