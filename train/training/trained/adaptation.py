"""How good a trained run is on images that are shown otherwise, by which statistics it normalizes them with.

Nado et al. 2020, "Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift";
Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation".
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train import data, models
from train.config import Model, RenderingName
from train.data import Preprocessing, Split, render
from train.data.renderings import check_range
from train.errors import UserError
from train.models import Variables
from train.runs import directory, processes
from train.runs.files import write_json
from train.training.losses import Sums, add_up
from train.training.trained.evaluation import TrainedRun, check_norm, load_best
from train.training.trained.serving import test_split

AT_ONCE = 512  # examples, or one batch of more


def adapt(
    run_dir: Path,
    shifts: Sequence[RenderingName],
    batch_sizes: Sequence[int],
    prior: float,
    path: str | None = None,
) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run on shifted images, and return what adaptation.json holds.

    Each example counts once, in a batch of random others; the last batch may be smaller. "running" is with
    the running statistics, "batch" with those of each batch, and "blended" with both, by `jbn.blend`.

    Args:
      prior: for how many values of a feature the running statistics count: examples, in convolutions times
        positions.
      path: other data, as in `evaluate`.

    Raises:
      UserError: an argument is out of range, the run has no batch norm or no images, or `evaluate` raises it.
    """
    config = directory.read_config(run_dir)
    having = "whose statistics can be blended with a batch's"
    check_norm(run_dir, config, lambda kind: kind.pools, having)
    if not 0 <= prior < float("inf"):
        raise UserError(f"--prior: expected a number of examples >= 0, got {prior:g}.")
    for key, values in (("--shifts", shifts), ("--batch-sizes", batch_sizes)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"{key}: expected one or more, each once, got {list(values)}.")
    if min(batch_sizes) < 1:
        raise UserError(f"--batch-sizes: expected numbers >= 1, got {min(batch_sizes)}.")
    run = load_best(run_dir)
    if len(run.data.shape) != 3:
        raise UserError(
            f"'{run_dir}': expected a run on images, got one on vectors of length {run.data.shape[0]}."
        )
    name, split = test_split(run, run_dir, path)
    check_range(f"'{run_dir}'", split.take(slice(AT_ONCE)).inputs)
    order = data.order(config.seed, 0, len(split))
    found = {
        shift: {
            "running": _evaluate(run, split, order, shift, None, AT_ONCE),
            **{
                kind: {str(size): _evaluate(run, split, order, shift, blend, size) for size in batch_sizes}
                for kind, blend in (("batch", 0.0), ("blended", float(prior)))
            },
        }
        for shift in shifts
    }
    headline = run.trained.loss.headline
    return {"split": name, "step": run.step, "examples": len(split), "prior": prior, headline: found}


def write(run_dir: Path, found: dict[str, Any]) -> Path:
    """Write adaptation.json into a run directory, and return its path."""
    path = run_dir / "adaptation.json"
    with directory.usable(run_dir):
        write_json(path, found)
    return path


def table(found: dict[str, Any]) -> str:
    """Return a table of what `adapt` has found, a line for each shift and its statistics."""
    headline = next(name for name, value in found.items() if isinstance(value, dict))
    of_shifts = found[headline]
    sizes = list(next(iter(of_shifts.values()))["batch"])
    lines = [f"{headline:<11} {'statistics':<10} {''.join(f'{size:>7}' for size in sizes)}  examples a batch"]
    for shift, of_shift in of_shifts.items():
        for kind, values in of_shift.items():
            cells = values if isinstance(values, dict) else dict.fromkeys(sizes, values)
            shown = "".join(f"{cells[size]:7.3f}" for size in sizes)
            lines.append(f"{shift:<11} {kind:<10} {shown}")
    return "\n".join(lines)


def _evaluate(
    run: TrainedRun, split: Split, order: np.ndarray, shift: RenderingName, prior: float | None, size: int
) -> float | None:
    """Return the headline over a split in batches of `size`, with running statistics that count `prior`."""
    loss, mesh = run.trained.loss, run.trained.mesh
    network = {"model": run.config.model, "outputs": run.data.labels.outputs}
    sums: Sums = {}
    step = size * max(1, AT_ONCE // size)
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        inputs, labels = split.take(rows)
        x = _shown(shift, *processes.replicate(mesh, (run.trained.preprocessing, inputs, rows)))
        whole = len(rows) - len(rows) % size
        for part in (slice(whole), slice(whole, None)):
            if len(labels[part]):
                logits = _logits(run.trained.variables, x[part], prior, size=size, **network)
                scores = add_up(loss.scores(np.asarray(logits), labels[part]))
                sums = {name: sums.get(name, 0) + np.float64(value) for name, value in scores.items()}
    return loss.metrics(sums)[loss.headline]


@partial(jax.jit, static_argnums=0)
def _shown(shift: RenderingName, preprocessing: Preprocessing, inputs: jax.Array, at: jax.Array):
    return preprocessing(render(shift, jax.random.key(0), inputs, at))


@partial(jax.jit, static_argnames=("model", "outputs", "size"))
def _logits(
    variables: Variables, x: jax.Array, prior: jax.Array | None, *, model: Model, outputs: int, size: int
) -> jax.Array:
    """Return the logits of examples, (n, outputs), in batches of `size`, or in one of fewer."""
    network = models.build(model, x.shape[1:], outputs, blend=prior)
    apply = lambda batch: network.apply(variables, batch, train=False)[0]
    return jax.vmap(apply)(x.reshape(-1, min(size, len(x)), *x.shape[1:])).reshape(len(x), outputs)
