"""The chart of one run, curves.png."""

from pathlib import Path

from train.runs.summary import read_metrics


def draw(run_dir: Path) -> None:
    """Draw loss, accuracy and whatever else was measured over steps, split by split, into curves.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(run_dir)
    if not lines:
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    keys = [key for key in lines[0] if key not in ("step", "split", "seconds")]
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for split in ("train", "validation", "test"):
            points = [
                (line["step"], line[key])
                for line in lines
                if line["split"] == split and line.get(key) is not None
            ]
            if points:
                axes.plot(*zip(*points), label=split, marker=".")
        axes.set(xlabel="step", ylabel=key)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(run_dir.name, parse_math=False)
    figure.savefig(run_dir / "curves.png", dpi=120)
