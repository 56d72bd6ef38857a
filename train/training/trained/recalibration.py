"""Running statistics pooled anew over the training data, with the weights of the best checkpoint."""

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from train import data, models
from train.config import RenderingName
from train.data import Dataset, Preprocessing, Split, render_mixed
from train.models import Network, Variables
from train.runs import directory, processes
from train.runs.checkpoints import RECALIBRATED, Checkpoints
from train.runs.files import write_json
from train.runs.summary import read_summary
from train.training.job import load_data
from train.training.steps import update_statistics, without_counts
from train.training.trained.evaluation import TrainedNetwork, TrainedRun, check_norm, data_at, load_best


def recalibrate(run_dir: Path, path: str | None = None) -> dict[str, Any]:
    """Recalibrate the best checkpoint of a run, and return its test metrics before and after.

    Args:
      path: where the data of the run are now, if not where it was trained.

    Raises:
      UserError: the run or its data cannot be read, other data are there, the run has no statistics to pool,
        or another process trains it.
    """
    config = directory.read_config(run_dir)
    check_norm(run_dir, config, lambda kind: kind.pools, "whose running statistics can be pooled")
    with directory.created_and_locked(run_dir):
        best = load_best(run_dir, recalibrated=False)
        dataset = load_data(dataclasses.replace(config, data=data_at(config.data, path)), run_dir)
        directory.check_same_data(run_dir, dataset.fingerprint, "give their --data.path")
        before = best.evaluate(dataset.test)
        after = recalibrate_best(run_dir, best, dataset)
        if summary := read_summary(run_dir):
            summary = dataclasses.replace(summary, recalibrated=after)
            write_json(run_dir / "summary.json", dataclasses.asdict(summary))
    examples = len(dataset.test)
    return {"split": "test", "step": best.step, "before": before, "after": after, "examples": examples}


def recalibrate_best(
    run_dir: Path, best: TrainedRun, dataset: Dataset, stopped: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Recalibrate the best checkpoint, save it in the run directory, and return its test metrics.

    Every process of a job calls this. Nothing is saved if `stopped` says so meanwhile; it then returns None.
    """
    config, trained = best.config, best.trained
    variables = pool(
        models.build_pooling(config.model, best.data.shape, best.data.labels.outputs),
        trained,
        dataset.train,
        # As they are in the file, a batch may be of a single class.
        data.order(config.seed, 0, len(dataset.train)),
        config.batch_size // config.optimizer.accumulate,
        stopped,
        config.data.renderings,
    )
    if variables is None:
        return None
    metrics = best._replace(trained=trained._replace(variables=variables)).evaluate(dataset.test)
    _save(run_dir, best.step, variables, metrics)
    return metrics


def pool(
    network: Network,
    trained: TrainedNetwork,
    split: Split,
    order: np.ndarray,
    batch_size: int,
    stopped: Callable[[], bool] = lambda: False,
    renderings: tuple[RenderingName, ...] = (),
) -> Variables | None:
    """Return a network's variables with the running statistics of a whole split, or None if `stopped`.

    Every example counts once, without augmentation, in one of the renderings. As in training, each layer
    normalizes with the moments of the batch; the last batch takes in what is left over. A feature whose
    variance float32 cannot hold, or of whose domain there are no examples, keeps the statistics that it has.

    Args:
      network: the one that is trained, whose new statistics are those of a batch alone.
      order: (n,), the order in which the split is gone through.
    """
    (_, stats), mesh = trained.variables, trained.mesh
    pooled = processes.replicate(mesh, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stats))
    batches = len(order) // batch_size
    for i in range(batches):
        if stopped():
            return None
        rows = order[i * batch_size : (i + 1) * batch_size if i + 1 < batches else None]
        place = processes.replicate if len(rows) % mesh.size else processes.shard
        inputs = place(mesh, split.take(rows).inputs)
        pooled = _add(network, mesh, renderings, trained.variables, trained.preprocessing, inputs, pooled, i)
        jax.block_until_ready(pooled)  # or batches that wait would fill the memory
    return trained.variables._replace(batch_stats=_complete_all(pooled, stats))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _add(
    network: Network,
    mesh: Mesh,
    renderings: tuple[RenderingName, ...],
    variables: Variables,
    preprocessing: Preprocessing,
    inputs: jax.Array,
    pooled: Any,
    number: int,
) -> Any:
    """Return the pooled statistics after one more batch."""
    x, domain = render_mixed(renderings, jax.random.key(number), inputs)
    given = variables._replace(batch_stats=without_counts(variables.batch_stats))
    _, stats = network.apply(given, preprocessing(x), train=True, domain=domain)
    pooled = update_statistics(jbn.pooled(), pooled, stats)
    return jax.lax.with_sharding_constraint(pooled, NamedSharding(mesh, P()))


def _complete(pooled: jbn.Moments, old: jbn.Moments) -> jbn.Moments:
    """Count for complete, as moments from elsewhere do in a job that goes on from them."""
    counted = pooled.count > 0
    pooled = pooled._replace(count=jnp.ones_like(pooled.count))
    return jax.tree.map(partial(jnp.where, counted), pooled, old)


_complete_all = jax.jit(partial(update_statistics, _complete))


def _save(run_dir: Path, step: int, variables: Variables, metrics: dict[str, float]) -> None:
    """Replace what an earlier recalibration has left; a kill leaves one of the two, or none."""
    folder, new, old = (
        run_dir / name for name in (RECALIBRATED, f".{RECALIBRATED}.tmp", ".recalibrated.old")
    )
    with processes.raise_on_all("make room in the run directory"):
        if processes.is_primary():
            shutil.rmtree(new, ignore_errors=True)
    with Checkpoints(run_dir, new.name) as checkpoints:
        checkpoints.save(step, {"model": variables._asdict()}, metrics)
    with processes.raise_on_all("replace the recalibrated model"):
        if processes.is_primary():
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
