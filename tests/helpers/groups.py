"""Jobs of a study from plain numbers, as they would have left them, and charts that are not drawn."""

import json
from pathlib import Path

from train.config import Config, Data, Model, Optimizer
from train.runs.files import write_json
from train.runs.summary import Summary
from train.studies import charts
from train.studies.results import Group, Run
from train.studies.runner import Outcome
from train.training.inspection import EDGES
from train.training.losses import LOSSES

REFUSED = {
    "status": "refused",
    "error": "batch_size: expected at most 1293, got 2000. Use fewer.",
    "classes": None,
}
FAILED = {"status": "failed", "error": "the loss of step 7 is not finite. Try a lower one."}
NOTHING = {  # a line of inspection.jsonl in which nothing is finite
    **dict(units=[[None] * 3] * 3, movement=[None] * 2, histograms=[[None] * 64] * 2, slope=[None] * 2),
    **dict(loss=None, losses=[None] * 4, gradient_changes=[None] * 4, smoothness=None, identity_error=None),
    **dict(gradient_shift=[None] * 3, gradient_cosine=[None] * 3),
    **dict.fromkeys(("batch_statistics", "running_statistics"), {"loss": None, "accuracy": 0.1}),
}


def run(curve=None, *, name="job", status="finished", error=None, classes=10, lines=(), **options) -> Run:
    """Make a run from {step: test accuracy or R^2}; what else is given goes to its model, mostly."""
    curve, values = curve or {}, options.pop("values", {})
    seed, rate, seconds = options.pop("seed", 0), options.pop("rate", 0.1), options.pop("seconds", 1.5)
    chosen, last = options.pop("chosen", {}), options.pop("last", {})
    model, optimizer = Model(**{"norm": "none"} | options), Optimizer(learning_rate=rate)
    config = Config("unused", Data(), model, optimizer, seed, steps=100)
    best = max(curve.values(), default=None)
    headline = LOSSES[model.loss].headline
    chosen = {headline: best and best - 0.01, **chosen}
    summary = Summary("finished", test_accuracy=chosen.get("accuracy"), wall_seconds=seconds, test=chosen)
    outcome = Outcome(status, None if status == "refused" else summary, error, 0)
    metrics = [
        {"step": step, "split": split, "loss": 1.0, headline: at * (split == "test"), **last}
        for step, at in curve.items()
        for split in ("train", "test")
    ]
    return Run(name, values, config, outcome, classes, metrics, list(lines))


def write_run(config, curve, *, inspections=()):
    """Write the run directory of a job of 7 classes that reached {step: test accuracy}."""
    path = Path(config.run_dir)
    path.mkdir(parents=True, exist_ok=True)
    data = {"shape": [8, 8, 1], "dtype": "uint8", "classes": 7, "fingerprint": "f"}
    write_json(path / "data.json", data | {"preprocessing": {"mean": 0.0, "std": 1.0}})
    lines = run(curve).metrics
    for name, found in (("metrics", lines), ("inspection", inspections)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))


def group(name, *curves, position=0, **options) -> Group:
    """Make a job with a seed for each curve, or dict of options of `run`."""
    of_seeds = [each if "status" in each else {"curve": each} for each in curves]
    runs = (run(**options | each | {"name": name, "seed": seed}) for seed, each in enumerate(of_seeds))
    return Group(name, position, tuple(runs))


def inspected(name, *lines, position=0, **options) -> Group:
    """Make a job of one seed that has these lines of inspection.jsonl."""
    return Group(name, position, (run({10: 0.5}, name=name, lines=lines, **options),))


def line(step, *, layers=2, inside=0.5, own=0.9, running=0.9, **changes):
    """Make a line of inspection.jsonl; a share `inside` of all inputs lies in [0, 0.25], others at 8."""
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


def undrawn(monkeypatch) -> dict:
    """Return a dict that receives the axes of each chart by its alt text; nothing is rendered."""
    from matplotlib.figure import Figure

    described = {}

    def chart(draw, *, alt, caption):
        described[alt] = Figure().subplots()
        draw(described[alt])
        return charts.Chart("data:light", "data:dark", alt, caption)

    monkeypatch.setattr(charts, "chart", chart)
    return described


def points(axes) -> dict:
    """Return what the lines of an axes that have names show: name -> [[x, y], ...]."""
    return {_name(shown): shown.get_xydata().tolist() for shown in axes.lines if _name(shown)}


def colors(axes) -> dict:
    """Return the colours of what has a name in an axes: lines, and outlines of histograms."""
    from matplotlib.colors import to_hex

    found = {_name(shown): to_hex(shown.get_color()) for shown in axes.lines}
    found |= {_name(shown): to_hex(shown.get_edgecolor()) for shown in axes.patches}
    return {name: color for name, color in found.items() if name}


def _name(artist) -> str:
    return artist.get_label().removeprefix("\N{ZERO WIDTH SPACE}") if artist.get_label()[:1] != "_" else ""
