"""The command line: argv -> a command. Imports what a command needs when it runs, so that --help is quick."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from train.usage import HELP, USAGE

COMMANDS = ("eval", "predict", "export", "compare", "sweep", "list")
CONFIGS = Path(__file__).parent.parent / "configs"


def main(arguments: list[str]) -> int:
    """Runs one command and returns the exit code: 0 finished, 1 failed, 2 bad input, 128 + N for signal N."""
    from train.errors import RunFailed, UserError, explained

    try:
        with explained():
            match arguments:
                case [] | ["-h" | "--help", *_]:
                    print(USAGE, end="")
                    return 0 if arguments else 2
                case [command, *rest] if command in COMMANDS and {"-h", "--help"} & {*rest}:
                    print(HELP.get(command, USAGE), end="")
                    return 0
                case ["list"]:
                    return _list()
                case ["eval", run_dir]:
                    return _eval(run_dir)
                case ["eval", run_dir, "--data.path", path]:
                    return _eval(run_dir, path)
                case ["eval", run_dir, flag] if flag.startswith("--data.path="):
                    return _eval(run_dir, flag.partition("=")[2])
                case ["predict", run_dir, *images] if images and not _has_flags(images):
                    return _predict(run_dir, images)
                case ["export", run_dir, *file] if len(file) < 2 and not _has_flags(file):
                    return _export(run_dir, *file)
                case ["compare", *rest]:
                    return _compare(rest)
                case ["sweep", path, *grid] if path.endswith(".toml"):
                    return _sweep(Path(path), grid)
                case [path, *overrides] if path.endswith(".toml"):
                    return _train(Path(path), overrides)
                case _:
                    raise UserError(f"'{' '.join(arguments)}' is none of these.\n{USAGE}")
    except UserError as error:
        return _leave(2, f"error: {error}")
    except RunFailed as error:
        return _leave(1, f"failed: {error}")
    except KeyboardInterrupt:
        return 130


def _has_flags(words: list[str]) -> bool:
    return any(word.startswith("--") for word in words)


def _leave(code: int, message: str) -> int:
    print(message, file=sys.stderr, flush=True)
    if "train.runs.processes" in sys.modules:
        from train.runs.processes import leave

        leave(code)
    return code


def _train(path: Path, overrides: list[str]) -> int:
    from train.parsing import load

    config = load(path, overrides)
    from train.runs.stopping import StopRequests

    with StopRequests() as stop:  # around the imports too, which take a second
        _use_compilation_cache()
        from train.runs import processes as distributed
        from train.training.loop import fit

        distributed.join(config)
        stop.listen()  # JAX would keep SIGTERM for itself
        summary = fit(config, stop)
        if distributed.is_first():
            print(_last_line(summary, config.run_dir))
    return 0 if summary["status"] == "finished" else 128 + stop.received


def _last_line(summary: dict, run_dir: str) -> str:
    reached = "no evaluation yet"
    if summary["best_step"] is not None and summary["test_accuracy"] is not None:
        reached = f"test accuracy {summary['test_accuracy']:.4f} at its best step {summary['best_step']}"
    return (
        f"{summary['status'].capitalize()} at step {summary['step']}: {reached}. Files: {run_dir}. "
        f"Evaluate: python -m train eval {run_dir}"
    )


def _eval(run_dir: str, path: str | None = None) -> int:
    _use_compilation_cache()
    from train.serving import evaluate

    print(json.dumps(evaluate(Path(run_dir), path)))
    return 0


def _predict(run_dir: str, images: list[str]) -> int:
    _use_compilation_cache()
    from train.serving import predict

    for line in predict(Path(run_dir), images):
        print(json.dumps(line))
    return 0


def _export(run_dir: str, file: str | None = None) -> int:
    _use_compilation_cache()
    from train.serving import export

    print(export(Path(run_dir), Path(file or Path(run_dir) / "model.stablehlo")))
    return 0


def _compare(arguments: list[str]) -> int:
    from train.studies import compare

    return _run_several(compare.run, *compare.plan(arguments))


def _sweep(path: Path, grid: list[str]) -> int:
    from train.studies import sweep

    return _run_several(sweep.run, *sweep.plan(path, grid))


def _run_several(run: Callable, out: Path, planned: list) -> int:
    from train.runs.stopping import StopRequests

    with StopRequests() as stop:
        _use_compilation_cache()
        from train.runs import processes as distributed

        distributed.join(planned[0].config)
        stop.listen()
        return run(out, planned, stop)


def _list() -> int:
    paths = sorted(CONFIGS.glob("*.toml"))
    width = max(len(path.name) for path in paths)
    first_lines = [path.read_text().partition("\n")[0].lstrip("# ") for path in paths]
    # At once, so that `| head` does not end it halfway.
    print("\n".join(f"configs/{path.name:{width}} {line}" for path, line in zip(paths, first_lines)))
    return 0


def _use_compilation_cache() -> None:
    from train.runs.compilation_cache import use_compilation_cache

    use_compilation_cache()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
