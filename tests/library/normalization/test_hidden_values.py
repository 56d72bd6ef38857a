"""What a mask hides reaches no value, no derivative and no check, wherever the mask is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference
from tests.helpers.flax_layers import NNX, Linen

ROWS, COUNTED = 64, 50
ROWS_COUNTED = np.arange(ROWS)[:, None] < COUNTED
RNG = np.random.RandomState(0)
MASKS = {
    "rows": ROWS_COUNTED,
    "weights of rows": ROWS_COUNTED * RNG.gamma(2.0, size=(ROWS, 1)).astype(np.float32),
    "positions": RNG.rand(ROWS, 4) < 0.8,
    "weights of positions": (RNG.rand(ROWS, 4) < 0.8) * RNG.gamma(2.0, size=(ROWS, 4)).astype(np.float32),
}
HIDDEN = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "largest": np.finfo(np.float32).max}
MEANS = [0.0, 10.0, 1e3, 1e4, -1e6]
TARGET = RNG.normal(size=(ROWS, 4)).astype(np.float32)
RUNNING = jbn.Moments(*np.float32([[0] * 4, [1] * 4, [0] * 4]))


def samples(mean, mask, hidden):
    clean = np.float32(np.random.RandomState(1).normal(mean, 1, (ROWS, 4)))
    return clean, np.where(np.broadcast_to(mask > 0, clean.shape), clean, np.float32(hidden))


def gradient(f):
    return jax.grad(lambda x, mask: jnp.sum(jnp.sin(f(x, mask)) * TARGET, where=mask.astype(bool)))


def pure(x, mask, **options):
    return jbn.batch_norm(x, None, RUNNING, train=True, mask=mask, **options)[0]


def ghosts(x, mask):
    return pure(x, mask, virtual_batch_size=16)


def module(flavour):
    def f(x, mask):
        driver = flavour(flavour.ours, np.zeros((2, 4), np.float32))
        return driver.call(driver.params, driver.stats, x, True, mask=mask)[0]

    return f


def over_devices(x, mask):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    f = lambda x, mask: pure(x, mask, axis_name="i")
    return jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=P("i"))(x, mask)


@pytest.mark.parametrize(
    "mask, vectorized",
    [
        ("rows", False),
        ("weights of positions", False),
        pytest.param("weights of rows", False, marks=pytest.mark.slow),
        pytest.param("weights of rows", True, marks=pytest.mark.slow),
    ],
)
def test_moments_are_those_of_what_is_counted_for_any_mean_and_hidden_value(mask, vectorized):
    measure = lambda x: jbn.moments(x, mask=MASKS[mask])[:2]
    f = jax.jit((lambda x: [leaf[0] for leaf in jax.vmap(measure)(x[None])]) if vectorized else measure)
    for mean in MEANS:
        clean, _ = samples(mean, MASKS[mask], 0)
        expected_mean, expected_var, _ = reference.moments(clean, mask=MASKS[mask])
        for name, hidden in HIDDEN.items():
            actual_mean, actual_var = f(samples(mean, MASKS[mask], hidden)[1])
            assert_allclose(actual_var, expected_var, rtol=2e-5, err_msg=f"{mean} {name}")
            assert_allclose(actual_mean, expected_mean, rtol=3e-7, atol=1e-6, err_msg=f"{mean} {name}")


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float64", "complex64"))]
)
def test_moments_are_those_of_what_is_counted_in_any_dtype(x64, dtype):
    clean = jnp.asarray(samples(100.0, MASKS["rows"], 0)[0], dtype)
    x = np.where(ROWS_COUNTED, clean, np.asarray(np.nan, clean.dtype))
    actual = jax.jit(lambda x: jbn.moments(x, mask=ROWS_COUNTED))(x)
    for leaf, wanted in zip(actual, reference.moments(clean, mask=ROWS_COUNTED)):
        assert_allclose(leaf, wanted, rtol=1e-12 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize(
    "f, masks",
    [
        (pure, ["rows", "weights of positions"]),
        pytest.param(pure, ["positions"], marks=pytest.mark.slow),
        *(pytest.param(f, ["weights of rows"], marks=pytest.mark.slow) for f in (ghosts, over_devices)),
    ],
    ids=["pure", "pure, positions", "ghosts", "8 devices"],
)
def test_outputs_and_gradients_are_those_of_what_is_counted(f, masks):
    both = jax.jit(lambda x, mask: (f(x, mask), gradient(f)(x, mask)))
    parts = 4 if f is ghosts else 1
    for name in masks:
        mask = MASKS[name]
        counted = np.broadcast_to(mask > 0, (ROWS, 4))
        for mean in (10.0,) if f is ghosts else (10.0, 1e4):
            expected_y, expected_dx = [], []
            clean, x = samples(mean, mask, np.nan)
            for part, m, target in zip(*(np.split(leaf, parts) for leaf in (clean, mask, TARGET))):
                expected_y.append(reference.batch_norm(part, mask=m))
                dy = np.cos(expected_y[-1]) * target * (m > 0)
                expected_dx.append(reference.gradients(part, dy, mask=m)[0])
            y, dx = jax.device_get(both(x, mask))
            expected = np.where(counted, np.concatenate(expected_y), 0)  # hidden, it acts as the mean
            assert_allclose(y, expected, atol=4e-7 * mean + 1e-5, err_msg=name)
            expected = np.where(counted, np.concatenate(expected_dx), 0)
            assert_allclose(dx, expected, rtol=1e-3, atol=1e-4 + 2e-7 * mean, err_msg=name)
            assert_array_equal(y[~counted], 0)
            assert_array_equal(dx[~counted], 0)
            again = both(np.where(counted, x, np.float32(np.inf)), mask)
            jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, (y, dx))


CHECKED = {
    "batch_norm": pure,
    "gradient": gradient(pure),
    "gradient of moments": jax.grad(lambda x, mask: jnp.sum(jbn.moments(x, mask=mask).var)),
    "inference": lambda x, mask: jbn.batch_norm(x, None, RUNNING, train=False, mask=mask),
    "ghosts": ghosts,
    "gradient of ghosts": gradient(ghosts),
    "gradient of Linen": gradient(module(Linen)),
    "gradient of NNX": gradient(module(NNX)),
}
# What the others compute is a part of these.
EAGER = ("gradient", "inference", "ghosts", "gradient of Linen", "gradient of NNX")


@pytest.mark.slow
@pytest.mark.parametrize("call", EAGER)
def test_debug_nans_has_nothing_to_say_of_what_is_hidden(call):
    # It looks at every array that is computed, so that nothing is compiled here.
    mask = MASKS["weights of positions"]
    x = jnp.asarray(samples(1e4, mask, np.nan)[1])
    with jax.debug_nans(True):
        result = CHECKED[call](x, mask)
        if call == "gradient":
            with pytest.raises(FloatingPointError):
                CHECKED[call](x, None)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


@pytest.mark.slow
@pytest.mark.parametrize("call", ["batch_norm", "gradient of moments", "gradient of ghosts"])
def test_checkify_has_nothing_to_say_of_what_is_hidden(call):
    mask = MASKS["weights of rows"]
    _, x = samples(1e4, mask, np.nan)
    errors = lambda x, mask: checkify.checkify(CHECKED[call], errors=checkify.float_checks)(x, mask)[0]
    assert jax.jit(errors)(x, mask).get() is None
    if call == "batch_norm":
        assert "nan" in jax.jit(errors)(x, None).get()
