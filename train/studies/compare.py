"""`compare`: several jobs, seed by seed, beside the first of them."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checks import check
from train.config import Config
from train.errors import UserError
from train.parsing import load
from train.runs.files import replace, write_json
from train.runs.stopping import StopRequests
from train.studies import runner as several
from train.studies.statistics import Curve, best, speedup, spread, spread_of_speedups, steps_to, target

if TYPE_CHECKING:  # importing it takes JAX's second
    from train.studies.series import Run, Series

SHOWN = {"best_test_accuracy": ".4f", "steps_to_target": ",.0f", "speedup": ".2f", "wall_seconds": ".1f"}


@dataclasses.dataclass(frozen=True)
class Planned:
    """One job of a comparison, with one seed."""

    name: str  # of the file
    config: Config  # its run directory is OUT/NAME, with further seeds OUT/NAME,seed=SEED


def plan(arguments: Sequence[str]) -> tuple[Path, list[Planned]]:
    """Returns where a comparison goes (`--out`, else runs/BASELINE-comparison) and its jobs, seed by seed.

    `BASELINE.toml OTHER.toml ... [--out DIR] [--seeds N] [--key value ...]`; the keys apply to every job, and
    `--seeds N` runs each with the seed that it has and the N - 1 that follow.

    Raises:
      UserError: a job makes no sense, or two of them would be the same.
      SystemExit: with code 2 for an unknown key or a wrong type, after tyro has printed which key was meant.
    """
    split = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    paths, (options, overrides) = [Path(path) for path in arguments[:split]], _own(arguments[split:])
    if not all(path.suffix == ".toml" for path in paths) or len(paths) < 2:
        given = " ".join(map(str, paths)) or "nothing"
        raise UserError(f"compare got {given}; wanted two configs or more, the baseline first.")
    out, seeds = Path(options.get("out", f"runs/{paths[0].stem}-comparison")), _count(options)
    planned: dict[str, Planned] = {}
    for path in paths:
        first = load(path, overrides)
        for seed in range(first.seed, first.seed + seeds):
            name = path.stem if seed == first.seed else f"{path.stem},seed={seed}"
            config = dataclasses.replace(first, seed=seed, run_dir=str(out / name))
            check(config)
            if config.run_dir in planned:
                raise UserError(
                    f"Two jobs of the comparison would be '{config.run_dir}'; wanted other names."
                )
            planned[config.run_dir] = Planned(path.stem, config)
    return out, list(planned.values())


def run(out: Path, planned: Sequence[Planned], stop: StopRequests) -> int:
    """Trains the jobs, but for finished ones; prints a table, and writes comparison.json and report.html.

    The former is written anew after each job. Returns the exit code, that of the worst of the jobs.

    Raises:
      UserError: OUT cannot be created.
    """
    from train.runs import processes as distributed
    from train.studies import report
    from train.studies.sections import training_speed

    several.create(out)

    def write(outcomes: list[several.Outcome]) -> None:
        if distributed.is_first() and several.is_worth_writing(outcomes):
            write_json(out / "comparison.json", entries(_series(planned, outcomes)))

    code, outcomes = several.train_all([job.config for job in planned], stop, write)
    if distributed.is_first() and several.is_worth_writing(outcomes):
        compared = _series(planned, outcomes)
        unfinished = several.unfinished(outcomes, len(planned))
        replace(out / "report.html", report.comparison(compared, unfinished=unfinished).encode())
        said = [_table(entries(compared)), "\n".join(training_speed.sentences(compared))]
        said += filter(None, [unfinished, f"Report: {out / 'report.html'}"])
        print("", *said, sep="\n\n")
    return code


def _series(planned: Sequence[Planned], outcomes: Sequence[several.Outcome]) -> list["Series"]:
    from train.studies import series

    runs = [series.read(job.config, outcome) for job, outcome in zip(planned, outcomes)]
    return series.group([job.name for job in planned], runs)


def entries(compared: Sequence["Series"]) -> list[dict[str, Any]]:
    """Returns what comparison.json has: a job each, in their order, the first of them the baseline.

    `best_test_accuracy`, `steps_to_target`, `speedup` and `wall_seconds` are medians over seeds, each
    of which is compared with the same seed of the baseline; `ranges` has their lowest and highest. The target
    is the baseline's best test accuracy. What was not reached is null. `speedup_over` takes each job as the
    baseline.
    """
    baselines = compared[0].curves
    listed = []
    for job in compared:
        seeds = [_of_seed(*pair) for pair in zip(job.runs, baselines)]
        spreads = {
            "best_test_accuracy": spread((seed["best_test_accuracy"] for seed in seeds), worst=-math.inf),
            "steps_to_target": spread((seed["steps_to_target"] for seed in seeds), worst=math.inf),
            "speedup": spread_of_speedups(job.curves, baselines),
            "wall_seconds": spread((seed["wall_seconds"] for seed in seeds), worst=math.inf),
        }
        over = {other.name: spread_of_speedups(job.curves, other.curves).median for other in compared}
        listed.append(
            {
                "name": job.name,
                **{key: values.median for key, values in spreads.items()},
                "ranges": {key: [values.low, values.high] for key, values in spreads.items()},
                "speedup_over": over,
                "seeds": seeds,
            }
        )
    return listed


def _of_seed(run: "Run", baseline: Curve) -> dict[str, Any]:
    accuracy = target(baseline)
    reached = best(run.curve)
    return {
        "seed": run.config.seed,
        "run_dir": run.config.run_dir,
        **{key: run.summary[key] for key in ("status", "error", "test_accuracy")},
        "best_test_accuracy": reached and reached[1],
        "steps_to_target": None if accuracy is None else steps_to(run.curve, accuracy),
        "speedup": speedup(run.curve, baseline),
        "wall_seconds": run.summary["wall_seconds"],
    }


def _table(listed: Sequence[dict[str, Any]]) -> str:
    rows = [[job["name"], *(several.text(job[key], how) for key, how in SHOWN.items())] for job in listed]
    return several.table(["name", *SHOWN], rows)


def _own(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Splits flags into those of the comparison and those of its jobs."""
    own, others = {}, []
    words = iter(words)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if word.startswith("--") and key == "run_dir":
            raise UserError(
                "--run_dir does not go with compare; wanted --out, in which each job gets a folder."
            )
        if word.startswith("--") and key in ("out", "seeds"):
            own[key] = value if equals else next(words, "")
            if not own[key]:
                raise UserError(f"{word} has no value; wanted one: --{name} VALUE.")
        else:
            others.append(word)
    return own, others


def _count(options: dict[str, str]) -> int:
    given = options.get("seeds", "1")
    if not (given.isdecimal() and int(given)):
        raise UserError(f"--seeds is '{given}'; wanted a whole number of 1 or more.")
    return int(given)
