"""Images shown in other ways, of which what they show can still be told: renderings, from one table."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.config import RenderingName
from train.data.dataset import Dataset
from train.errors import UserError

LIGHTER = 0.3  # of the range of an image
BLUR = 0.1  # the standard deviation of the Gaussian, in sides of an image: 0.8 pixels of 8, 2.8 of 28
NOISE = 0.3  # the standard deviation of each value, of the range


def _blur(image: jax.Array) -> jax.Array:
    for axis in (0, 1):
        places = jnp.arange(image.shape[axis])
        weights = jax.nn.softmax(
            -0.5 * ((places[:, None] - places) / (BLUR * min(image.shape[:2]))) ** 2, axis=1
        )
        image = jnp.moveaxis(jnp.tensordot(weights, image, (1, axis)), 0, axis)
    return image


# A key and an image, (height, width, channels), of numbers from 0 to 1 -> another one, which is cut to that.
RENDERINGS: dict[RenderingName, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "original": lambda key, image: image,
    "inverted": lambda key, image: 1 - image,
    "brightness": lambda key, image: image + LIGHTER,
    "blur": lambda key, image: _blur(image),
    "noise": lambda key, image: image + NOISE * jax.random.normal(key, image.shape),
}


def render(name: RenderingName, key: jax.Array, images: jax.Array, at: Any = None) -> jax.Array:
    """Show images in another way, in their own range: bytes from 0 to 255, or numbers from 0 to 1.

    Args:
      key: () key; what is drawn for an image follows from it and from the image's place.
      images: (n, height, width, channels), uint8 or float32.
      at: (n,) places, integers; if not given, those in `images`.

    Returns:
      (n, height, width, channels), of the same dtype.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)) if at is None else at)
    high = 255 if images.dtype == jnp.uint8 else 1
    shown = jax.vmap(RENDERINGS[name])(keys, images.astype(jnp.float32) / high)
    shown = high * jnp.clip(shown, 0, 1)
    return (jnp.round(shown) if high == 255 else shown).astype(images.dtype)


def render_mixed(
    names: Sequence[RenderingName], key: jax.Array, images: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Show an equal share of a batch in each rendering, and return the position of each image's in `names`.

    Which images these are follows from the key. Without names, images stay as they are, and have no position.
    """
    if not names:
        return images, None
    count = len(images)
    key = jax.random.fold_in(key, count)  # the numbers below are those of `augment`
    domain = jax.random.permutation(key, jnp.arange(count) % len(names))
    is_shown = [(domain == i)[:, None, None, None] for i in range(len(names))]
    return jnp.select(is_shown, [render(name, key, images) for name in names]), domain


def check_renderings(names: Sequence[RenderingName], dataset: Dataset) -> None:
    """Raise a UserError if data cannot be shown as a job asks for."""
    if names and len(dataset.example_shape) != 3:
        raise UserError(
            f"data.renderings = {list(names)}: expected images, got vectors of length "
            f"{dataset.example_shape[0]}; leave them out."
        )
    if names and dataset.train.inputs.dtype != np.uint8:
        check_range(f"data.renderings = {list(names)}", dataset.train.take(slice(1024)).inputs)


def check_range(what: str, images: np.ndarray) -> None:
    """Raise a UserError for numbers that are no brightness from 0 to 1; bytes always are one."""
    low, high = float(images.min()), float(images.max())
    if images.dtype != np.uint8 and not 0 <= low <= high <= 1:
        raise UserError(
            f"{what}: expected images of bytes, or of numbers from 0 to 1, got numbers from {low:g} to "
            f"{high:g}."
        )
