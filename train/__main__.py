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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, arg

from train.config import CONFIGS, Config, RenderingName, closest_config, load
from train.errors import RunFailed, Stopped, UserError, explained
from train.streams import outlast_readers, use_utf8
from train.studies.command import STUDIES, study

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


def export(run_dir: Positional[Path], file: Positional[Path | None] = None, *, fold: bool = False) -> int:
    """Write the best checkpoint of a run as a program that needs jax alone.

    Args:
      run_dir: the run directory.
      file: where to write it; RUN_DIR/model.stablehlo if not given.
      fold: without its batch norms, which become part of the layers before them: the same outputs.
    """
    from train.training.trained import serving

    print(serving.export(run_dir, file or run_dir / "model.stablehlo", fold=fold))
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


def diagnose(run_dir: Positional[Path], *, path: Annotated[str | None, arg(name="data.path")] = None) -> int:
    """Say whether the running statistics of a run fit its data, and what to do.

    They are compared with the test split, of which the network gets batches as large as in training. The
    numbers go to RUN_DIR/diagnosis.json, the pictures to RUN_DIR/report.html.

    Args:
      run_dir: the run directory.
      path: other data, in the layout of the data that the run was trained on; all of them where they have no
        test split.
    """
    from train.studies import run_page
    from train.training.trained import diagnosis

    found = diagnosis.diagnose(run_dir, path)
    print(found)
    print(f"\nNumbers: {diagnosis.write(run_dir, found)}\nReport: {run_page.write(run_dir, found)}")
    return 0


def adapt(
    run_dir: Positional[Path],
    *,
    shifts: tuple[RenderingName, ...] = ("original", "brightness", "blur", "noise"),
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    prior: float = 16.0,
    path: Annotated[str | None, arg(name="data.path")] = None,
) -> int:
    """Evaluate a run on shifted images with running, batch and blended statistics.

    The test split is shown otherwise than in training, in batches of several sizes. The numbers go to
    RUN_DIR/adaptation.json too.

    Args:
      run_dir: the run directory.
      shifts: how the images are shown.
      batch_sizes: how many examples are normalized together.
      prior: for how many values of a feature the running statistics count where they are blended with the
        batch's: examples, in convolutions times positions.
      path: other data, in the layout of the data that the run was trained on; all of them where they have no
        test split.
    """
    from train.training.trained import adaptation

    found = adaptation.adapt(run_dir, shifts, batch_sizes, prior, path)
    print(adaptation.table(found))
    print(f"\nNumbers: {adaptation.write(run_dir, found)}")
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
    "diagnose": diagnose,
    "adapt": adapt,
    "list": list_configs,
}


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
                    return study(command, words, _session)
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
