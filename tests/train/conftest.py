"""The program runs Flax's and optax's code, which relies on JAX's default promotion."""

import pytest


@pytest.fixture(autouse=True)
def _standard_promotion(standard_promotion):
    yield


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Drawing curves.png takes longer than most jobs; tests/train/runs/test_curves.py draws it."""
    from train.runs import curves

    monkeypatch.setattr(curves, "draw", lambda run_dir: None)


@pytest.fixture
def refusal():
    """Return the sentence with which a function refuses bad input."""
    from train.errors import UserError

    def refusal(function, *arguments, **options):
        with pytest.raises(UserError) as error:
            function(*arguments, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refusal


@pytest.fixture
def make_config(tmp_path):
    """Make a job of a second in a run directory of this test, with changes if a test wants any."""
    from tests.helpers import jobs

    return lambda **changes: jobs.make_config(**{"run_dir": tmp_path / "run"} | changes)
