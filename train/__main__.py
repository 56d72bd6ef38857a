"""The command line: a config to train, or a command.

Whatever imports JAX is imported by the commands that need it, so that --help answers at once.
"""

import contextlib
import difflib
import json
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, arg

from train.config import CONFIGS, Config, check_text, closest_config, load
from train.errors import RunFailed, Stopped, UserError, explained
from train.streams import outlast_readers, use_utf8

if TYPE_CHECKING:
    from train.runs.stopping import StopRequests

HELP = """\
usage: python -m train CONFIG.toml [--key value ...]   train; resumes where there is a checkpoint
       python -m train CONFIG.toml --help              the keys, with this file's values
       python -m train COMMAND ...                     one of these; --help says more
"""


def train(path: Path, flags: list[str]) -> int:
    """Train a job; resume it where there is a checkpoint."""
    config = load(path, flags)
    with _session(config, "train") as stop:
        from train.runs import processes
        from train.training import fit

        summary = fit(config, stop)
        if processes.is_primary():
            print(
                f"{summary.status.capitalize()} at step {summary.step}: {summary.reached}. Files: "
                f"{config.run_dir}. Evaluate: python -m train eval {config.run_dir}"
            )
    return 0 if summary.finished else 128 + (stop.received or 0)


def evaluate(run_dir: Positional[Path], *, path: Annotated[str | None, arg(name="data.path")] = None) -> int:
    """Evaluate the best checkpoint of a run on its test split; print one JSON line.

    Args:
      run_dir: the run directory.
      path: other data, in the layout of the data that the run was trained on; all of them where they have no
        test split.
    """
    from train.training.trained import serving

    print(json.dumps(serving.evaluate(run_dir, path)))
    return 0


def predict(run_dir: Positional[Path], images: Positional[tuple[Path, ...]]) -> int:
    """Print the classes and probabilities of images or rows, or their numbers, one JSON line each.

    Args:
      run_dir: the run directory.
      images: images, .csv tables, .npy arrays or .npz archives: bytes from 0 to 255, or numbers as in
        training.
    """
    from train.training.trained import serving

    if not images:
        raise UserError("images: expected one file or more, got none.")
    for line in serving.predict(run_dir, images):
        print(json.dumps(line))
    return 0


def export(run_dir: Positional[Path], file: Positional[Path | None] = None) -> int:
    """Write the best checkpoint of a run as a program that needs jax alone.

    Args:
      run_dir: the run directory.
      file: where to write it; RUN_DIR/model.stablehlo if not given.
    """
    from train.training.trained import serving

    print(serving.export(run_dir, file or run_dir / "model.stablehlo"))
    return 0


def recalibrate(
    run_dir: Positional[Path], *, path: Annotated[str | None, arg(name="data.path")] = None
) -> int:
    """Pool the running statistics of a run anew; print a JSON line.

    They are pooled over its training data, with the weights of its best checkpoint, which every other command
    then uses with them.

    Args:
      run_dir: the run directory.
      path: where the data that the run was trained on are now.
    """
    from train.training.trained import recalibration

    print(json.dumps(recalibration.recalibrate(run_dir, path)))
    return 0


def list_configs() -> int:
    """List the configs, a line each."""
    paths = sorted(CONFIGS.glob("*.toml"))
    width = max(len(path.name) for path in paths)
    first_lines = [path.read_text().partition("\n")[0].lstrip("# ") for path in paths]
    # In one call, so that `| head` does not end it halfway.
    print("\n".join(f"configs/{path.name:{width}} {line}" for path, line in zip(paths, first_lines)))
    return 0


COMMANDS = {
    "eval": evaluate,
    "predict": predict,
    "export": export,
    "recalibrate": recalibrate,
    "list": list_configs,
}


@dataclass(frozen=True)
class Compare:
    """Train several jobs and compare them with the first: comparison.json, and report.html.

    How many times fewer steps does each take to the best test accuracy (of numbers R^2) of the baseline? The
    same line again resumes a study that was stopped; finished jobs are not trained again. Any further `--key
    value` is a key of every config; `--key A,B` trains every job with each of the values, and `--inspect
    True` measures for the report what the layers get and how smooth the loss is.
    """

    configs: Positional[tuple[Path, ...]]
    """The baseline, and the configs that are compared with it."""
    out: Path | None = None
    """The folder of the study; if not given, runs/BASELINE-comparison."""
    seeds: int = 1
    """With how many seeds to train each job: its own and the following ones."""


@dataclass(frozen=True)
class Sweep:
    """Train every combination of values: results.json, and report.html.

    `--key A,B` gives a key of the config several values; lists are words: `--model.widths 64,64 32`. The same
    line again resumes a sweep that was stopped; finished jobs are not trained again.
    """

    configs: Positional[tuple[Path, ...]]
    """The config."""
    out: Path | None = None
    """The folder of the sweep; if not given, runs/CONFIG-sweep: give another one for another sweep."""
    seeds: int = 1
    """With how many seeds to train each job: its own and the following ones; the page has medians, ranges."""


STUDIES = {"compare": Compare, "sweep": Sweep}


def study(command: str, words: list[str]) -> int:
    """Train and compare several jobs."""
    given, overrides = tyro.cli(
        STUDIES[command], args=words, prog=f"python -m train {command}", return_unknown_args=True
    )
    compare, configs = command == "compare", given.configs
    if not all(path.suffix == ".toml" for path in configs) or (
        len(configs) < 2 if compare else len(configs) != 1
    ):
        expected = "two configs or more, the baseline first" if compare else "one config"
        got = " ".join(map(str, configs)) or "none before the first --key"
        close = [str(path) if path.suffix == ".toml" else closest_config(str(path)) for path in configs]
        line = " ".join(map(str, close))
        meant = f"; did you mean {line}?" if all(close) and line != got else "."
        raise UserError(f"{command}: expected {expected}, got {got}{meant}")
    if not 1 <= given.seeds <= 10_000:
        raise UserError(f"--seeds: expected 1 to 10000, got {given.seeds}.")
    if given.out is not None:
        check_text("--out", str(given.out))
    from train.studies.plan import plan

    out = given.out or Path("runs") / f"{configs[0].stem}-{'comparison' if compare else 'sweep'}"
    planned = plan(configs, overrides, out=out, seeds=given.seeds)
    if len(planned) == 1:
        raise UserError(
            "sweep: expected several values of a key, as in --optimizer.learning_rate 0.1,1, or --seeds 3, "
            f"got one job; `python -m train {configs[0]}` trains it."
        )
    with _session(planned[0].config, command, out=str(out), jobs=len(planned)) as stop:
        from train import models
        from train.runs import processes
        from train.studies import report, runner

        for job in planned:
            processes.check_same_job(job.config)
            models.check(
                job.config.model,
                accumulate=job.config.optimizer.accumulate,
                recalibrate=job.config.recalibrate,
            )
        with processes.raise_on_all("use the folder of the study"):
            report.check_folder(out, planned, compare=compare)
            runner.create_folder(out)

        def write(outcomes: list[runner.Outcome]) -> None:
            if processes.is_primary():
                report.write_numbers(out, planned, outcomes, compare=compare)

        outcomes = runner.train_all([job.config for job in planned], stop, write)
        if processes.is_primary():
            report.write_report(out, planned, outcomes, compare=compare)
        return runner.exit_code(outcomes, len(planned), stop)


@contextlib.contextmanager
def _session(
    config: Config, command: str, *, out: str | None = None, jobs: int = 1
) -> "Iterator[StopRequests]":
    """Connect the processes of a job, and note signals, also during the imports, which take a second."""
    from train.runs.stopping import StopRequests

    with StopRequests() as stop:
        from train.runs import processes

        processes.initialize(config)
        stop.install_handlers()  # again, because JAX takes SIGTERM for itself
        processes.check_equal({"the command": command, "out": out, "the number of jobs": jobs})
        yield stop


def _use_compilation_cache() -> None:
    """Have JAX keep compiled programs in ~/.cache/jbn, unless the user has given it another folder.

    The folder may be deleted at any time. Where it cannot be made, every start compiles.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # of expanduser, for a user without a home
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        # Machines that share a home may not be able to run each other's programs.
        folder = caches / "jbn" / f"{platform.node()}-{platform.machine()}"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        # With a limit JAX locks the folder while it reads or writes, so that jobs may share it.
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def main(arguments: list[str]) -> int:
    """Run one command and return the exit code: 0 finished, 1 failed, 2 bad input, 128 + N for signal N."""
    _use_compilation_cache()
    try:
        with explained():
            match arguments:
                case [path, *flags] if path.endswith(".toml") and not _is_misspelt(path):
                    return train(Path(path), flags)
                case [command, *words] if command in COMMANDS:
                    return tyro.cli(COMMANDS[command], args=words, prog=f"python -m train {command}")
                case [command, *words] if command in STUDIES:
                    return study(command, words)
                case [] | ["-h" | "--help", *_]:
                    print(_help())
                    return 0 if arguments else 2
                case _:
                    raise UserError(_advice(arguments))
    except UserError as error:
        return _exit(2, f"error: {error}")
    except RunFailed as error:
        return _exit(1, f"failed: {error}", error)
    except Stopped as stopped:
        return _exit(128 + stopped.number, "stopped before the first step")
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _exit(1, traceback.format_exc().rstrip(), error)


def _is_misspelt(path: str) -> bool:
    return path.endswith(".toml") and not Path(path).exists() and closest_config(path) is not None


def _advice(arguments: list[str]) -> str:
    """Say what a line was probably meant to be that begins with neither a config nor a command."""
    known = lambda word: word.endswith(".toml") or word in COMMANDS | STUDIES
    first, *others = arguments
    at = next((at for at, word in enumerate(others) if known(word)), None)
    said = f"'{first}' is neither a config nor a command"
    if _is_misspelt(first):
        said = f"{first} does not exist"
    if first.startswith("-"):
        said = f"expected a config or a command first, got '{first}'"
        meant = None if at is None else [others[at], first, *others[:at], *others[at + 1 :]]
    elif close := difflib.get_close_matches(first.lower(), COMMANDS | STUDIES, n=1, cutoff=0.7):
        meant = [*close, *others]
    elif (Path(first) / "config.json").exists():
        meant = ["eval", *arguments]
    elif config := closest_config(first):
        meant = [config, *others]
    else:
        meant = others if at == 0 else None
    return f"{said}; did you mean `python -m train {shlex.join(meant)}`?" if meant else f"{said}.\n{_help()}"


def _help() -> str:
    lines = [
        f"  {name:11} {(f.__doc__ or '').partition(chr(10))[0]}" for name, f in (COMMANDS | STUDIES).items()
    ]
    return "\n".join([HELP, *lines])


def _exit(code: int, message: str, error: Exception | None = None) -> int:
    """Print a message and return the exit code; one process of several ends here, alone."""
    if "train.runs.processes" not in sys.modules:
        print(message, file=sys.stderr, flush=True)
        return code
    from train.runs import processes

    if error is not None and (lost := processes.explain_lost(error)):
        message = f"failed: {lost}"
    processes.say_alone(message)
    processes.exit_alone(code)
    return code


if __name__ == "__main__":
    use_utf8()
    outlast_readers()
    sys.exit(main(sys.argv[1:]))
