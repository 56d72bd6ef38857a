"""Random changes to images: each that is possible as often as the others, and nothing else."""

import re
from collections import Counter
from functools import partial
from itertools import product

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_array_equal

from tests.helpers.compiled import COLLECTIVES
from train.config import Data
from train.data import augment, check_augmentation

KEY = jax.random.key(0)
FLIP, CROP, SHIFT = Data(flip=True), Data(crop=2), Data(shift=2)
EVERYTHING = Data(flip=True, crop=2, shift=2)
IMAGE = np.arange(1, 7 * 8 * 2 + 1, dtype=np.uint8).reshape(7, 8, 2)
# Ten times the same for each of the 2 x 25 x 25 that it may become; all in one batch, to compile once.
IMAGES = np.broadcast_to(IMAGE, (12500, *IMAGE.shape))


@partial(jax.jit, static_argnums=0)
def run(config, images, key):
    return augment(config, key, images)


def mirrored(image):
    return [image, image[:, ::-1]]


def cropped(image, pixels=2):
    padded = np.pad(image, [(pixels, pixels), (pixels, pixels), (0, 0)], mode="reflect")
    height, width, _ = image.shape
    offsets = product(range(2 * pixels + 1), repeat=2)
    return [padded[row : row + height, column : column + width] for row, column in offsets]


def shifted(image, pixels=2):
    images = []
    for offset in product(range(-pixels, pixels + 1), repeat=2):
        moved = np.zeros_like(image)
        for position in np.ndindex(image.shape[:2]):
            source = np.subtract(position, offset)
            if (source >= 0).all() and (source < image.shape[:2]).all():
                moved[position] = image[tuple(source)]
        images.append(moved)
    return images


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, changes",
    [(FLIP, [mirrored]), (CROP, [cropped]), (SHIFT, [shifted]), (EVERYTHING, [mirrored, cropped, shifted])],
)
def test_an_image_becomes_all_that_it_may_become_and_equally_often(config, changes):
    possible = [IMAGE]
    for change in changes:
        possible = [changed for each in possible for changed in change(each)]
    images = run(config, IMAGES, KEY)
    assert (images.shape, images.dtype) == (IMAGES.shape, IMAGES.dtype)
    counts = Counter(each.tobytes() for each in np.asarray(images))
    assert counts.keys() == {each.tobytes() for each in possible}
    assert len(counts) == len(possible)
    # Pearson's statistic, within five standard deviations of its mean.
    expected, freedom = len(images) / len(possible), len(possible) - 1
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_choices_follow_from_the_key():
    first, again, other = (run(EVERYTHING, IMAGES, jax.random.key(seed)) for seed in (0, 0, 1))
    assert_array_equal(first, again)
    assert np.asarray(first != other).any((1, 2, 3)).mean() > 0.5


@pytest.mark.slow
def test_changes_are_made_one_after_the_other_and_each_as_it_would_be_alone():
    images = IMAGES
    for config in (FLIP, CROP, SHIFT):
        images = run(config, images, KEY)
    assert_array_equal(run(EVERYTHING, IMAGES, KEY), images)


@pytest.mark.slow
def test_choices_for_an_image_depend_neither_on_the_others_nor_on_the_number_of_devices():
    whole = run(EVERYTHING, IMAGES, KEY)
    others = np.array(IMAGES)
    others[1:] = 7
    assert_array_equal(run(EVERYTHING, others, KEY)[0], whole[0])
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    few = jax.device_put(IMAGES[:16], NamedSharding(mesh, PartitionSpec("data")))
    program = jax.jit(partial(augment, EVERYTHING)).lower(KEY, few).compile()
    sharded = program(KEY, few)
    assert_array_equal(sharded, whole[:16])
    assert sharded.sharding.is_equivalent_to(few.sharding, 4)
    assert not re.search(COLLECTIVES, program.as_text())


def test_nothing_asked_for_is_nothing_done():
    images = jax.numpy.asarray(IMAGES)
    assert augment(Data(), KEY, images) is images


def test_inputs_that_cannot_bear_a_change_are_refused(refusal):
    for config, shape, sentence in [
        (
            Data(flip=True),
            (64,),
            "data.flip = True: expected images, got vectors of length 64; leave out data.flip, data.crop and "
            "data.shift.",
        ),
        (Data(crop=2), (64,), "data.crop = 2: expected images, got vectors of length 64; "),
        (Data(shift=2), (1,), "data.shift = 2: expected images, got vectors of length 1; "),
        (Data(crop=8), (8, 9, 1), "data.crop: expected less than 8 for images of 8 x 9 pixels, got 8."),
        (
            Data(shift=7, crop=1),
            (8, 7, 3),
            "data.shift: expected less than 7 for images of 8 x 7 pixels, got 7.",
        ),
    ]:
        assert refusal(check_augmentation, config, shape).startswith(sentence)


def test_inputs_that_can_bear_a_change_are_changed():
    check_augmentation(Data(), (1,))
    for config, shape in (Data(flip=True), (1, 1, 1)), (Data(flip=True, crop=7, shift=7), (8, 9, 1)):
        check_augmentation(config, shape)
        images = np.zeros((2, *shape), np.float32)
        changed = jax.eval_shape(partial(augment, config), KEY, images)
        assert (changed.shape, changed.dtype) == (images.shape, images.dtype)
