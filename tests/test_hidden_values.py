"""What a mask hides reaches no value, no derivative and no check, wherever the mask is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import quick_jit
from flax import nnx
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen
import jbn.nnx

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
TARGET = jnp.asarray(RNG.normal(size=(ROWS, 4)), jnp.float32)


def samples(mean, mask, hidden):
    clean = np.float32(np.random.RandomState(1).normal(mean, 1, (ROWS, 4)))
    return clean, jnp.where(np.broadcast_to(mask > 0, clean.shape), clean, np.float32(hidden))


def gradient(f, x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(f(x)) * TARGET))(x)


def pure(mask):
    def f(x):
        return jbn.batch_norm(x, None, jbn.init(4)[1], train=True, mask=mask)[0]

    return f


def linen(mask):
    layer = jbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), jnp.zeros((2, 4)))
    return lambda x: layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[0]


def nnx_layer(mask):
    layer = jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    return lambda x: nnx.merge(graph, state, copy=True)(x, mask=mask)


def over_devices(mask):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def f(x, mask):
        return jbn.batch_norm(x, None, jbn.init(4)[1], train=True, mask=mask, axis_name="i")[0]

    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=P("i")))
    return lambda x: mapped(x, jnp.asarray(mask))


LAYERS = {"Linen": linen, "NNX": nnx_layer, "8 devices": over_devices, "pure": pure}


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_moments_are_those_of_what_is_counted_for_any_mean_and_hidden_value(mask, vectorized):
    measure = lambda x: jbn.moments(x, mask=MASKS[mask])[:2]
    one_of_one = lambda x: jax.tree.map(lambda leaf: leaf[0], jax.vmap(measure)(x[None]))
    f = quick_jit(one_of_one if vectorized else measure)
    for mean in MEANS:
        for name, hidden in HIDDEN.items():
            clean, x = samples(mean, MASKS[mask], hidden)
            expected_mean, expected_var, _ = reference.moments(clean, mask=MASKS[mask])
            actual_mean, actual_var = f(x)
            assert_allclose(actual_var, expected_var, rtol=2e-5, err_msg=f"{mean} {name}")
            assert_allclose(actual_mean, expected_mean, rtol=3e-7, atol=1e-6, err_msg=f"{mean} {name}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "complex64"])
def test_moments_are_those_of_what_is_counted_in_any_dtype(x64, dtype):
    clean = jnp.asarray(samples(100.0, MASKS["rows"], 0)[0], dtype)
    x = jnp.where(ROWS_COUNTED, clean, jnp.asarray(np.nan, dtype))
    expected = reference.moments(clean, mask=ROWS_COUNTED)
    for leaf, wanted in zip(jbn.moments(x, mask=ROWS_COUNTED), expected):
        assert_allclose(leaf, wanted, rtol=1e-12 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize(
    "layer, mask", [*(("pure", mask) for mask in MASKS), *((layer, "weights of rows") for layer in LAYERS)]
)
def test_outputs_and_gradients_are_those_of_what_is_counted(layer, mask):
    f = LAYERS[layer](MASKS[mask])
    both = quick_jit(lambda x: (f(x), gradient(f, x)))
    counted = np.broadcast_to(MASKS[mask] > 0, (ROWS, 4))
    for mean in (10.0, 1e4):
        clean, x = samples(mean, MASKS[mask], np.nan)
        y, dx = both(x)
        expected = reference.batch_norm(clean, mask=MASKS[mask])
        assert_allclose(np.where(counted, y, 0), np.where(counted, expected, 0), atol=4e-7 * mean + 1e-5)
        assert_array_equal(np.where(counted, 0, y), 0)  # hidden, it acts as the mean
        _, expected = both(jnp.where(counted, x, np.float32(np.inf)))
        assert_allclose(dx, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(dx).max() < 10 and np.abs(dx[:COUNTED]).max() > 0.1
        assert_array_equal(np.where(counted, 0, dx), 0)


def test_gradients_do_not_depend_on_what_is_hidden():
    clean, x = samples(1e4, ROWS_COUNTED, np.nan)
    alone = lambda x: jnp.sum(jnp.sin(pure(None)(x)) * TARGET[:COUNTED])
    masked = lambda x: jnp.sum(jnp.sin(pure(ROWS_COUNTED)(x)) * TARGET, where=ROWS_COUNTED)
    expected, dx = quick_jit(jax.grad(alone))(clean[:COUNTED]), quick_jit(jax.grad(masked))(x)
    assert_allclose(dx[:COUNTED], expected, rtol=1e-3, atol=1e-5)


EAGER = {
    "moments": lambda x, mask: jbn.moments(x, mask=mask),
    "batch_norm": lambda x, mask: pure(mask)(x),
    "gradient": lambda x, mask: jax.grad(lambda x: jnp.sum(jnp.sin(pure(mask)(x)) * TARGET))(x),
    "gradient of moments": lambda x, mask: jax.grad(lambda x: jnp.sum(jbn.moments(x, mask=mask).var))(x),
    "inference": lambda x, mask: jbn.batch_norm(x, None, jbn.init(4)[1], train=False, mask=mask),
    "ghosts": lambda x, mask: jbn.batch_norm(
        x, None, jbn.init(4)[1], train=True, mask=mask, virtual_batch_size=16
    ),
    "gradient of ghosts": lambda x, mask: jax.grad(
        lambda x: jnp.sum(jnp.sin(EAGER["ghosts"](x, mask)[0]) * TARGET)
    )(x),
    "Linen": lambda x, mask: linen(mask)(x),
    "gradient of Linen": lambda x, mask: jax.grad(lambda x: jnp.sum(jnp.sin(linen(mask)(x)) * TARGET))(x),
    "NNX": lambda x, mask: nnx_layer(mask)(x),
    "gradient of NNX": lambda x, mask: jax.grad(lambda x: jnp.sum(jnp.sin(nnx_layer(mask)(x)) * TARGET))(x),
}


@pytest.mark.parametrize("call", EAGER)
def test_debug_nans_has_nothing_to_say_of_what_is_hidden(call):
    mask = MASKS["weights of positions"]
    _, x = samples(1e4, mask, np.nan)
    with jax.debug_nans(True):
        result = EAGER[call](x, mask)
        if call == "batch_norm":
            with pytest.raises(FloatingPointError):
                EAGER[call](x, None)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize(
    "call", ["batch_norm", "gradient of moments", "gradient of ghosts", "gradient of NNX"]
)
def test_checkify_has_nothing_to_say_of_what_is_hidden(call):
    mask = MASKS["weights of rows"]
    _, x = samples(1e4, mask, np.nan)
    checked = lambda mask: checkify.checkify(lambda x: EAGER[call](x, mask), errors=checkify.float_checks)
    error, _ = quick_jit(checked(mask))(x)
    assert error.get() is None
    if call == "batch_norm":
        error, _ = quick_jit(checked(None))(x)
        assert "nan" in error.get()
