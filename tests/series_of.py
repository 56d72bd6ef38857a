"""Series of runs from plain numbers, as jobs would have left them, and pictures without the drawing."""

from train.config import Config, Data, Model, Optimizer
from train.studies import charts as pictures
from train.studies.runner import COLUMNS
from train.studies.series import Run, Series
from train.training.inspection import EDGES

REFUSED = {
    "status": "refused",
    "error": "batch_size = 2000, but there are 1293. Wanted fewer.",
    "classes": None,
}
FAILED = {"status": "failed", "error": "the loss of step 7 is not finite. Try a lower one."}


def run(
    curve=None, *, seed=0, status="finished", error=None, classes=10, seconds=1.5, lines=(), **model
) -> Run:
    """Makes a run from {step: test accuracy}; what else is given goes to its model, but `rate` and `data`."""
    rate, data = model.pop("rate", 0.1), model.pop("data", "digits")
    config = Config(
        "unused", Data(name=data), Model(**{"norm": "none"} | model), Optimizer(learning_rate=rate), seed, 100
    )
    tests = [
        {"step": step, "split": "test", "loss": 1.0, "accuracy": at} for step, at in (curve or {}).items()
    ]
    metrics = [line | {"split": split} for line in tests for split in ("train", "test")]
    summary = dict.fromkeys(COLUMNS) | {"status": status, "error": error, "wall_seconds": seconds}
    summary["best_test_accuracy"] = max((curve or {}).values(), default=None)
    return Run(config, summary, classes, metrics, list(lines))


def series(name, *curves, **options) -> Series:
    """Makes a series of a run for each curve, or dict of options of `run`, with seeds from 0."""
    of_seeds = [each if isinstance(each, dict) and "status" in each else {"curve": each} for each in curves]
    return Series(name, tuple(run(**options | each | {"seed": seed}) for seed, each in enumerate(of_seeds)))


def inspected(name, *lines, **options) -> Series:
    """Makes a series of one run that has these lines of inspection.jsonl."""
    return Series(name, (run({10: 0.5}, lines=lines, **options),))


def line(step, *, layers=2, inside=0.5, own=0.9, running=0.9, **changes):
    """Makes a line of inspection.jsonl; a share `inside` of all inputs lies in [0, 0.25], others at 8."""
    histogram = [0.0] * (len(EDGES) - 1)
    histogram[32], histogram[-1] = inside, 1 - inside
    return {
        "step": step,
        "units": [[-1.0, 0.0, 1.0]] * 3,
        "movement": [0.1] * layers,
        "histograms": [[1.0] + histogram[1:]] * (layers - 1) + [histogram],
        "slope": [0.2] * layers,
        "loss": 2.0,
        "losses": [1.9, 1.8, 1.7, 1.6],
        "gradient_changes": [0.1, 0.2, 0.3, 0.4],
        "smoothness": 3.0,
        "gradient_shift": [0.0] + [0.5] * layers,
        "gradient_cosine": [1.0] + [0.9] * layers,
        "batch_statistics": {"loss": 0.3, "accuracy": own},
        "running_statistics": {"loss": 0.4, "accuracy": running},
        "identity_error": 1e-7,
    } | changes


def sketch(monkeypatch) -> dict:
    """Takes the time out of pictures: they are described, and returned as axes by label, but not drawn."""
    from matplotlib.figure import Figure

    described = {}

    def draw(describe, *, label):
        described[label] = Figure().subplots()
        describe(described[label])
        return "<svg></svg>"

    monkeypatch.setattr(pictures, "draw", draw)
    return described


def points(axes) -> dict:
    """Returns what the lines of an axes that have names show: name -> [(x, y), ...]."""
    return {
        line.get_label().lstrip(pictures.SHOWN): list(
            zip(map(float, line.get_xdata()), map(float, line.get_ydata()))
        )
        for line in axes.lines
        if line.get_label().startswith(pictures.SHOWN)
    }
