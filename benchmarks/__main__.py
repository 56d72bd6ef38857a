"""The command: `python -m benchmarks [layers|models|training|devices]`."""

import argparse
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Runs one benchmark, in this process and others that it starts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="jbn beside its peers, in one run."
    )
    parser.add_argument(
        "benchmark",
        nargs="?",
        default="layers",
        choices=["layers", "models", "training", "devices"],
        help="one layer (the default), ResNets, the training program, or the cost of many devices",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, and no speed")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="of layers, the tables with TEXT in their name"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="where results are written"
    )
    options = parser.parse_args()
    some = {"only": options.only} if options.benchmark == "layers" else {}
    import_module(f"benchmarks.{options.benchmark}").main(options.out, options.quick, **some)


if __name__ == "__main__":
    main()
