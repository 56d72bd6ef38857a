"""Jobs trained in this process, interrupted where a test wants it."""

from pathlib import Path

from train.runs.checkpoints import Checkpoints
from train.training import loop
from train.training.job import Job


class StopAfter:
    """Stands in for a signal: asks to stop once it was asked `n` times."""

    def __init__(self, n=None):
        self.left = n

    @property
    def received(self):
        if self.left is None:
            return None
        self.left -= 1
        return 15 if self.left <= 0 else None


def fit(config, stop_after=None):
    return loop.fit(config, StopAfter(stop_after))


def final_state(config):
    with Checkpoints(Path(config.run_dir)) as checkpoints:
        return checkpoints.restore(checkpoints.latest_step, Job(config).initial)
