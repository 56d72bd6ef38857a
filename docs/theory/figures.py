"""Draw the pictures of these pages and of the README: `python docs/theory/figures.py RUNS`.

RUNS has what these lines make, half an hour on two cores. Curves are those of the first seed.

    python -m train compare configs/paper_mnist.toml configs/paper_mnist_bn.toml \
      configs/paper_mnist_bn_x5.toml configs/paper_mnist_bn_x30.toml configs/paper_mnist_lecun.toml \
      --data.path mnist.npz --seeds 5 --out RUNS/paper_mnist
    python -m train sweep configs/mnist_mlp.toml --data.path mnist.npz --epochs 5 --seeds 3 \
      --model.norm none,batch --optimizer.learning-rate 0.01,0.1,0.3,1,3,10,30 --out RUNS/mnist-rates

Errors by batch size are those of the table in which_norm.md; speed is that of benchmarks/results/layers.json
and of the tables in benchmarks/README.md.
"""

import itertools
import json
import sys
from pathlib import Path
from statistics import geometric_mean, median

from matplotlib import pyplot as plt

HERE = Path(__file__).parent
BENCHMARKS = HERE.parents[1] / "benchmarks"
BLUE, ORANGE, TEAL, PURPLE, GREEN, PINK, LILAC = (
    "#0c6ccc",
    "#b43c00",
    "#189ca8",
    "#904890",
    "#606c54",
    "#e46084",
    "#a878e4",
)
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "figure.dpi": 72,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 11,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "jbn",
}
INPUTS = {  # of a layer
    "64x28x28x128 bfloat16": ("convolution, bfloat16", TEAL),
    "64x28x28x128 float32": ("convolution, float32", BLUE),
    "4096x512 float32": ("dense, float32", PURPLE),
}
COMPILED = {  # and where in benchmarks/README.md its table is
    "H100": "\nCompiled for an H100, not run on it:",
    "v5e": "\nCompiled for a TPU v5e, not run on it. Arrays",
}
PAPER = {
    "paper_mnist": ("without, learning rate 0.1", ORANGE),
    "paper_mnist_lecun": ("the same, LeCun's initial weights", GREEN),
    "paper_mnist_bn": ("batch norm, learning rate 0.1", BLUE),
    "paper_mnist_bn_x30": ("batch norm, learning rate 3", TEAL),
}


def main(runs: Path) -> None:
    """Draw all of them, into `figures` beside this file."""
    plt.style.use(STYLE)
    (HERE / "figures").mkdir(exist_ok=True)
    for name, size, columns, draw in (
        ("batch_sizes", (7.2, 4), 1, draw_batch_sizes),
        ("training", (7.2, 3.6), 1, lambda axes: draw_training(axes, runs)),
        ("percentiles", (7.2, 3.2), 2, lambda *axes: draw_percentiles(axes, runs)),
        ("learning_rates", (7.2, 3.2), 1, lambda axes: draw_learning_rates(axes, runs)),
        ("speed", (7.2, 3.6), 1, draw_speed),
        ("readme", (11, 4.3), 2, lambda left, right: (draw_training(left, runs), draw_speed(right))),
    ):
        figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False)
        draw(*axes[0])
        figure.savefig(HERE / "figures" / f"{name}.svg", metadata={"Date": None})


def draw_training(axes, runs):
    """Draw the test accuracy of the paper's network over steps (figure 1 a)."""
    for name, (label, color) in PAPER.items():
        curve = on_test_split(runs / "paper_mnist" / name)
        steps, accuracy = ([line[key] for line in curve] for key in ("step", "accuracy"))
        axes.plot(steps, accuracy, color=color, label=label)
    axes.set(ylim=(0, 1), title="Test accuracy on MNIST, three layers of 100 sigmoids")
    over_steps(axes)
    axes.legend(loc="lower right")


def draw_percentiles(axes, runs):
    """Draw where the inputs of one unit of the last hidden layer lie (figure 1 b, c)."""
    for panel, name, how in zip(axes, ("paper_mnist", "paper_mnist_bn"), ("without", "with batch norm")):
        _, color = PAPER[name]
        found = read_lines(runs / "paper_mnist" / name / "inspection.jsonl")
        steps = [line["step"] for line in found]
        low, middle, high = zip(*(line["units"][0] for line in found))
        panel.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        panel.plot(steps, middle, color=color)
        panel.set(ylim=(-4.2, 3), title=f"A sigmoid's input, {how}")
        over_steps(panel)
    axes[0].text(31_000, -0.95, "median")
    axes[0].text(14_500, 0.12, "15th to 85th percentile")


def over_steps(axes):
    """Label the axis of steps."""
    axes.set(xlabel="step", xlim=(0, 50_000), xticks=range(0, 50_001, 10_000))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:.0f}k" if step else "0")


def draw_learning_rates(axes, runs):
    """Draw the final test accuracy over learning rates, the median of the seeds that finished."""
    for norm, label, color in (("none", "without", ORANGE), ("batch", "batch norm", BLUE)):
        reached = {}
        for run in json.loads((runs / "mnist-rates" / "results.json").read_text()):
            if run["model.norm"] == norm and run["status"] == "finished":
                accuracy = on_test_split(runs / "mnist-rates" / Path(run["run_dir"]).name)[-1]["accuracy"]
                reached.setdefault(run["optimizer.learning_rate"], []).append(accuracy)
        rates = sorted(reached)
        axes.plot(rates, [median(reached[rate]) for rate in rates], "o-", color=color, label=label)
    axes.set(title="Test accuracy on MNIST after 5 epochs", xscale="log", xlabel="learning rate", ylim=(0, 1))
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.legend(loc="lower left")


def draw_batch_sizes(axes):
    """Draw the table of which_norm.md."""
    sizes, *rows = table(HERE / "which_norm.md", "| batch size |")
    looks = zip(rows, (BLUE, ORANGE, PINK, LILAC, GREEN, TEAL, PURPLE), "osD^vP*")
    for (name, *errors), color, marker in looks:
        points = [(float(size), float(error)) for size, error in zip(sizes[1:], errors) if error]
        axes.plot(*zip(*points), marker=marker, color=color, label=name.replace("`", ""))
    axes.set(
        title="Test error on MNIST after 3 epochs, percent", xscale="log", yscale="log", xlabel="batch size"
    )
    axes.set_xticks([float(size) for size in sizes[1:]], sizes[1:])
    axes.set_yticks([2, 3, 5, 10, 20, 30], [2, 3, 5, 10, 20, 30])
    axes.minorticks_off()
    axes.legend()


def draw_speed(axes):
    """Draw a layer of `jbn.linen` over Flax's: time where it was measured, counts where it was compiled."""
    groups = {"CPU\ntime": cpu_ratios()}
    for machine, sentence in COMPILED.items():
        head, *rows = table(BENCHMARKS / "README.md", sentence)
        counts = {row[0]: dict(zip(head, row)) for row in rows}
        for what in ("bytes", "kernels"):
            pairs = [[counts[name][f"{x}: {what}"] for name in ("jbn.linen", "flax.linen")] for x in INPUTS]
            groups[f"{machine}\n{what}"] = [float(ours) / float(theirs) for ours, theirs in pairs]
    for i, (label, color) in enumerate(INPUTS.values()):
        heights = [ratios[i] for ratios in groups.values()]
        at = [group + (i - 1) * 0.27 for group in range(len(groups))]
        bars = axes.bar(at, heights, 0.25, color=color, label=label)
        axes.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=8.5, padding=1)
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.axvline(0.5, color="black", linewidth=1, ymax=0.88)
    axes.text(0, 1.18, "measured", ha="center")
    axes.text(2.5, 1.18, "counted in compiled programs, not run", ha="center")
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylim=(0, 1.4), title="A layer in training: jbn.linen over Flax's default")
    axes.grid(False)
    axes.legend(loc="upper center", ncols=3, fontsize=10, columnspacing=1, handlelength=1)


def cpu_ratios():
    """Return the times of a layer over Flax's, means over shapes, in the order of INPUTS."""
    found = {}
    for case in json.loads((BENCHMARKS / "results" / "layers.json").read_text())["cases"]:
        ours, theirs = (case["candidates"][name]["median"] for name in ("jbn.linen", "flax.linen"))
        found.setdefault((case["section"], len(case["shape"])), []).append(ours / theirs)
    training = "Training: forward and backward, float32"
    return [geometric_mean(found[key]) for key in (("Training, bfloat16", 4), (training, 4), (training, 2))]


def on_test_split(run):
    """Read the lines of a run's metrics.jsonl that are of the test split."""
    return [line for line in read_lines(run / "metrics.jsonl") if line["split"] == "test"]


def read_lines(path):
    """Read a file of one JSON object a line."""
    return list(map(json.loads, path.read_text().splitlines()))


def table(page, start):
    """Return the cells, row by row, of the first table of a page from a text on."""
    text = page.read_text()
    lines = itertools.dropwhile(lambda line: line[:1] != "|", text[text.index(start) :].splitlines())
    head, _, *rows = itertools.takewhile(lambda line: line[:1] == "|", lines)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in [head, *rows]]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
