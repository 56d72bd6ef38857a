"""One image, as it is meant to be looked at; what is no such image is refused before it is decoded."""

import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import ExifTags, Image

from train.data.formats import images
from train.data.formats.reading import reading

PIXELS = np.random.RandomState(0).randint(0, 256, (4, 6, 3)).astype(np.uint8)


def read(path, *, channels=3, size=None, image_size=0):
    with reading(path, images.EXPECTED):
        return images.read(path, channels=channels, size=size, image_size=image_size)


def save(path, pixels=PIXELS, *, orientation=None, **options):
    exif = Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


def test_each_format_is_read_whatever_its_file_is_called(tmp_path):
    for form, options in [
        *((form, {}) for form in ("PNG", "BMP", "TIFF")),
        ("WEBP", {"lossless": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ]:
        path = tmp_path / "image.of-any-name"
        Image.fromarray(PIXELS).save(path, form, **options)
        assert_array_equal(read(path), PIXELS, form)
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    for form in ("JPEG", "GIF", "MPO"):
        Image.fromarray(flat).save(path, form)
        assert np.abs(read(path).astype(int) - flat).max() <= 3, form
    # As phones write them: smaller copies and the like behind the photograph.
    Image.fromarray(flat).save(path, "MPO", save_all=True, append_images=[Image.fromarray(255 - flat)])
    assert np.abs(read(path).astype(int) - flat).max() <= 3


def test_orientation_in_the_metadata_is_applied(tmp_path):
    upright = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.swapaxes(0, 1),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(PIXELS),
    }
    for form in ("png", "tif", "webp"):
        for orientation, expected in upright.items():
            options = {"lossless": True} if form == "webp" else {}
            path = save(tmp_path / f"image.{form}", orientation=orientation, **options)
            assert_array_equal(read(path), expected, f"{form} {orientation}")
            assert_array_equal(read(path, size=expected.shape[:2]), expected)
            if orientation >= 5:
                with pytest.raises(Exception, match="it has 6 x 4 pixels, where 4 x 6 are needed"):
                    read(path, size=(4, 6))


def test_shorter_side_is_scaled_and_the_middle_square_cut_out(tmp_path):
    # Columns that differ, so that the square is known by its colours: 12 of 30 are left, from 9 to 20.
    wide = np.repeat(np.repeat(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], 12, 0), 3, -1)
    for pixels, middle in (wide, wide[:, 9:21]), (wide.swapaxes(0, 1), wide.swapaxes(0, 1)[9:21]):
        path = save(tmp_path / "wide.png", pixels)
        assert_array_equal(read(path, image_size=12), middle)
        assert read(path, image_size=5).shape == (5, 5, 3)
        halves = middle.astype(float).reshape(6, 2, 6, 2, 3).mean((1, 3))
        assert np.abs(read(path, image_size=6) - halves)[1:-1, 1:-1].max() <= 1.5
        assert read(path, image_size=24).shape == (24, 24, 3)
    # JPEGs are decoded at less resolution: nearly the same comes out.
    gradient = np.broadcast_to(np.linspace(0, 255, 800).astype(np.uint8)[None, :, None], (600, 800, 3))
    jpeg, png = (save(tmp_path / f"large.{form}", gradient) for form in ("jpg", "png"))
    small = [read(path, image_size=32).astype(int) for path in (jpeg, png)]
    assert np.abs(small[0] - small[1]).max() <= 4 and np.ptp(small[1]) > 150


def test_channels_are_those_that_are_asked_for(tmp_path):
    for mode, form in (
        ("L", "png"),
        ("P", "png"),
        ("RGBA", "png"),
        ("CMYK", "tif"),
        ("1", "png"),
        ("LA", "png"),
    ):
        path = tmp_path / f"image.{form}"
        Image.fromarray(PIXELS).convert(mode).save(path)
        expected = Image.open(path)
        assert_array_equal(read(path), np.asarray(expected.convert("RGB")), mode)
        assert_array_equal(read(path, channels=1)[..., 0], np.asarray(expected.convert("L")), mode)
        assert read(path, channels=4).shape == (4, 6, 4)


def png_of_16_bits(path):
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = b"".join(b"\0" + bytes(range(2 * 3 * 4)) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def large_png(path):
    """Write 169 million pixels of one colour into half a megabyte."""
    packed = zlib.compressobj(1)
    rows = b"".join(packed.compress(bytes(1 + 13_000 // 8)) for _ in range(13_000)) + packed.flush()
    chunk = lambda kind, content: (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    )
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def frames(path):
    several = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    several[0].save(path, save_all=True, append_images=several[1:])


REFUSED = {
    "deep.png": (png_of_16_bits, "more than 8 bits a channel"),
    "grey.tif": (lambda path: Image.fromarray(np.zeros((4, 4), np.uint16)).save(path), "more than 8 bits"),
    "float.tif": (lambda path: Image.fromarray(np.zeros((4, 4), np.float32)).save(path), "more than 8 bits"),
    "int.tif": (lambda path: Image.fromarray(np.zeros((4, 4), np.int32)).save(path), "more than 8 bits"),
    "large.png": (large_png, "13000 x 13000 pixels, more than 100,000,000"),
    **{
        f"frames.{form}": (frames, "animated, or has several pages") for form in ("gif", "webp", "png", "tif")
    },
    "alpha.png": (lambda path: Image.new("RGBA", (4, 4), (1, 2, 3, 254)).save(path), "transparent in places"),
    "page.png": (lambda path: Image.fromarray(PIXELS).save(path, "EPS"), "cannot identify image file"),
    "cut.png": (lambda path: path.write_bytes(_png()[:-40]), "truncated"),
    "empty.png": (lambda path: path.write_bytes(b""), "cannot identify"),
    "text.jpg": (lambda path: path.write_text("no image at all"), "cannot identify"),
    "pipe.png": (lambda path: os.mkfifo(path), "it is no file"),
    "folder.png": (lambda path: path.mkdir(), "it is no file"),
    "none.png": (lambda path: None, "it does not exist"),
}


def _png():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


def test_what_is_no_such_image_is_refused_in_a_sentence_and_at_once(tmp_path, refusal):
    for name, (make, reason) in REFUSED.items():
        path = tmp_path / name
        make(path)
        for image_size in (0, 8):
            began = time.process_time()
            sentence = refusal(read, path, image_size=image_size)
            assert sentence.startswith(f"{path} cannot be read: ") and reason in sentence, sentence
            assert sentence.endswith(f"; expected {images.EXPECTED}.")
            assert time.process_time() - began < 1, name
