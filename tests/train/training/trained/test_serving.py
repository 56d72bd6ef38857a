"""Evaluation, prediction and export of a run, beside what its network computes in memory."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from train import data, models
from train.__main__ import main
from train.config import Config, Data, Model
from train.data import Split
from train.models import Variables
from train.runs import directory, processes
from train.runs.checkpoints import Checkpoints
from train.training import losses
from train.training.state import TrainState, to_items
from train.training.steps import predict
from train.training.trained import serving
from train.training.trained.evaluation import TrainedNetwork

RANDOM = np.random.RandomState(0)
COLOURS = RANDOM.randint(0, 256, (90, 6, 5, 3)).astype(np.uint8)
GREY = RANDOM.randint(0, 256, (8, 8)).astype(np.uint8)


class Run:
    """A run with one checkpoint, of random parameters and statistics, which take no time to train."""

    def __init__(self, path, **sections):
        config = Config(str(path), steps=1, **sections)
        dataset = data.load(config.data, loss=config.model.loss)
        network = models.build(config.model, dataset.example_shape, dataset.labels.outputs)
        images = np.zeros((1, *dataset.example_shape), np.float32)
        random = np.random.RandomState(0)

        def draw(path, leaf):
            positive = path[-1].key in ("var", "count")
            drawn = random.uniform(0.5, 1.5, leaf.shape) if positive else random.normal(0, 0.4, leaf.shape)
            return drawn.astype(leaf.dtype)

        shapes = jax.eval_shape(network.init, jax.random.key(0), images)
        variables = jax.tree_util.tree_map_with_path(draw, shapes)
        path.mkdir()
        directory.begin(config, dataset)
        with Checkpoints(path) as checkpoints:
            checkpoints.save(1, {"model": variables._asdict()}, {"loss": 1.0, "accuracy": 0.5})
        mesh = processes.mesh_of(jax.devices())
        placed = processes.replicate(mesh, (variables, dataset.preprocessing))
        self.path, self.test = path, dataset.test
        self.live = TrainedNetwork(network, losses.of(config.model, dataset.labels), mesh, *placed)

    def probabilities(self, inputs):
        """Return those, or numbers, of inputs, in batches as `serving.predict` makes them."""
        network, loss, mesh, *arrays = self.live
        missing = -len(inputs) % serving.PREDICT_BATCH
        padded = np.concatenate([inputs, np.zeros((missing, *inputs.shape[1:]), inputs.dtype)])
        batches = padded.reshape(-1, serving.PREDICT_BATCH, *inputs.shape[1:])
        parts = [predict(network, loss, *arrays, processes.replicate(mesh, batch)) for batch in batches]
        return np.concatenate(parts)[: len(inputs)]

    def predicted(self, *paths):
        lines = list(serving.predict(self.path, paths))
        return lines, np.float32([line["probabilities"] for line in lines])


@pytest.fixture(autouse=True)
def _each_run_is_loaded_once(monkeypatch):
    monkeypatch.setattr(serving, "load_best", loaded)


loaded = functools.cache(serving.load_best)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("digits") / "run", model=Model(widths=(16,)))


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A run on colour images of bytes, which the network sees normalized."""
    folder, y = tmp_path_factory.mktemp("colours"), np.arange(90) % 4
    np.savez(folder / "npz.npz", x_train=COLOURS[:60], y_train=y[:60], x_test=COLOURS[60:], y_test=y[60:])
    options = Data("npz", path=str(folder), normalize=True)
    return Run(folder / "run", data=options, model=Model(widths=(8,)))


# Evaluation


def test_evaluation_is_that_of_the_live_network(digits, colours):
    for run in digits, colours:
        expected = {"split": "test", "step": 1, **run.live.evaluate(run.test), "examples": len(run.test)}
        assert serving.evaluate(run.path) == expected


def test_data_from_elsewhere_are_evaluated_as_if_the_run_had_had_them(digits, tmp_path):
    x, y = digits.test.take(slice(0, 50))
    expected = digits.live.evaluate(Split(x, y, np.arange(50)))
    np.savez(tmp_path / "some.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    result = serving.evaluate(digits.path, str(tmp_path / "some.npz"))
    assert result == {"split": "test", "step": 1, **expected, "examples": 50}
    np.savez(tmp_path / "whole.npz", x_train=x, y_train=y)
    result = serving.evaluate(digits.path, str(tmp_path / "whole.npz"))
    assert result == {"split": "all", "step": 1, **expected, "examples": 50}
    x = np.round(x * 255).astype(np.uint8)  # which moves an input by up to 1/510
    np.savez(tmp_path / "bytes.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    result = serving.evaluate(digits.path, str(tmp_path / "bytes.npz"))
    assert_allclose(result["loss"], expected["loss"], rtol=0.01)


def test_data_that_moved_are_found_by_their_new_path(colours, tmp_path, refusal):
    folder = colours.path.parent
    before = serving.evaluate(colours.path)
    (folder / "npz.npz").rename(tmp_path / "npz.npz")
    try:
        assert f"got '{folder}', which has none of it." in refusal(serving.evaluate, colours.path)
        assert serving.evaluate(colours.path, str(tmp_path)) == before
    finally:
        (tmp_path / "npz.npz").rename(folder / "npz.npz")


def test_data_of_another_kind_are_not_evaluated(colours, tmp_path, refusal):
    path, trained = str(tmp_path / "other.npz"), "as in the data that the network was trained on, got"
    for x, y, expected in [
        (
            COLOURS[:4, ..., :1],
            range(4),
            f"the test split of {path}: expected one example of shape [6, 5, 3], or n ..., {trained} "
            "uint8[4, 6, 5, 1].",
        ),
        (
            np.float32(COLOURS[:4]),
            range(4),
            f"the test split of {path}: expected uint8, {trained} float32[4, 6, 5, 3].",
        ),
        (COLOURS[:4], range(1, 5), f"{path}: expected labels up to 3, {trained} up to 4."),
    ]:
        np.savez(path, x_train=x, y_train=[*y], x_test=x, y_test=[*y])
        sentence = refusal(serving.evaluate, colours.path, path)
        start, _, end = expected.partition("...")
        assert sentence.startswith(start) and sentence.endswith(end)


def test_moving_average_is_what_a_checkpoint_has_for_use():
    trained, average = Variables({"w": 1}, {}), Variables({"w": 2}, {})
    for kept, expected in (average, average), (None, trained):
        state = TrainState(1, trained, kept, opt_state=(), sums={}, nonfinite_step=0)
        assert to_items(state)["model"] == expected._asdict()


# Prediction


def test_predictions_are_those_of_the_live_network_whatever_comes_with_an_image(digits, tmp_path):
    inputs = digits.test.take(slice(0, serving.PREDICT_BATCH + 9)).inputs
    np.save(tmp_path / "all.npy", inputs)
    np.save(tmp_path / "three.npy", inputs[:3, ..., 0])
    np.save(tmp_path / "one.npy", inputs[4])
    np.savez(tmp_path / "only.npz", images=np.float64(inputs[5:6]))
    np.savez(tmp_path / "test.npz", x_train=inputs, x_test=inputs[6:8])
    expected = digits.probabilities(inputs)

    lines, actual = digits.predicted(tmp_path / "all.npy")
    assert_array_equal(actual, expected)
    assert [line["class"] for line in lines] == expected.argmax(1).tolist()
    assert [line["image"] for line in lines] == [*range(len(inputs))]
    assert_allclose(actual.sum(1), np.ones(len(inputs)), rtol=1e-5)

    names = ["three.npy", "one.npy", "only.npz", "test.npz"]
    lines, actual = digits.predicted(*(tmp_path / name for name in names))
    assert_array_equal(actual, expected[[0, 1, 2, 4, 5, 6, 7]])
    places = " ".join(f"{Path(line['file']).stem}-{line['image']}" for line in lines)
    assert places == "three-0 three-1 three-2 one-0 only-0 test-0 test-1"


def test_pictures_are_read_with_the_channels_that_the_network_has(digits, colours, tmp_path):
    as_trained = np.float32(GREY[None, ..., None]) / np.float32(255)
    for mode in ("L", "P", "RGB", "RGBA"):
        Image.fromarray(GREY).convert(mode).save(tmp_path / f"{mode}.png")
        _, actual = digits.predicted(tmp_path / f"{mode}.png")
        assert_array_equal(actual, digits.probabilities(as_trained), mode)
    Image.fromarray(COLOURS[0]).save(tmp_path / "colour.bmp")
    Image.fromarray(COLOURS[0, ..., 0]).save(tmp_path / "grey.png")
    _, actual = colours.predicted(tmp_path / "colour.bmp", tmp_path / "grey.png")
    pair = np.stack([COLOURS[0], np.repeat(COLOURS[0, ..., :1], 3, -1)])
    assert_array_equal(actual, colours.probabilities(pair))


def test_vectors_are_predicted_one_or_many(tmp_path, refusal):
    x, y = RANDOM.normal(5, 3, (40, 7)), np.arange(40) % 3
    np.savez(tmp_path / "npz.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    run = Run(tmp_path / "run", data=Data("npz", path=str(tmp_path)), model=Model(widths=(8,), norm="none"))
    np.save(tmp_path / "one.npy", x[3])
    np.save(tmp_path / "many.npy", np.float16(x[:2]))
    _, actual = run.predicted(tmp_path / "one.npy", tmp_path / "many.npy")
    given = np.concatenate([x[3:4], np.float16(x[:2])]).astype(np.float32)
    assert_array_equal(actual, run.probabilities(given))
    np.save(tmp_path / "bytes.npy", x.astype(np.uint8))
    sentence = refusal(run.predicted, tmp_path / "bytes.npy")
    assert "bytes.npy: expected floating point, as in the data that" in sentence
    Image.fromarray(GREY).save(tmp_path / "image.png")
    assert "expected an .npy or .npz file of rows of dtype float32 and shape (n, 7)" in refusal(
        run.predicted, tmp_path / "image.png"
    )


def test_photographs_are_scaled_as_in_training_and_classes_have_their_names(tmp_path):
    pictures = RANDOM.randint(0, 256, (12, 20, 30, 3)).astype(np.uint8)
    for i, picture in enumerate(pictures):
        path = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    options = Data("folder", path=str(tmp_path / "pictures"), image_size=8, test=0.5)
    run = Run(tmp_path / "run", data=options, model=Model(widths=(8,)))
    rows = run.test.rows
    files = sorted((tmp_path / "pictures").rglob("*.png"))
    inputs = np.stack([run.test.inputs[row] for row in rows])
    expected = run.probabilities(inputs)
    lines = list(serving.predict(run.path, [files[row] for row in rows]))
    assert [line["class"] for line in lines] == [("cat", "dog")[i] for i in expected.argmax(1)]
    assert [list(line["probabilities"]) for line in lines] == [["cat", "dog"]] * len(rows)
    assert_array_equal([list(line["probabilities"].values()) for line in lines], expected.tolist())
    # Lying on its side, with a note of it, is the same photograph.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pictures[0])).save(tmp_path / "lying.png", exif=exif)
    upright, lying = serving.predict(run.path, [files[0], tmp_path / "lying.png"])
    assert lying["probabilities"] == upright["probabilities"]
    assert serving.evaluate(run.path)["examples"] == len(rows) == 6
    described = json.loads((run.path / "data.json").read_text())
    assert described["inputs"] == "images of dtype uint8 and shape (n, 8, 8, 3), from 0 to 255"
    assert described["labels"]["names"] == ["cat", "dog"]


def test_tables_are_predicted_by_the_names_of_their_columns(tmp_path, refusal):
    x = RANDOM.normal(size=(30, 2))
    rows = [f"{a},{'xyz'[i % 3]},{b}" for i, (a, b) in enumerate(x)]
    (tmp_path / "table.csv").write_text("\n".join(["width,kind,height", *rows]))
    options = Data("csv", path=str(tmp_path / "table.csv"), label="kind")
    run = Run(tmp_path / "run", data=options, model=Model(widths=(8,)))
    (tmp_path / "new.csv").write_text("\n".join(["height,width", *(f"{b},{a}" for a, b in x)]))
    lines = list(serving.predict(run.path, [tmp_path / "new.csv"]))
    expected = run.probabilities(x.astype(np.float32))
    assert [line["class"] for line in lines] == ["xyz"[i] for i in expected.argmax(1)]
    assert [line["row"] for line in lines] == [*range(30)]
    (tmp_path / "new.csv").write_text("width,heigth\n1,2\n")
    sentence = refusal(run.predicted, tmp_path / "new.csv")
    assert sentence.startswith(f"{tmp_path}/new.csv cannot be read: it has no column 'height'; perhaps you")


@pytest.mark.slow
def test_numbers_are_predicted_and_exported_in_their_unit(tmp_path):
    table = RANDOM.normal((0, 0, 500), (1, 1, 70), (30, 3)).astype(np.float32)
    np.savetxt(tmp_path / "table.csv", table, delimiter=",", header="b,a,price", comments="", fmt="%.9g")
    options = Data("csv", path=str(tmp_path / "table.csv"), label="price", test=0.5, validation=0)
    run = Run(tmp_path / "run", data=options, model=Model(widths=(8,), loss="squared_error"))
    network, _, _, variables, _ = run.live
    standardized, _ = network.apply(variables, table[:, :2], train=False)
    of_training = np.delete(table[:, 2], run.test.rows)
    expected = of_training.mean() + of_training.std() * standardized[:, 0]
    predicted = [*serving.predict(run.path, [tmp_path / "table.csv"])]
    assert_allclose([line["value"] for line in predicted], expected, rtol=1e-5)
    namespace, told = {"rows": table[:, :2]}, serving.export(run.path, tmp_path / "model")
    exec("\n".join(line.strip() for line in told.splitlines()[1:]), namespace)
    assert_allclose(namespace["numbers"], expected, rtol=1e-5)
    assert told.endswith("  # rows of dtype float32 and shape (n, 2), in units of the training data: b, a")


OTHER_ARRAYS = [
    (np.zeros((8, 9), np.float32), "expected one example of shape [8, 8, 1], or n of them, [n, ...], as in"),
    (np.zeros((8, 9), np.float32), "got float32[8, 9]."),
    (np.zeros((0, 8, 8), np.float32), "expected one example or more, "),
    (np.zeros((8, 8), int), "expected uint8 or floating point, as in the data that"),
    (np.full((8, 8), 16.0), "expected numbers from 0 to 1, "),
    (
        np.full((8, 8), 16, np.uint8),
        "expected bytes up to 255, or numbers up to 1, and not up to 16 (divide by",
    ),
    (np.full((8, 8), np.nan), "expected finite float32 numbers, "),
    (np.full((8, 8), 1e300), "expected finite float32 numbers, "),
    (np.full((8, 8), None), "cannot be read: "),
    (
        {"a": np.zeros((8, 8)), "b": np.zeros((8, 8))},
        "cannot be read: it has ['a', 'b'], and none of them is called x_test; expected an .npz archive of "
        "one array or with x_test.",
    ),
    (b"PK\x03\x04 and no more", "cannot be read: "),
]


def test_arrays_of_another_kind_are_refused_before_anything_is_predicted(digits, tmp_path, refusal):
    np.save(tmp_path / "good.npy", np.zeros((8, 8)))
    for content, expected in OTHER_ARRAYS:
        bad = tmp_path / ("bad.npz" if isinstance(content, dict) else "bad.npy")
        if isinstance(content, dict):
            np.savez(bad, **content)
        elif isinstance(content, bytes):
            bad.write_bytes(content)
        else:
            np.save(bad, content)
        sentence = refusal(next, serving.predict(digits.path, [tmp_path / "good.npy", bad]))
        assert sentence.startswith(str(bad)) and expected in sentence, expected


def test_pictures_of_another_kind_are_refused(digits, tmp_path, refusal):
    bad = tmp_path / "bad.png"
    for image, reason in [
        (Image.new("I;16", (8, 8)), "it has more than 8 bits a channel; save it with 8"),
        (Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "it is transparent in places"),
        (
            Image.new("L", (9, 8)),
            "it has 8 x 9 pixels, where 8 x 8 are needed",
        ),
    ]:
        image.save(bad)
        assert refusal(digits.predicted, bad).startswith(f"{bad} cannot be read: {reason}")
    # The size is known, and refused, before a pixel is decoded: of this one there are none.
    Image.new("L", (10_000, 1000)).save(bad)
    bad.write_bytes(bad.read_bytes()[:60])
    assert "it has 1000 x 10000 pixels, " in refusal(digits.predicted, bad)
    assert "test_serving.py cannot be read: cannot identify image file" in refusal(
        digits.predicted, Path(__file__)
    )
    assert "none.png cannot be read: " in refusal(digits.predicted, tmp_path / "none.png")


# Export

NETWORKS = [
    Model(widths=(16,)),
    Model("cnn", norm="group", dtype="bfloat16", widths=(16,)),
    Model("nnx_mlp", norm="ghost", widths=(16,)),
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
    assert program.platforms == ("cpu", "cuda", "tpu") and program.nr_devices == 1
    np.savez(name + ".npz", program.call(images), *[program.call(images[:1])] * (name == "mlp"))
"""


@pytest.mark.slow
def test_exported_programs_need_jax_alone_and_compute_the_same(tmp_path):
    images = np.random.RandomState(0).normal(0, 8, (3, 8, 8, 1)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    expected = {}
    for network in NETWORKS:
        run = Run(tmp_path / f"{network.name}-run", model=network)
        serving.export(run.path, tmp_path / network.name)
        expected[network.name] = run.probabilities(images)
    command = [sys.executable, "-I", "-c", RUN_EXPORTED, *expected]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, live in expected.items():
        assert np.ptp(live, axis=0).max() > 0.01  # images differ in what they are taken for
        tolerance = 0.02 if name == "cnn" else 1e-5
        with np.load(tmp_path / f"{name}.npz") as exported:
            for actual in exported.values():
                assert actual.dtype == np.float32
                assert_allclose(actual, live[: len(actual)], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_folded_programs_compute_the_same_in_fewer_operations(tmp_path):
    images = np.random.RandomState(0).normal(0, 8, (3, 8, 8, 1)).astype(np.float32)
    for network in (Model(widths=(16,)), Model("nnx_mlp", norm="flax", widths=(16,))):
        run, operations = Run(tmp_path / network.name, model=network), []
        for fold in (False, True):
            serving.export(run.path, tmp_path / "model", fold=fold)
            program = jax.export.deserialize(bytearray((tmp_path / "model").read_bytes()))
            assert_allclose(program.call(images), run.probabilities(images), rtol=0, atol=1e-5)
            operations.append(program.mlir_module())
        with_norms, without = operations
        assert "stablehlo.rsqrt" in with_norms and "stablehlo.rsqrt" not in without
        assert without.count("stablehlo.") < with_norms.count("stablehlo.") - 4


def test_norms_that_are_no_affine_map_are_not_folded(tmp_path, refusal):
    run = Run(tmp_path / "run", model=Model(norm="layer", widths=(16,)))
    sentence = refusal(serving.export, run.path, tmp_path / "model", fold=True)
    assert "--fold: expected a run with model.norm = 'batch' or 'renorm' or 'ghost' or 'flax'" in sentence
    assert "got 'layer'; export it without" in sentence and not (tmp_path / "model").exists()


def test_exported_program_takes_raw_bytes_and_says_how_to_run_it(colours, tmp_path):
    images = colours.test.take(slice(0, 5)).inputs
    told = serving.export(colours.path, tmp_path / "model")
    namespace = {"images": images}
    exec("\n".join(line.strip() for line in told.splitlines()[1:]), namespace)
    assert_allclose(namespace["probabilities"], colours.probabilities(images), rtol=1e-5)
    assert told.endswith("  # images of dtype uint8 and shape (n, 6, 5, 3), from 0 to 255")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_program_that_cannot_be_written_is_bad_input(colours, tmp_path, refusal):
    path = tmp_path / "no" / "model"
    assert refusal(serving.export, colours.path, path).startswith(f"'{path}' cannot be written: No such file")
    assert refusal(serving.export, colours.path, tmp_path).startswith(
        f"'{tmp_path}' is a folder; expected a file"
    )
    assert list(tmp_path.iterdir()) == []


# The commands


def test_commands_print_what_the_functions_return(colours, tmp_path, capsys):
    run_dir, file = str(colours.path), str(tmp_path / "two.npy")
    np.save(file, COLOURS[:2])
    assert main(["predict", run_dir, file, file]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == list(serving.predict(colours.path, [Path(file)] * 2))
    assert main(["eval", run_dir]) == 0
    assert json.loads(capsys.readouterr().out) == serving.evaluate(colours.path)
    assert main(["export", run_dir]) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {run_dir}/model.stablehlo. ")
    assert (colours.path / "model.stablehlo").exists()
    assert main(["export", run_dir, str(tmp_path / "folded"), "--fold"]) == 0
    assert (tmp_path / "folded").read_bytes() != (colours.path / "model.stablehlo").read_bytes()
