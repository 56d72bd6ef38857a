"""The command: `python -m benchmarks [layers|models|...]`."""

import argparse
from importlib import import_module
from pathlib import Path

BENCHMARKS = "layers models inference training devices recalibration domains compiled"


def main() -> None:
    """Runs one benchmark, in this process and others that it starts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="jbn beside its peers, in one run."
    )
    parser.add_argument(
        "benchmark",
        nargs="?",
        default="layers",
        choices=BENCHMARKS.split(),
        help="one layer (the default), ResNets, one with its norms folded, the training program, the cost of "
        "many devices, a pass of recalibrate, batches of several domains, or programs compiled for "
        "an H100 and a TPU v5e",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, and no speed")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="of layers, the tables with TEXT in their name; of compiled, the programs, as in 'models cuda'",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="where results are written"
    )
    options = parser.parse_args()
    some = {"only": options.only} if options.benchmark in ("layers", "compiled") else {}
    import_module(f"benchmarks.{options.benchmark}").main(options.out, options.quick, **some)


if __name__ == "__main__":
    main()
