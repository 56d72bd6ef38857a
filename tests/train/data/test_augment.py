import re
from collections import Counter
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_array_equal

from train.config import Data
from train.data.augment import augment, check
from train.errors import UserError

KEY = jax.random.key(0)
EVERYTHING = Data(flip=True, crop=1, shift=1)
IMAGES = np.random.RandomState(0).randint(1, 256, (16, 6, 5, 3)).astype(np.uint8)


def run(config, images, key=KEY):
    return jax.jit(partial(augment, config))(key, images)


def mirrored(image):
    return [image, image[:, ::-1]]


def cropped(image, pixels):
    padded = np.pad(image, [(pixels, pixels), (pixels, pixels), (0, 0)], mode="reflect")
    height, width, _ = image.shape
    offsets = product(range(2 * pixels + 1), repeat=2)
    return [padded[row : row + height, column : column + width] for row, column in offsets]


def shifted(image, pixels):
    images = []
    for offset in product(range(-pixels, pixels + 1), repeat=2):
        moved = np.zeros_like(image)
        for position in np.ndindex(image.shape[:2]):
            source = np.subtract(position, offset)
            if (source >= 0).all() and (source < image.shape[:2]).all():
                moved[position] = image[tuple(source)]
        images.append(moved)
    return images


@pytest.mark.parametrize(
    "config, changes, dtype",
    [
        (Data(flip=True), [mirrored], np.float32),
        (Data(crop=1), [partial(cropped, pixels=1)], np.uint8),
        (Data(crop=3), [partial(cropped, pixels=3)], np.float32),
        (Data(shift=1), [partial(shifted, pixels=1)], np.float32),
        (Data(shift=3), [partial(shifted, pixels=3)], np.uint8),
        (EVERYTHING, [mirrored, partial(cropped, pixels=1), partial(shifted, pixels=1)], np.uint8),
        (EVERYTHING, [mirrored, partial(cropped, pixels=1), partial(shifted, pixels=1)], np.float32),
    ],
)
def test_an_image_becomes_all_that_it_may_become_and_equally_often(config, changes, dtype):
    image = np.arange(1, 6 * 5 * 2 + 1).reshape(6, 5, 2).astype(dtype)
    possible = [image]
    for change in changes:
        possible = [changed for each in possible for changed in change(each)]
    expected = 100
    batch = np.broadcast_to(image, (expected * len(possible), *image.shape))
    images = run(config, batch)
    assert (images.shape, images.dtype) == (batch.shape, dtype)
    counts = Counter(each.tobytes() for each in np.asarray(images))
    assert counts.keys() == {each.tobytes() for each in possible}
    assert len(counts) == len(possible)
    # Pearson's statistic, within five standard deviations of its mean.
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    freedom = len(possible) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_choices_follow_from_the_key():
    first, again, other = (run(EVERYTHING, IMAGES, jax.random.key(seed)) for seed in (0, 0, 1))
    assert_array_equal(first, again)
    assert (first != other).any((1, 2, 3)).mean() > 0.5


def test_choices_for_an_image_do_not_depend_on_the_others():
    whole = run(EVERYTHING, IMAGES)
    for n in (1, 5):
        assert_array_equal(run(EVERYTHING, IMAGES[:n]), whole[:n])
    others = np.concatenate([IMAGES[:1], IMAGES[:0:-1]])
    assert_array_equal(run(EVERYTHING, others)[0], whole[0])


def test_changes_are_made_one_after_the_other_and_each_as_it_would_be_alone():
    images = IMAGES
    for config in (Data(flip=True), Data(crop=1), Data(shift=1)):
        images = run(config, images)
    assert_array_equal(run(EVERYTHING, IMAGES), images)


def test_nothing_asked_for_is_nothing_done():
    images = jnp.asarray(IMAGES)
    assert augment(Data(), KEY, images) is images


def test_images_on_several_devices_change_as_on_one_and_stay_where_they_are():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    images = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("data")))
    sharded = run(EVERYTHING, images)
    assert_array_equal(sharded, run(EVERYTHING, IMAGES))
    assert sharded.sharding.is_equivalent_to(images.sharding, 4)
    program = jax.jit(partial(augment, EVERYTHING)).lower(KEY, images).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program)


@pytest.mark.parametrize(
    "config, shape, message",
    [
        (
            Data(flip=True),
            (64,),
            "data.flip = True, but the inputs are vectors of length 64; wanted images, or none of data.flip, "
            "data.crop and data.shift.",
        ),
        (Data(crop=2), (64,), "data.crop = 2, but the inputs are vectors of length 64"),
        (Data(shift=2), (1,), "data.shift = 2, but the inputs are vectors of length 1"),
        (Data(crop=8), (8, 9, 1), "data.crop = 8, but the images are 8 x 9 pixels; wanted less than 8."),
        (Data(crop=1, shift=7), (8, 7, 3), "data.shift = 7, but the images are 8 x 7 pixels; wanted less"),
    ],
)
def test_check_refuses_what_the_inputs_cannot_bear(config, shape, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        check(config, shape)


@pytest.mark.parametrize(
    "config, shape",
    [
        (Data(), (1,)),
        (Data(), (1, 1, 1)),
        (Data(flip=True), (1, 1, 1)),
        (Data(flip=True, crop=7, shift=7), (8, 9, 1)),
    ],
)
def test_check_admits_the_rest(config, shape):
    check(config, shape)
    if len(shape) == 3:
        assert run(config, np.ones((2, *shape), np.float32)).shape == (2, *shape)
