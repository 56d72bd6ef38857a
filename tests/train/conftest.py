"""The program runs Flax's and optax's code, which relies on JAX's default promotion."""

import pytest


@pytest.fixture(autouse=True)
def _standard_promotion(standard_promotion):
    yield


@pytest.fixture
def make_config(tmp_path):
    """Makes a job of a second: a narrow MLP on the digits, 10 steps an epoch."""
    from train.config import Config, Data, Model, Optimizer

    def make(**changes):
        sections = {"data": Data, "model": Model, "optimizer": Optimizer}
        values = {
            "run_dir": str(tmp_path / "run"),
            "steps": 30,
            "eval_every": 12,
            "devices": 1,
            "model": {"widths": (16,)},
        } | changes
        return Config(
            **{key: sections[key](**value) if key in sections else value for key, value in values.items()}
        )

    return make
