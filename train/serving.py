"""Using a trained network: evaluation, prediction, and export to a program that needs JAX alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export
from numpy.lib.npyio import NpzFile

from train import data
from train.data import Split
from train.data.formats import member, npy, reading
from train.errors import UserError
from train.runs import processes
from train.runs.files import replace
from train.training import TrainedRun, load_best, steps
from train.training.evaluation import data_at

IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name for as many bytes a pixel
# Images are predicted this many at a time, the last ones padded with zeros: one program for any number of
# them, in which none's result depends on the others. Small, because a single image costs as much.
PREDICT_BATCH = 32


def evaluate(run_dir: Path, path: str | None = None) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run on the test split of its data, or of the data at `path`.

    Raises:
      UserError: the run or the data cannot be read, or the data do not suit the network.
    """
    run = load_best(run_dir)
    config = data_at(run.config.data, path)
    _, (inputs, labels) = data.read(config)
    what = f"the test split of {path or config.path or config.name}"
    if labels.max() >= (outputs := run.data.labels.outputs):
        raise UserError(
            f"{what}: expected labels up to {outputs - 1}, as in the data that the network was "
            f"trained on, got up to {labels.max()}."
        )
    split = Split(_as_trained(run, what, inputs), labels, np.arange(len(labels)))
    return {"split": "test", "step": run.step, **run.trained.evaluate(split), "examples": len(split)}


def predict(run_dir: Path, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the class and the probabilities of each image in the files, in their order.

    A file is an image, an .npy array of one or more, or an .npz archive of one array or with `x_test`. All of
    them are read before the first is predicted.

    Raises:
      UserError: a file cannot be read, or holds other images than those that the network was trained on.
    """
    run = load_best(run_dir)
    files = [_as_trained(run, str(path), _read(path, run.data.shape)) for path in paths]
    places = [(path, i) for path, images in zip(paths, files) for i in range(len(images))]
    images = np.concatenate(files)
    for start in range(0, len(images), PREDICT_BATCH):
        part = images[start : start + PREDICT_BATCH]
        padded = np.zeros((PREDICT_BATCH, *images.shape[1:]), images.dtype)
        padded[: len(part)] = part
        network, loss, mesh, variables, preprocessing = run.trained
        placed = processes.replicate(mesh, padded)
        probabilities = np.asarray(steps.predict(network, loss, variables, preprocessing, placed))
        for (path, i), row in zip(places[start:], probabilities[: len(part)]):
            yield {"file": str(path), "image": i, "class": int(row.argmax()), "probabilities": row.tolist()}


def export(run_dir: Path, path: Path) -> str:
    """Write the best checkpoint as a serialized StableHLO program, and return how to run it.

    The program maps raw images, any number of them, to probabilities (n, classes), float32, on cpu, cuda and
    tpu. It holds the weights and needs jax alone, which runs such programs for half a year of newer versions.

    Raises:
      UserError: the run cannot be read, or the file cannot be written.
    """
    if path.is_dir():
        raise UserError(
            f"'{path}' is a folder; expected a file to write, such as '{path / 'model.stablehlo'}'."
        )
    run = load_best(run_dir)
    network, loss, _, *arrays = run.trained
    # Host arrays become constants of the program, which then is for one device, however many are here.
    arrays = jax.device_get(arrays)
    program = jax.jit(lambda images: steps.predict(network, loss, *arrays, images))
    shape, dtype = run.data.shape, run.data.dtype
    images = jax.ShapeDtypeStruct((*jax_export.symbolic_shape("n"), *shape), dtype)
    exported = jax_export.export(program, platforms=("cpu", "cuda", "tpu"))(images)
    try:
        replace(path, exported.serialize())
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written: {error.strerror}; expected a file in a folder that exists."
        ) from error
    return (
        f"Wrote {path}. To run it, anywhere with jax:\n"
        "    from pathlib import Path\n"
        "    from jax import export\n"
        f"    program = export.deserialize(bytearray(Path({str(path.absolute())!r}).read_bytes()))\n"
        f"    probabilities = program.call(images)  # as the data: {dtype} (n, {', '.join(map(str, shape))})"
    )


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read an image with as many channels as `shape` has, (h, w, channels), uint8; or an array as it is."""
    with reading(path, "an image, an .npy array of images, or an .npz archive of one array or with x_test"):
        if path.suffix.lower() not in (".npy", ".npz"):
            return _read_image(path, shape)
        if path.suffix.lower() == ".npy":
            return npy(path)
        with path.open("rb") as file, NpzFile(file) as archive:
            names = ["x_test"] if "x_test" in archive.files else archive.files
            if len(names) != 1:
                raise ValueError(f"it has {names}")
            return member(archive, names[0])


def _read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    mode = IMAGE_MODES.get(shape[-1], "RGB")
    with Image.open(path) as image:
        # Known before a pixel is decoded, of which there may be more than memory holds.
        if (image.height, image.width) != shape[:2]:
            size = f"{image.height} x {image.width} pixels"
            raise ValueError(f"it has {size}, and the network was trained on inputs of shape {list(shape)}")
        # Pillow would cut off values above 255, and transparent pixels have no defined colour.
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"it has more than 8 bits a channel (mode {image.mode})")
        alpha = np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else np.uint8(255)
        if mode != "RGBA" and alpha.min() < 255:
            raise ValueError("it is transparent in places")
        pixels = np.asarray(image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


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
        return examples.astype(np.float32) / np.float32(255)
    require(np.issubdtype(examples.dtype, np.floating), f"{'uint8 or ' * digits}floating point")
    with np.errstate(over="ignore"):
        examples = examples.astype(np.float32, copy=False)
    require(bool(np.isfinite(examples).all()), "finite numbers")
    require(not digits or (examples.min() >= 0 and examples.max() <= 1), "numbers from 0 to 1")
    return examples
