"""Using a trained network: evaluation, prediction, and export to a program that needs JAX alone."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export
from numpy.lib.npyio import NpzFile

from train import data
from train.data import Labels, Split
from train.data.formats import images, tables
from train.data.formats.arrays import member, npy
from train.data.formats.reading import reading, regular
from train.errors import UserError
from train.runs import directory, processes
from train.runs.files import replace
from train.training import TrainedRun, load_best, steps
from train.training.trained.evaluation import data_at

# Images are predicted this many at a time, the last ones padded with zeros: one program for any number of
# them, in which none's result depends on the others. Small, because a single image costs as much.
PREDICT_BATCH = 32


def evaluate(run_dir: Path, path: str | None = None) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run on the test split of its data, or of the data at `path`.

    Of other data without a test split it is all of them, and "split" of the result is "all".

    Raises:
      UserError: the run or the data cannot be read, the data do not suit the network, or they are no longer
        those that it was trained on, and no path was given.
    """
    run = load_best(run_dir)
    name, split = test_split(run, run_dir, path)
    return {"split": name, "step": run.step, **run.evaluate(split), "examples": len(split)}


def test_split(run: TrainedRun, run_dir: Path, path: str | None) -> tuple[str, Split]:
    """Return the name and the examples of what `evaluate` evaluates on."""
    config = data_at(run.config.data, path)
    name, given, fingerprint = data.load_test(
        config,
        loss=run.config.model.loss,
        labels=run.data.labels,
        columns=run.data.columns,
        trained_on=run.data.fingerprint,
        cache=directory.data_cache(run_dir),
    )
    if path is None:
        directory.check_same_data(run_dir, fingerprint, "give --data.path to evaluate on others")
    what = f"the test split of {path or config.path or config.name}"
    return name, dataclasses.replace(given, inputs=_as_trained(run, what, given.inputs))


def predict(run_dir: Path, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the class and the probabilities of each image in the files, or the number, in their order.

    A file is an image, an .npy array of one or more, an .npz archive of one array or with `x_test`, or a .csv
    table with the columns that the network was trained on. All are read before the first is predicted.

    Raises:
      UserError: a file cannot be read, or holds other images than those that the network was trained on.
    """
    run = load_best(run_dir)
    files = [_as_trained(run, str(path), _read(run, path)) for path in paths]
    places = [(path, i) for path, of_file in zip(paths, files) for i in range(len(of_file))]
    inputs = np.concatenate(files)
    for start in range(0, len(inputs), PREDICT_BATCH):
        part = inputs[start : start + PREDICT_BATCH]
        padded = np.zeros((PREDICT_BATCH, *inputs.shape[1:]), inputs.dtype)
        padded[: len(part)] = part
        network, loss, mesh, variables, preprocessing = run.trained
        placed = processes.replicate(mesh, padded)
        outputs = np.asarray(steps.predict(network, loss, variables, preprocessing, placed))
        for (path, i), output in zip(places[start:], outputs[: len(part)]):
            kind = "image" if len(run.data.shape) == 3 else "row"
            yield {"file": str(path), kind: i, **_in_words(run.data.labels, output)}


def _in_words(labels: Labels, output: np.ndarray) -> dict[str, Any]:
    """Name what a network puts out for one example: a number, or the probabilities of the classes."""
    if not labels.counts:
        return {"value": float(output)}
    best, probabilities = int(output.argmax()), output.tolist()
    if not labels.names:
        return {"class": best, "probabilities": probabilities}
    return {"class": labels.names[best], "probabilities": dict(zip(labels.names, probabilities))}


def export(run_dir: Path, path: Path, *, fold: bool = False) -> str:
    """Write the best checkpoint as a serialized StableHLO program, and return how to run it.

    With `fold` without its batch norms, which the layers before them absorb; one of the inputs stays.

    The program maps raw inputs, any number of them, to probabilities (n, classes), or to numbers (n,),
    float32, on cpu, cuda and tpu. It holds the weights and needs jax alone, which runs such programs for half
    a year of newer versions.

    Raises:
      UserError: the run cannot be read, or has no batch norms to fold, or the file cannot be written.
    """
    if path.is_dir():
        raise UserError(
            f"'{path}' is a folder; expected a file to write, such as '{path / 'model.stablehlo'}'."
        )
    run = load_best(run_dir)
    if fold:
        run = run.fold()
    network, loss, _, *arrays = run.trained
    # Host arrays become constants of the program, which then is for one device, however many are here.
    arrays = jax.device_get(arrays)
    program = jax.jit(lambda inputs: steps.predict(network, loss, *arrays, inputs))
    inputs = jax.ShapeDtypeStruct((*jax_export.symbolic_shape("n"), *run.data.shape), run.data.dtype)
    exported = jax_export.export(program, platforms=("cpu", "cuda", "tpu"))(inputs)
    try:
        replace(path, exported.serialize())
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written: {error.strerror}; expected a file in a folder that exists."
        ) from error
    given = "images" if len(run.data.shape) == 3 else "rows"
    outputs = "probabilities" if run.data.labels.counts else "numbers"
    return (
        f"Wrote {path}. To run it, anywhere with jax:\n"
        "    from pathlib import Path\n"
        "    from jax import export\n"
        f"    program = export.deserialize(bytearray(Path({str(path.absolute())!r}).read_bytes()))\n"
        f"    {outputs} = program.call({given})  # {run.data.inputs}"
    )


def _read(run: TrainedRun, path: Path) -> np.ndarray:
    """Read an image, (h, w, channels), uint8, scaled as in training; or an array or a table as it is."""
    shape, columns, suffix = run.data.shape, run.data.columns, path.suffix.lower()
    if suffix == ".npy":
        return npy(path)
    if suffix == ".npz":
        expected = "an .npz archive of one array or with x_test"
        with reading(path, expected), regular(path).open("rb") as file, NpzFile(file) as archive:
            names = ["x_test"] if "x_test" in archive.files else archive.files
            if len(names) != 1:
                raise ValueError(f"it has {names}, and none of them is called x_test")
            return member(archive, names[0])
    if columns:
        return tables.features(path, columns)
    if len(shape) != 3:
        raise UserError(f"{path}: expected an .npy or .npz file of {run.data.inputs}, got another.")
    size = run.config.data.image_size
    with reading(path, images.EXPECTED):
        return images.read(path, channels=shape[-1], size=shape[:2], image_size=size)


def _as_trained(run: TrainedRun, what: str, given: np.ndarray) -> np.ndarray:
    """Return examples, (n, *shape), of the shape, dtype and units that the network was trained on.

    Grey images may lack the axis of channels, a single example the first axis. The units are known of the
    digits alone: numbers from 0 to 1, which bytes become. Others have to be given as in training.
    """
    shape, digits = run.data.shape, run.config.data.name == "digits"

    def require(holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(
                f"{what}: expected {expected}, as in the data that the network was trained on, got "
                f"{given.dtype}{list(given.shape)}."
            )

    examples = given
    if len(shape) == 3 and shape[-1] == 1 and examples.shape[-2:] == shape[:2]:
        examples = examples[..., None]
    if examples.shape == shape:
        examples = examples[None]
    require(examples.shape[1:] == shape, f"one example of shape {list(shape)}, or n of them, [n, ...]")
    require(len(examples) > 0, "one example or more")
    if run.data.dtype == "uint8":
        require(examples.dtype == np.uint8, "uint8")
        return examples
    if digits and examples.dtype == np.uint8:
        require(
            not 0 < examples.max() <= 16,
            "bytes up to 255, or numbers up to 1, and not up to 16 (divide by 16.0)",
        )
        return examples.astype(np.float32) / np.float32(255)
    require(np.issubdtype(examples.dtype, np.floating), f"{'uint8 or ' * digits}floating point")
    with np.errstate(over="ignore"):
        examples = examples.astype(np.float32, copy=False)
    require(bool(np.isfinite(examples).all()), "finite float32 numbers")
    require(not digits or bool(examples.min() >= 0 and examples.max() <= 1), "numbers from 0 to 1")
    return examples
