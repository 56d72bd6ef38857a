"""Random changes to training images that leave what they show as it is."""

from functools import partial

import jax
import jax.numpy as jnp

from train.config import Data
from train.errors import UserError


def augment(config: Data, key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror, crop and shift each image at random, as a job asks for (He et al. 2016, section 4.2).

    What happens to an image is a function of the key and of its position in the batch, and of nothing else.

    Args:
      config: which of `flip`, `crop` and `shift`.
      key: () key.
      images: (n, height, width, channels), of any dtype.

    Returns:
      (n, height, width, channels), of the same dtype.
    """
    if not (config.flip or config.crop or config.shift):
        return images
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))
    return jax.vmap(partial(_augment_one, config))(keys, images)


def check_augmentation(config: Data, input_shape: tuple[int, ...]) -> None:
    """Raise a UserError if inputs of shape (n, *input_shape) cannot be changed as a job asks for."""
    for key in ("flip", "crop", "shift"):
        if getattr(config, key) and len(input_shape) != 3:
            raise UserError(
                f"data.{key} = {getattr(config, key)}: expected images, got vectors of length "
                f"{input_shape[0]}; leave out data.flip, data.crop and data.shift."
            )
    for key in ("crop", "shift"):
        side = min(input_shape[:2])
        if getattr(config, key) >= side:
            raise UserError(
                f"data.{key}: expected less than {side} for images of {input_shape[0]} x {input_shape[1]} "
                f"pixels, got {getattr(config, key)}."
            )


def _augment_one(config, key, image):
    # Always three keys, so that asking for one change more does not alter the others.
    flip_key, crop_key, shift_key = jax.random.split(key, 3)
    if config.flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    if config.crop:
        image = _crop(crop_key, image, config.crop, "reflect")
    if config.shift:
        image = _crop(shift_key, image, config.shift, "constant")
    return image


def _crop(key, image, pixels, mode):
    padded = jnp.pad(image, [(pixels, pixels), (pixels, pixels), (0, 0)], mode)
    row, column = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
    return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
