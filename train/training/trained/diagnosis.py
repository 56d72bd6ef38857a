"""Whether the running statistics of a trained run are those of its data."""

import shlex
from pathlib import Path

import jax

from jbn.inspection import Diagnosis
from train import data
from train.data import render_mixed
from train.models import NORMS
from train.runs import directory, processes
from train.runs.files import write_json
from train.training.trained.evaluation import check_norm, load_best
from train.training.trained.serving import test_split

# What to do, in the keys of a config, where the library says it in calls; of a kind of finding.
REMEDIES = {
    "one value": "Train with a larger batch_size.",
    "never updated": "{now}",
    "lag": "{now} Next time: model.norm = 'batch' with model.norm_debias = true, a lower "
    "model.norm_momentum, or more epochs.",
    "noise": "{now} Next time: a larger batch_size, a model.norm_momentum nearer to 1, or "
    "model.norm = 'batch' with recalibrate = true.",
    "other statistics": "{now} Next time: model.norm = 'batch' with recalibrate = true, or a lower "
    "model.norm_momentum. With --data.path, look at the preprocessing first.",
}


def diagnose(run_dir: Path, path: str | None = None) -> Diagnosis:
    """Diagnose the best checkpoint of a run on the test split of its data, or of the data at `path`.

    It is the one that `evaluate` evaluates, on the same examples, in random batches of about the size that
    the network was trained with.

    Raises:
      UserError: the run has no running statistics, or `evaluate` raises it.
    """
    config = directory.read_config(run_dir)
    having = "which has running statistics to diagnose"
    check_norm(run_dir, config, lambda kind: kind.over_batch, having)
    run = load_best(run_dir)
    _, split = test_split(run, run_dir, path)
    network, loss, mesh, variables, preprocessing = run.trained
    # As they are in the file, a batch may be of a single class.
    order = data.order(config.seed, 0, len(split))
    count = max(1, len(split) // max(1, config.batch_size // config.optimizer.accumulate))
    size = len(split) // count  # one size, so that one program serves all

    class Batches:
        """Batches of what the network gets, with labels and domains, as often as they are wanted."""

        def __iter__(self):
            for start in range(0, size * count, size):
                inputs, labels = split.take(order[start : start + size])
                x, domain = render_mixed(
                    config.data.renderings, jax.random.key(start), jax.device_put(inputs)
                )
                place = processes.replicate if size % mesh.size else processes.shard
                yield place(mesh, (preprocessing(x), labels, domain))

    found = network.diagnose(
        variables, Batches(), loss=lambda logits, batch: loss.per_example(logits, batch[1]).mean()
    )
    now = "Train again: the statistics of this norm cannot be pooled anew."
    if NORMS[config.model.norm].pools:
        now = f"Recalibrate: python -m train recalibrate {shlex.quote(str(run_dir))}."
    remedies = {kind: remedy.format(now=now) for kind, remedy in REMEDIES.items()}
    findings = (f._replace(remedy=remedies.get(f.kind, f.remedy)) for f in found.findings)
    return found._replace(findings=tuple(findings))


def write(run_dir: Path, found: Diagnosis) -> Path:
    """Write diagnosis.json into a run directory, and return its path."""
    path = run_dir / "diagnosis.json"
    with directory.usable(run_dir):
        write_json(path, found.as_dict())
    return path
