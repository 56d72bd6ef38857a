import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from train import serving
from train.__main__ import main
from train.config import Config, Data, Model, Optimizer
from train.data import dataset as data
from train.errors import UserError
from train.models import network as models
from train.runs import directory as run_directory
from train.runs import processes as distributed
from train.runs.checkpoints import Checkpoints
from train.training import steps as states
from train.training.job import evaluate_split


class Live(NamedTuple):
    """What a run has in memory when it saves."""

    network: models.Network
    mesh: jax.sharding.Mesh
    variables: models.Variables
    preprocessing: data.Preprocessing
    test: data.Split

    def evaluate(self, split=None):
        return evaluate_split(*self[:4], self.test if split is None else split)

    def probabilities(self, inputs):
        """Those of inputs, in batches as `predict` makes them."""
        missing = -len(inputs) % serving.PREDICT_BATCH
        padded = np.concatenate([inputs, np.zeros((missing, *inputs.shape[1:]), inputs.dtype)])
        parts = [
            states.probabilities(self.network, self.variables, self.preprocessing, part)
            for part in padded.reshape(-1, serving.PREDICT_BATCH, *inputs.shape[1:])
        ]
        return np.concatenate(parts)[: len(inputs)]


def save(run_dir, *, average=0.0, batch_size=128, **changes):
    """Leaves a run with one checkpoint, of random parameters and statistics, which take no time to train."""
    sections = {"data": Data, "model": Model}
    changes = {key: sections[key](**values) for key, values in changes.items()}
    optimizer = Optimizer(average=average)
    config = Config(str(run_dir), steps=1, batch_size=batch_size, optimizer=optimizer, **changes)
    dataset = data.load(config.data)
    shape, mesh = dataset.train.inputs.shape[1:], distributed.mesh_of(jax.devices()[:1])
    network = models.build(config.model, shape, dataset.classes)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, *shape), np.float32))
    rng = np.random.RandomState(0)

    def draw(path, leaf):
        positive = path[-1].key in ("var", "count")
        return np.asarray(
            rng.uniform(0.5, 1.5, leaf.shape) if positive else rng.normal(0, 0.4, leaf.shape), leaf.dtype
        )

    trained, averaged = (
        distributed.replicate(mesh, jax.tree_util.tree_map_with_path(draw, shapes)) for _ in range(2)
    )
    state = states.TrainState(
        *(np.ones((), np.int32), trained, averaged if average else None),
        *({"count": np.zeros(())}, states.no_sums(), np.zeros((), np.int32)),
    )
    run_directory.create(config)
    run_directory.begin(config, dataset)
    with Checkpoints(Path(config.run_dir)) as checkpoints:
        checkpoints.save(state, {"loss": 1.0, "accuracy": 0.5})
    preprocessing = distributed.replicate(mesh, dataset.preprocessing)
    return Live(network, mesh, state.evaluated, preprocessing, dataset.test)


def predicted(run_dir, *paths):
    lines = list(serving.predict(run_dir, [str(path) for path in paths]))
    return lines, np.float32([line["probabilities"] for line in lines])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("digits")
    return run_dir, save(run_dir, model={"widths": (16,)})


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A run on colour images of bytes, which the network sees normalized."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.RandomState(0)
    x, y = rng.randint(0, 256, (90, 6, 5, 3)).astype(np.uint8), np.arange(90) % 4
    np.savez(folder / "npz.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    options = {"name": "npz", "path": str(folder), "normalize": True}
    return folder, save(folder / "run", data=options, model={"widths": (8,)}, batch_size=20)


# Evaluation


def test_evaluation_is_that_of_the_live_model(digits, colours):
    for run_dir, live in (digits, (colours[0] / "run", colours[1])):
        expected = {"split": "test", "step": 1, **live.evaluate(), "examples": len(live.test)}
        assert serving.evaluate(run_dir) == expected


def test_data_from_elsewhere_are_evaluated_as_if_the_run_had_had_them(digits, tmp_path):
    run_dir, live = digits
    x, y = live.test.take(slice(0, 50))
    expected = live.evaluate(data.Split(x, y, np.arange(50)))
    np.savez(tmp_path / "some.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    result = serving.evaluate(run_dir, str(tmp_path / "some.npz"))
    assert result == {"split": "test", "step": 1, **expected, "examples": 50}
    x = np.round(x * 255).astype(np.uint8)  # which moves an input by up to 1/510
    np.savez(tmp_path / "bytes.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    result = serving.evaluate(run_dir, str(tmp_path / "bytes.npz"))
    assert_allclose(result["loss"], expected["loss"], rtol=0.01)


def test_data_that_moved_are_found_by_their_new_path(colours, tmp_path):
    folder, _ = colours
    before = serving.evaluate(folder / "run")
    (folder / "npz.npz").rename(tmp_path / "npz.npz")
    try:
        with pytest.raises(UserError, match=f"{folder} has nothing of the kind; .*--data.path"):
            serving.evaluate(folder / "run")
        assert serving.evaluate(folder / "run", str(tmp_path)) == before
    finally:
        (tmp_path / "npz.npz").rename(folder / "npz.npz")


@pytest.mark.parametrize(
    "x, y, message",
    [
        (
            np.zeros((4, 6, 5, 1), np.uint8),
            range(4),
            r"holds uint8\[4, 6, 5, 1\]; wanted .* shape \[6, 5, 3\]",
        ),
        (np.zeros((4, 6, 5, 3), np.float32), range(4), r"holds float32\[4, 6, 5, 3\]; wanted uint8, as in"),
        (np.zeros((4, 6, 5, 3), np.uint8), range(1, 5), "has labels up to 4; wanted at most 3, as in"),
    ],
)
def test_data_of_another_kind_are_not_evaluated(colours, tmp_path, x, y, message):
    np.savez(tmp_path / "other.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(UserError, match=f"the test split of {tmp_path}/other.npz {message}"):
        serving.evaluate(colours[0] / "run", str(tmp_path / "other.npz"))


# Prediction


def test_predictions_are_those_of_the_live_model_whatever_comes_with_an_image(digits, tmp_path):
    run_dir, live = digits
    inputs = live.test.take(slice(0, serving.PREDICT_BATCH + 9)).inputs
    np.save(tmp_path / "all.npy", inputs)
    np.save(tmp_path / "three.npy", inputs[:3, ..., 0])
    np.save(tmp_path / "one.npy", inputs[4])
    np.savez(tmp_path / "only.npz", images=np.float64(inputs[5:6]))
    np.savez(tmp_path / "test.npz", x_train=inputs, x_test=inputs[6:8])
    expected = live.probabilities(inputs)

    lines, actual = predicted(run_dir, tmp_path / "all.npy")
    assert_array_equal(actual, expected)
    assert [line["class"] for line in lines] == expected.argmax(1).tolist()
    assert_allclose(actual.sum(1), 1, rtol=1e-5)

    names = ["three.npy", "one.npy", "only.npz", "test.npz"]
    lines, actual = predicted(run_dir, *(tmp_path / name for name in names))
    assert_array_equal(actual, expected[[0, 1, 2, 4, 5, 6, 7]])
    places = " ".join(f"{Path(line['file']).stem}-{line['image']}" for line in lines)
    assert places == "three-0 three-1 three-2 one-0 only-0 test-0 test-1"


def test_pictures_are_read_with_the_channels_that_the_network_has(digits, colours, tmp_path):
    run_dir, live = digits
    grey = np.random.RandomState(0).randint(0, 256, (8, 8)).astype(np.uint8)
    as_trained = np.float32(grey[None, ..., None]) / np.float32(255)
    for mode in ("L", "P", "RGB", "RGBA"):
        Image.fromarray(grey).convert(mode).save(tmp_path / f"{mode}.png")
        _, actual = predicted(run_dir, tmp_path / f"{mode}.png")
        assert_array_equal(actual, live.probabilities(as_trained))

    folder, live = colours
    colour = np.random.RandomState(0).randint(0, 256, (6, 5, 3)).astype(np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.bmp")
    Image.fromarray(colour[..., 0]).save(tmp_path / "grey.png")
    _, actual = predicted(folder / "run", tmp_path / "colour.bmp", tmp_path / "grey.png")
    pair = np.stack([colour, np.repeat(colour[..., :1], 3, -1)])
    assert_array_equal(actual, live.probabilities(pair))


def test_vectors_are_predicted_one_or_many(tmp_path):
    x = np.random.RandomState(0).normal(5, 3, (40, 7))
    np.savez(tmp_path / "npz.npz", x_train=x, y_train=np.arange(40) % 3, x_test=x, y_test=np.arange(40) % 3)
    options = {"name": "npz", "path": str(tmp_path)}
    live = save(tmp_path / "run", data=options, model={"widths": (8,)}, batch_size=20)
    np.save(tmp_path / "one.npy", x[3])
    np.save(tmp_path / "many.npy", np.float16(x[:2]))
    _, actual = predicted(tmp_path / "run", tmp_path / "one.npy", tmp_path / "many.npy")
    given = np.concatenate([x[3:4], np.float16(x[:2])]).astype(np.float32)
    assert_array_equal(actual, live.probabilities(given))
    np.save(tmp_path / "bytes.npy", x.astype(np.uint8))
    with pytest.raises(UserError, match=r"uint8\[40, 7\]; wanted floating point, as in the data that"):
        predicted(tmp_path / "run", tmp_path / "bytes.npy")


@pytest.mark.parametrize(
    "content, message",
    [
        (
            np.zeros((8, 9), np.float32),
            r"holds float32\[8, 9\]; wanted one example of shape \[8, 8, 1\], or n",
        ),
        (np.zeros((0, 8, 8), np.float32), "wanted one example or more"),
        (np.zeros((8, 8), int), r"holds int64\[8, 8\]; wanted uint8 or floating point"),
        (np.full((8, 8), 16.0), r"holds float64\[8, 8\]; wanted numbers from 0 to 1"),
        (np.full((8, 8), np.nan), "wanted finite numbers"),
        (np.full((8, 8), None), "cannot be read: Object arrays"),
        (
            {"a": np.zeros((8, 8)), "b": np.zeros((8, 8))},
            "cannot be read: it has .'a', 'b'.; wanted an image",
        ),
        (b"PK\x03\x04 and no more", "cannot be read: "),
    ],
)
def test_arrays_of_another_kind_are_refused_before_anything_is_predicted(digits, tmp_path, content, message):
    np.save(tmp_path / "good.npy", np.zeros((8, 8)))
    bad = tmp_path / ("bad.npz" if isinstance(content, dict) else "bad.npy")
    if isinstance(content, dict):
        np.savez(bad, **content)
    elif isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        np.save(bad, content)
    with pytest.raises(UserError, match=f"{bad} .*{message}"):
        next(serving.predict(digits[0], [str(tmp_path / "good.npy"), str(bad)]))


def test_pictures_of_another_kind_are_refused(digits, tmp_path):
    def refused(image, message):
        image.save(tmp_path / "bad.png")
        with pytest.raises(UserError, match=f"bad.png {message}"):
            predicted(digits[0], tmp_path / "bad.png")

    refused(Image.new("L", (9, 8)), r"holds uint8\[8, 9, 1\]; wanted one example of shape \[8, 8, 1\]")
    refused(Image.new("I;16", (8, 8)), "cannot be read: it has more than 8 bits a channel")
    refused(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "cannot be read: it is transparent in places; wanted")
    with pytest.raises(UserError, match="test_serving.py cannot be read: cannot identify image file"):
        predicted(digits[0], __file__)
    with pytest.raises(UserError, match="none.png cannot be read: .*No such file"):
        predicted(digits[0], tmp_path / "none.png")


# Export

NETWORKS = [
    *({"name": "mlp", "norm": norm} for norm in ("batch", "none", "layer", "flax")),
    {"name": "cnn"},
    {"name": "cnn", "norm": "group", "dtype": "bfloat16"},
    {"name": "nnx_mlp", "norm": "ghost"},
    {"name": "resnet20"},
]
# A plain JAX program: it can import neither jbn nor flax, and runs what it is given.
RUN_EXPORTED = """
import sys
sys.modules |= dict.fromkeys(("jbn", "train", "flax"))
import numpy as np
from jax import export
images = np.load("images.npy")
for name in sys.argv[1:]:
    program = export.deserialize(bytearray(open(name, "rb").read()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    np.savez(name + ".npz", *(program.call(images[:n]) for n in (1, 3)))
"""


def test_exported_programs_need_jax_alone_and_compute_the_same(tmp_path):
    images = np.random.RandomState(0).normal(0, 2, (3, 8, 8, 1)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    names, expected = [], []
    for network in NETWORKS:
        names.append("-".join(network.values()))
        widths = (8, 8, 8) if network["name"] == "resnet20" else (16,)
        live = save(tmp_path / f"{names[-1]}-run", model={"widths": widths, **network})
        serving.export(tmp_path / f"{names[-1]}-run", tmp_path / names[-1])
        expected.append(live.probabilities(images))
    command = [sys.executable, "-I", "-c", RUN_EXPORTED, *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, live in zip(names, expected):
        assert np.ptp(live, axis=0).max() > 0.01  # images differ in what they are taken for
        tolerance = 0.02 if "bfloat16" in name else 1e-5
        with np.load(tmp_path / f"{name}.npz") as exported:
            for n, actual in zip((1, 3), exported.values()):
                assert actual.dtype == np.float32
                assert_allclose(actual, live[:n], rtol=tolerance, atol=tolerance, err_msg=name)


def test_exported_program_takes_raw_bytes_and_says_how_to_run_it(colours, tmp_path):
    folder, live = colours
    images = live.test.take(slice(0, 5)).inputs
    told = serving.export(folder / "run", tmp_path / "model")
    namespace = {"images": images}
    exec("\n".join(line.strip() for line in told.splitlines()[1:]), namespace)
    assert_allclose(namespace["probabilities"], live.probabilities(images), rtol=1e-5)
    assert "uint8 (n, 6, 5, 3)" in told
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "name, message", [("no/model", "cannot be written: No such file"), ("", "is a folder")]
)
def test_program_that_cannot_be_written_is_bad_input(digits, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        serving.export(digits[0], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_moving_average_is_what_is_evaluated_predicted_and_exported(digits, tmp_path):
    live = save(tmp_path / "run", average=0.9, model={"widths": (16,)})
    images = live.test.take(slice(0, 4)).inputs
    np.save(tmp_path / "images.npy", images)
    expected = live.probabilities(images)
    # Without the average it would have been the other run's, whose weights it shares.
    assert np.abs(expected - digits[1].probabilities(images)).max() > 0.1
    assert serving.evaluate(tmp_path / "run")["loss"] == live.evaluate()["loss"]
    assert_array_equal(predicted(tmp_path / "run", tmp_path / "images.npy")[1], expected)
    serving.export(tmp_path / "run", tmp_path / "model")
    program = jax.export.deserialize(bytearray((tmp_path / "model").read_bytes()))
    assert_allclose(program.call(images), expected, rtol=1e-5)


# The commands


def test_commands_print_what_the_functions_return(digits, tmp_path, capsys):
    run_dir, file = str(digits[0]), str(tmp_path / "two.npy")
    np.save(file, np.zeros((2, 8, 8)))
    assert main(["predict", run_dir, file, file]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == list(serving.predict(Path(run_dir), [file, file]))
    assert main(["eval", run_dir]) == 0
    assert json.loads(capsys.readouterr().out) == serving.evaluate(Path(run_dir))
    assert main(["export", run_dir]) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {run_dir}/model.stablehlo. ")
    assert (digits[0] / "model.stablehlo").exists()


@pytest.mark.parametrize(
    "arguments",
    ["eval", "eval RUN --data.paht x", "predict RUN", "predict RUN --data.path x", "export RUN --out a"],
)
def test_misused_command_shows_how_it_is_used(capsys, arguments):
    assert main(arguments.split()) == 2
    shown = capsys.readouterr().err
    assert f"'{arguments}' is none of these" in shown and "export RUN_DIR [FILE]" in shown
