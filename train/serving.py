"""Using a trained network: evaluation, prediction, and export to a program that needs JAX alone."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train import data, distributed, run_directory
from train import state as states
from train.errors import UserError
from train.job import EVAL_BATCH, Trained, evaluate_split
from train.run_directory import Description

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def evaluate(run_dir: Path, path: str | None = None) -> dict[str, Any]:
    """Evaluates the best checkpoint of a run on the test split of its data, or of those at `path`."""
    trained = Trained(run_dir)
    config = trained.config.data if path is None else dataclasses.replace(trained.config.data, path=path)
    dataset = data.load(config)
    found, wanted = (dataset.train.inputs.shape[1:], dataset.classes), (trained.data.shape, trained.data.classes)
    if found[0] != wanted[0] or found[1] > wanted[1]:
        raise UserError(
            f"data.path has examples of shape {found[0]} in {found[1]} classes; wanted {wanted[0]} and at most "
            f"{wanted[1]}, as the data that '{run_dir}' was trained on."
        )
    results = evaluate_split(
        trained.network, trained.mesh, trained.variables, trained.preprocessing, dataset.test
    )
    return {"split": "test", "step": trained.step, **results, "examples": len(dataset.test)}


def predict(run_dir: Path, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the class and the probabilities of each image in the files, in their order.

    A file is an image, an .npy array of them, or an .npz archive with `x_test` or a single array.

    Raises:
      UserError: a file cannot be read, or holds other images than those that the network was trained on.
    """
    trained = Trained(run_dir)
    for path in map(Path, paths):
        images = _as_trained(_read(path), path, trained.data)
        for start in range(0, len(images), EVAL_BATCH):
            part = images[start : start + EVAL_BATCH]
            padded = np.pad(part, [(0, EVAL_BATCH - len(part))] + [(0, 0)] * (part.ndim - 1))
            probabilities = states.probabilities(
                trained.network, trained.variables, trained.preprocessing, distributed.replicate(trained.mesh, padded)
            )
            for i, row in enumerate(np.asarray(probabilities)[: len(part)], start):
                yield {"file": str(path), "image": i, "class": int(row.argmax()), "probabilities": row.tolist()}


def export(run_dir: Path, path: Path) -> str:
    """Writes the best checkpoint as a serialized StableHLO program, and returns how to run it.

    The program maps raw images, any number of them, to probabilities (n, classes), float32, on cpu, cuda and
    tpu. It holds the weights, and needs jax alone.
    """
    trained = Trained(run_dir)
    variables, preprocessing = jax.device_get((trained.variables, trained.preprocessing))
    run = jax.jit(lambda images: states.probabilities(trained.network, variables, preprocessing, images))
    (n,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *trained.data.shape), trained.data.dtype)
    exported = jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(images)
    run_directory.replace_bytes(path, exported.serialize())
    shape = ", ".join(map(str, ("n", *trained.data.shape)))
    return (
        f"Wrote {path}. Run it anywhere with jax:\n"
        "    import jax\n"
        f"    program = jax.export.deserialize(bytearray(open({str(path)!r}, 'rb').read()))\n"
        f"    probabilities = program.call(images)  # images: {trained.data.dtype} ({shape})"
    )


def _read(path: Path) -> np.ndarray:
    """Reads images, (h, w[, channels]) or (n, ...), as uint8 where the file is an image."""
    try:
        if path.suffix.lower() in IMAGE_FILES:
            from PIL import Image

            with Image.open(path) as image:
                return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        name = "x_test" if "x_test" in loaded.files else loaded.files[0] if len(loaded.files) == 1 else None
        if name is None:
            raise ValueError(f"it has {loaded.files}; wanted `x_test`, or one array")
        return loaded[name]
    except Exception as error:  # what a broken file raises depends on its kind
        raise UserError(
            f"{path} cannot be read ({error}); wanted an image, or an .npy or .npz file of images."
        ) from None


def _as_trained(images: np.ndarray, path: Path, wanted: Description) -> np.ndarray:
    """Returns images as the network was trained on: (n, *shape), in the same dtype and units."""
    given, shape = f"{images.dtype}{list(images.shape)}", wanted.shape
    grey = len(shape) == 3 and shape[-1] == 1
    if grey and images.ndim >= 2 and images.shape[-2:] == shape[:2]:
        images = images[..., None]
    images = images[None] if images.shape == shape else images
    if images.shape[1:] != shape:
        raise UserError(f"{path} holds {given}; wanted images of shape {list(shape)}, one or (n, ...).")
    if images.dtype == np.uint8 and wanted.dtype == "float32":
        return images.astype(np.float32) / np.float32(255)
    if str(images.dtype) != wanted.dtype and not (
        wanted.dtype == "float32" and np.issubdtype(images.dtype, np.floating)
    ):
        raise UserError(f"{path} holds {given}; wanted {wanted.dtype}, as the data that it was trained on.")
    return images.astype(wanted.dtype)
