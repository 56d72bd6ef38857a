"""One image file -> pixels, the same in training and in prediction."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.data.formats.reading import naming, regular

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# What Pillow opens: without a list it also starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
EXPECTED = "an image in PNG, JPEG, WebP, GIF, BMP or TIFF"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name for as many bytes a pixel
MAX_PIXELS = 100_000_000  # what is larger takes seconds to decode, from a file of any size


def read(path: Path, *, channels: int, size: tuple[int, ...] | None, image_size: int) -> np.ndarray:
    """Read an image as it is meant to be looked at: (height, width, channels), uint8.

    Args:
      channels: 1 for grey, 3 for RGB, 4 for RGBA.
      size: height and width that it has to have, if any.
      image_size: if not 0, the shorter side is scaled to it, and the middle square cut out.

    Raises:
      UserError: it is no such image, animated, of more than 8 bits a channel, transparent, or too large.
    """
    from PIL import Image, ImageOps

    with naming(path, EXPECTED), Image.open(regular(path), formats=FORMATS) as image:
        # Known before a pixel is decoded, of which there may be more than memory holds.
        _check(image, None if image_size else size)
        if image_size:
            image.draft(None, (2 * image_size, 2 * image_size))  # JPEGs: at less resolution, but enough
        upright = ImageOps.exif_transpose(image)
        if size and not image_size and (upright.height, upright.width) != tuple(size):
            raise ValueError(_other_size(upright, size))
        if channels != 4 and _is_transparent(upright):
            raise ValueError("it is transparent in places, where its colour is not defined")
        converted = upright.convert(MODES.get(channels, "RGB"))
        if image_size:
            converted = _middle_square(converted, image_size)
        pixels = np.asarray(converted)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _check(image: "Image", size: tuple[int, ...] | None) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"it has {image.height} x {image.width} pixels, more than {MAX_PIXELS:,}; scale it down first"
        )
    if size and {image.height, image.width} != set(size):
        raise ValueError(_other_size(image, size))
    # Phones' JPEGs may have further pictures behind them, of the same: Pillow's MPO.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError("it is animated, or has several pages; save the one that is meant")
    # Pillow would cut off values above 255, or, of colour, half of the bits.
    of_two_bytes = re.search(r";16[A-Z]", repr(getattr(image, "tile", "")))
    if image.mode.startswith(("I", "F")) or of_two_bytes:
        raise ValueError("it has more than 8 bits a channel; save it with 8")


def _is_transparent(image: "Image") -> bool:
    return image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255


def _other_size(image: "Image", size: tuple[int, ...]) -> str:
    return f"it has {image.height} x {image.width} pixels, where {size[0]} x {size[1]} are needed"


def _middle_square(image: "Image", side: int) -> "Image":
    from PIL.Image import Resampling

    shorter = min(image.size)
    left, top = (image.width - shorter) / 2, (image.height - shorter) / 2
    box = (left, top, left + shorter, top + shorter)
    return image.resize((side, side), Resampling.BILINEAR, box, reducing_gap=3.0)
