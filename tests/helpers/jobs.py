"""Jobs trained in this process, interrupted where a test wants it."""

import contextlib
from pathlib import Path

from train.config import Config, Data, Model, Optimizer
from train.runs.checkpoints import Checkpoints
from train.runs.summary import read_metrics
from train.training import loop, prepare
from train.training.state import from_items, to_items


class StopAfter:
    """Stands in for a signal: asks to stop once it was asked `n` times."""

    def __init__(self, n=None):
        self.left = n

    at_once = staticmethod(contextlib.nullcontext)

    @property
    def received(self):
        if self.left is None:
            return None
        self.left -= 1
        return 15 if self.left <= 0 else None


def make_config(run_dir, **changes):
    """Make a job of a second: a narrow MLP on the digits, 10 steps an epoch."""
    sections = {"data": Data, "model": Model, "optimizer": Optimizer}
    values = {
        "run_dir": str(run_dir),
        "steps": 30,
        "eval_every": 12,
        "devices": 1,
        "model": {"widths": (16,)},
    }
    built = {
        key: sections[key](**value) if key in sections else value for key, value in (values | changes).items()
    }
    return Config(**built)


def fit(config, stop_after=None):
    """Train a job, or stop it after the `stop_after`-th dispatch."""
    return loop.fit(config, StopAfter(stop_after))


def final_state(config):
    """Return the training state of the newest checkpoint."""
    like = prepare(config).initial
    with Checkpoints(Path(config.run_dir)) as checkpoints:
        return from_items(checkpoints.restore(checkpoints.latest_step, to_items(like)), like)


def results(run_dir):
    """Return the lines of metrics.jsonl without their times."""
    return [{**line, "seconds": None} for line in read_metrics(Path(run_dir))]
