"""The command line: `python -m train CONFIG.toml [--key value ...]`, `eval RUN_DIR`, `list`."""

import json
import sys
from pathlib import Path

USAGE = """\
usage: python -m train CONFIG.toml [--key value ...]   train; resumes where the run directory has a checkpoint
       python -m train CONFIG.toml --help              the keys, with this file's values
       python -m train eval RUN_DIR                    evaluate the best checkpoint; prints one JSON line
       python -m train list                            the configs, a line each
"""
CONFIGS = Path(__file__).parent.parent / "configs"


def main(arguments: list[str]) -> int:
    """Runs one command and returns the exit code: 0 finished, 1 failed, 2 bad input, 128 + N for signal N."""
    from train.config import UserError  # after this file's own --help, which needs nothing

    try:
        match arguments:
            case [] | ["-h" | "--help", *_]:
                print(USAGE, end="")
                return 0 if arguments else 2
            case ["list"]:
                return _list()
            case ["eval", run_dir]:
                return _eval(Path(run_dir))
            case [path, *overrides] if path.endswith(".toml"):
                return _train(Path(path), overrides)
            case _:
                raise UserError(f"'{' '.join(arguments)}' is no command.\n{USAGE}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _train(path: Path, overrides: list[str]) -> int:
    from train.config import load

    config = load(path, overrides)
    from train.stopping import StopRequests

    with StopRequests() as stop:  # around the imports too, which take a second
        from train.loop import RunFailed, fit

        try:
            summary = fit(config, stop)
        except RunFailed as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    reached = "no evaluation yet"
    if summary["best_step"] is not None and summary["test_accuracy"] is not None:
        reached = f"test accuracy {summary['test_accuracy']:.4f} at its best step {summary['best_step']}"
    print(
        f"{summary['status'].capitalize()} at step {summary['step']}: {reached}. Files: {config.run_dir}. "
        f"Evaluate: python -m train eval {config.run_dir}"
    )
    return 0 if summary["status"] == "finished" else 128 + stop.received


def _eval(run_dir: Path) -> int:
    from train.loop import evaluate

    print(json.dumps(evaluate(run_dir)))
    return 0


def _list() -> int:
    for path in sorted(CONFIGS.glob("*.toml")):
        first_line = path.read_text().partition("\n")[0]
        print(f"configs/{path.name:24} {first_line.lstrip('# ')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
