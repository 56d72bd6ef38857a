"""On ordinary input both modules do what Flax's own do, and they are right where those are not."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.helpers import reference
from tests.helpers.flax_layers import NNX, Linen, both, gradients, quick_init
from tests.helpers.layers import random

pytestmark = pytest.mark.usefixtures("standard_promotion")
X, WEIGHT = (np.asarray(random((8, 4, 3), mean=1, seed=seed)) for seed in (0, 1))
MASKS = {
    "no mask": None,
    "of examples": np.arange(8)[:, None, None] > 2,
    "of positions": np.random.RandomState(1).rand(8, 4, 3) > 0.3,
}
INITIALIZERS = {"scale_init": quick_init, "bias_init": quick_init}
LINEN_ONLY = "no scale", "float16"  # NNX takes the same path
CASES = {
    "axis, momentum, epsilon": ("float32", {"axis": 1, "momentum": 0.5, "epsilon": 1e-3} | INITIALIZERS),
    "no scale": ("float32", {"use_scale": False, "use_fast_variance": False}),
    "no bias": ("float32", {"use_bias": False, "param_dtype": jnp.bfloat16}),
    "neither": ("float32", {"use_scale": False, "use_bias": False, "dtype": jnp.bfloat16}),
    "bfloat16 all through": ("bfloat16", {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}),
    "float16": ("float16", {"dtype": jnp.float16}),
    "integers, bfloat16 parameters": ("int32", {"param_dtype": jnp.bfloat16}),
    "integers, neither": ("uint8", {"use_scale": False, "use_bias": False}),
}


def pair(flavour, x, **options):
    """Returns Flax's layer and ours, with the same variables."""
    layers = [flavour(kind, x, jit=jax.jit, **options) for kind in (flavour.flax, flavour.ours)]
    theirs, ours = ((layer.params, layer.stats) for layer in layers)
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    jax.tree.map(assert_array_equal, theirs, ours)
    return layers


def like(actual, expected, tolerance=1e-5, case=""):
    """Compares trees by structure, dtypes, shapes and values; half precision to neighbouring numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        rounding = {"bfloat16": 2e-2, "float16": 2e-3}.get(a.dtype.name, tolerance)
        assert_allclose(np.float32(a), np.float32(b), rtol=rounding, atol=rounding, err_msg=case)


@pytest.mark.parametrize("flavour", [Linen, pytest.param(NNX, marks=pytest.mark.slow)])
def test_outputs_statistics_and_gradients_are_those_of_flax(flavour):
    theirs, ours = pair(flavour, X, **INITIALIZERS)
    derive = [jax.jit(partial(gradients, layer)) for layer in (theirs, ours)]
    for case, mask in MASKS.items():
        mask = mask if mask is None else np.broadcast_to(mask, X.shape)
        y, ours_y = (layer.train(X, mask=mask) for layer in (theirs, ours))
        like(ours_y, y, case=case)
        like(ours.stats, theirs.stats, case=case)
        expected, actual = (f(X, WEIGHT, mask=mask) for f in derive)
        like(actual, expected, 2e-5, case)
    like(ours.infer(X), theirs.infer(X))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flavour, case",
    [*product([Linen], CASES), *product([NNX], [case for case in CASES if case not in LINEN_ONLY])],
)
def test_options_and_dtypes_mean_what_they_mean_in_flax(flavour, case):
    dtype, options = CASES[case]
    x = (random(X.shape, mean=100, sd=30) if "int" in dtype else X).astype(dtype)
    theirs, ours = pair(flavour, x, **options)
    y, ours_y = (layer.train(x) for layer in (theirs, ours))
    # Flax's fast variance cancels where the mean is large.
    tolerance = 1e-4 if "int" in dtype else 1e-5
    like(ours_y, y, tolerance)
    # Its NNX module rounds what it measures to `dtype`; from there on ours is the better one.
    like(ours.stats, theirs.stats, 2e-2 if flavour is NNX and "dtype" in options else tolerance)
    ours.copy_from(theirs)
    like(ours.infer(x), theirs.infer(x))


@pytest.mark.slow
def test_gradients_in_bfloat16_are_those_of_flax():
    x = X.astype(jnp.bfloat16)
    layers = pair(Linen, x, dtype=jnp.bfloat16, **INITIALIZERS)
    theirs, ours = (jax.jit(partial(gradients, layer))(x, WEIGHT) for layer in layers)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert_allclose(np.float32(a), np.float32(b), atol=3e-2 * np.max(np.abs(np.float32(b))))


@both
def test_large_mean_costs_no_accuracy(flavour):
    x = random((512, 3), mean=1e4, sd=1.0)
    theirs, ours = pair(flavour, x)
    expected = reference.batch_norm(x)
    assert_allclose(ours.train(x), expected, atol=2e-3)
    assert np.max(np.abs(theirs.train(x) - expected)) > 1


@both
def test_backward_pass_keeps_x_in_its_own_dtype(flavour):
    x = jax.ShapeDtypeStruct((256, 64), "bfloat16")

    def bytes_an_element(kind):
        layer = flavour(kind, np.zeros(x.shape, x.dtype), jit=jax.jit, dtype=jnp.bfloat16)
        f = lambda params, x: layer.call(params, layer.stats, x, True)[0]
        kept = jax.eval_shape(lambda params, x: jax.vjp(f, params, x)[1], layer.params, x)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)) / x.size

    assert bytes_an_element(flavour.ours) < 2.2 and bytes_an_element(flavour.flax) > 5
