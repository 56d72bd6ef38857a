"""What looks like a mistake is said before training, and nothing is said of usual jobs."""

import dataclasses

import numpy as np
import pytest

from train.config import Config, Data, Model, Optimizer
from train.data import load
from train.data.formats.readers import READERS, Reader
from train.data.formats.reading import Found
from train.training import mistakes
from train.training.job import prepare

X, Y = np.random.RandomState(0).normal(size=(40, 6, 6, 1)), np.arange(40) % 3


@pytest.fixture
def notes(monkeypatch):
    """Return what is said of a job on arrays."""

    def notes(x=X, y=Y, **changes):
        arrays = {"x_train": np.asarray(x), "y_train": np.asarray(y)}
        arrays |= {"x_test": arrays["x_train"], "y_test": arrays["y_train"]}
        reader = Reader(lambda path, config: Found(arrays), "arrays", needs_path=False)
        monkeypatch.setitem(READERS, "given", reader)
        usual = Config("run", Data("given"), Model(widths=(4,)), steps=10, batch_size=8, devices=1)
        config = dataclasses.replace(usual, **changes)
        return list(mistakes.likely(config, load(config.data, loss=config.model.loss), steps=config.steps))

    return notes


def test_nothing_is_said_of_usual_jobs(notes):
    uint8 = np.random.RandomState(0).randint(0, 256, (40, 6, 6, 3)).astype(np.uint8)
    usual = Optimizer(warmup_steps=9)
    for job in (
        {},
        {"x": uint8},
        {"x": X[..., 0]},
        {"x": X.reshape(40, -1)},
        {"x": uint8[:, :3]},  # three rows, and three channels at the end
        {"x": np.float32(uint8), "data": Data("given", normalize=True)},
        {"x": np.float32(uint8), "data": Data("given", feature_scales=(1.0, 1.0))},
        {"x": np.float32(uint8), "model": Model(widths=(4,), norm_inputs=True)},
        {"optimizer": usual},
        {"batch_size": 1, "model": Model(widths=(4,), norm="layer")},
        {"batch_size": 8, "model": Model(widths=(4,), norm="ghost", virtual_batch_size=2)},
    ):
        assert notes(**job) == [], job.keys()


SAID = [
    ({"data": Data("given", label="y")}, "data.label = 'y' changes nothing with data.name = 'given'"),
    ({"x": X.transpose(0, 3, 1, 2)}, "images of shape [1, 6, 6] look as if their channels came first"),
    (
        {"x": np.zeros((40, 3, 32, 32), np.uint8) + 50 * Y[:, None, None, None].astype(np.uint8)},
        "[3, 32, 32] look",
    ),
    ({"x": np.abs(255 * X).clip(0, 255)}, "inputs go up to 255, where networks expect a mean of 0"),
    ({"x": 1000 * X.reshape(40, -1)}, "set data.normalize = true."),
    ({"x": X / 1000}, "inputs go up to 0.00"),
    ({"x": (np.abs(X) * 9).clip(0, 16).astype(np.uint8)}, "inputs go up to 0.06275 (bytes over 255), where"),
    ({"data": Data("given", image_size=8)}, "data.image_size = 8 changes nothing with data.name = 'given'"),
    ({"x": np.ones_like(X)}, "all of the first 36 training inputs are equal"),
    (
        {"y": Y + 1},
        "labels go from 1 to 3 and 0 never comes, so that one output of the network is for nothing",
    ),
    ({"y": 2 * Y}, "no training example is of class 1, 3."),
    ({"y": np.zeros(40, int)}, "all training examples are of one class, '0': there is nothing to learn"),
    ({"y": np.full(40, "cat")}, "all training examples are of one class, 'cat'"),
    ({"y": np.full(40, 3)}, "all training examples are of one class, '3'"),
    (
        {"y": np.full(40, 2.5), "model": Model(widths=(4,), loss="squared_error")},
        "all training labels are 2.5: there is nothing to learn.",
    ),
    ({"x": X[:4], "y": Y[:4], "batch_size": 2}, "data.validation = 0.1 of 4 examples is none"),
    (
        {"optimizer": Optimizer(warmup_steps=10)},
        "optimizer.warmup_steps = 10 of 10 steps in all: the learning",
    ),
    ({"batch_size": 1}, "batch_size = 1: a batch of one example has no variance"),
    # With running statistics no variance is missed.
    ({"batch_size": 1, "model": Model(widths=(4,), frozen="norms")}, "model.frozen = 'norms' without"),
    ({"optimizer": Optimizer(accumulate=8)}, "batch_size = 8 in 8 parts: a batch of one example"),
    (
        {"model": Model(widths=(4,), norm="ghost", virtual_batch_size=1)},
        "model.virtual_batch_size = 1: a batch",
    ),
]


def test_what_is_rarely_meant_is_said(notes):
    for job, expected in SAID:
        said = notes(**job)
        assert len(said) == 1 and expected in said[0], (expected, said)


def test_notes_of_the_data_come_with_them(notes, monkeypatch):
    arrays = {"x_train": X, "y_train": Y}
    reader = Reader(lambda path, config: Found(arrays, notes=("Said.",)), "arrays", needs_path=False)
    monkeypatch.setitem(READERS, "mine", reader)
    assert load(Data("mine")).notes[0] == "Said."
    config = Config("run", Data("mine"), Model(widths=(4,)), steps=10, batch_size=8, devices=1)
    config = dataclasses.replace(config, optimizer=Optimizer(warmup_steps=10))
    assert [note.split()[0] for note in prepare(config).notes] == ["Said.", "The", "warning:"]
