"""Options of both modules: dtypes, and what Flax's do not have, against NumPy float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference
from tests.helpers.flax_layers import WEIGHT, Linen, X, both, gradients, make, quick_init
from tests.helpers.layers import random

SOME = np.arange(8)[:, None, None] > 2
assert_close = partial(assert_allclose, atol=5e-6)


# Dtypes.


@both
def test_module_works_under_strict_promotion_with_narrow_samples(flavour):
    x = X.astype(jnp.bfloat16)
    layer = make(flavour, x)
    y, z = layer.train(x, mask=SOME), layer.infer(x)
    assert y.dtype == z.dtype == jnp.float32  # as in Flax: x promoted with float32 parameters
    assert_close(y, reference.batch_norm(x, mask=SOME))


@both
def test_dtype_rounds_the_result_and_nothing_before(flavour):
    x = np.float32([[-3.0], [2.0], [7.0], [12.0]])
    layer = make(flavour, x, dtype=jnp.bfloat16, momentum=0.0)
    layer.train(x + 1000)
    assert_allclose(layer.stats["var"], 31.25)
    layer.train(x / np.float32(1000) + np.float32(0.3333))
    assert_allclose(layer.stats["mean"], 0.3333 + 0.0045, rtol=1e-6)
    assert_allclose(layer.stats["var"], 31.25e-6, rtol=1e-4)
    y = layer.infer(x)
    assert y.dtype == jnp.bfloat16
    assert_allclose(np.float32(y), reference.normalize(x, *layer.stats.values()), rtol=2**-8)


@pytest.mark.slow
def test_float16_of_large_magnitude_is_normalized():
    x = random((64, 3), "float16", mean=300, sd=100)
    y = make(Linen, x, dtype=jnp.float16).train(x)
    assert_allclose(np.float32(y), reference.batch_norm(x), atol=4e-3)


@pytest.mark.slow
@both
def test_float64_input_has_float64_results(flavour, x64):
    x = random((64, 3), "float64", mean=1e6, sd=1e-3)
    layer = make(flavour, x, param_dtype=jnp.float64, momentum=0.0)
    assert_allclose(layer.train(x), reference.batch_norm(x), rtol=1e-6, atol=1e-6)
    mean, var, _ = reference.moments(x)
    assert layer.stats["mean"].dtype == layer.stats["var"].dtype == jnp.float64
    assert_allclose(layer.stats["mean"], mean, rtol=1e-14)
    assert_allclose(layer.stats["var"], var, rtol=1e-6)


@pytest.mark.slow
@both
def test_complex_input_has_a_complex_mean_and_a_real_variance(flavour):
    x = random(X.shape, "complex64")
    layer = make(flavour, x, momentum=0.0, param_dtype=jnp.complex64)
    y = layer.train(x)
    mean, var, _ = reference.moments(x)
    assert_close(y, reference.batch_norm(x))
    assert_allclose(layer.stats["mean"], mean, rtol=1e-5)
    assert_allclose(layer.stats["var"], var, rtol=1e-5)
    assert_close(layer.infer(x), y)


# More than Flax's, by keyword.


@pytest.mark.slow
@both
def test_any_update_rule_keeps_its_count_beside_the_statistics(flavour):
    x = np.asarray(random((5, *X.shape)))
    whole = reference.moments(x)
    batches = [reference.moments(batch) for batch in x]
    recent = 0.1 * 0.9 ** np.arange(4, -1, -1)
    mean_of_recent, var_of_recent, _ = np.average(batches, 0, recent)
    expected = {
        jbn.ema(0.9, debias=True): (mean_of_recent, var_of_recent, recent.sum()),
        jbn.pooled(): (whole[0], whole[1], 5 * 32),
    }
    for rule, (mean, var, count) in expected.items():
        layer = make(flavour, update=rule)
        for batch in x:
            layer.train(batch)
        for name, value in {"mean": mean, "var": var, "count": count}.items():
            assert_allclose(layer.stats[name], np.broadcast_to(value, 3), rtol=1e-5, err_msg=f"{rule} {name}")
        assert_close(layer.infer(x[0]), reference.normalize(x[0], mean, var))


@both
def test_virtual_batches_are_normalized_each(flavour):
    layer = make(flavour, virtual_batch_size=4, momentum=0.0)
    assert_close(layer.train(X), np.concatenate([reference.batch_norm(part) for part in np.split(X, 2)]))
    assert_allclose(layer.stats["var"], reference.moments(X)[1], rtol=1e-5)


@both
def test_scale_and_bias_may_be_given_in_the_call(flavour):
    layer = make(flavour, use_scale=False, use_bias=False)
    assert layer.params == {}
    for shape in (3,), (8, 1, 3), (8, 4, 1):
        scale, bias = (np.asarray(random(shape, mean=1, seed=seed)) for seed in (1, 2))
        expected = reference.batch_norm(X) * scale + bias
        assert_allclose(layer.train(X, scale=scale, bias=bias), expected, rtol=1e-5, atol=2e-5)
        expected = reference.normalize(X, *layer.stats.values()) * scale + bias
        assert_allclose(layer.infer(X, scale=scale, bias=bias), expected, rtol=1e-5, atol=2e-5)
    assert_allclose(layer.infer(X, scale=[2.0, 2.0, 2.0]), 2 * layer.infer(X), rtol=1e-6)


@pytest.mark.slow
@both
def test_running_statistics_start_as_their_initializers_say(flavour):
    positive = lambda *args: 2 + quick_init(*args)
    layer = make(flavour, mean_init=positive, var_init=positive, scale_init=quick_init)
    other = flavour(
        flavour.ours, X, mean_init=lambda *_: jnp.full(3, 2.0), var_init=lambda *_: jnp.full(3, 5.0)
    )
    assert_array_equal(other.stats["mean"], 2)
    assert_array_equal(other.stats["var"], 5)
    drawn = np.concatenate([layer.stats["mean"], layer.stats["var"]])
    assert len(set(drawn.tolist())) == 6 and np.all((drawn > 1) & (drawn < 3))
    expected = reference.normalize(X, *layer.stats.values(), layer.params["scale"])
    assert_allclose(layer.infer(X), expected, rtol=1e-4, atol=1e-5)


@both
def test_frozen_layer_uses_its_statistics_updates_nothing_and_gets_no_gradient(flavour):
    trained = make(flavour, momentum=0.5, scale_init=quick_init)
    trained.train(X)
    layer = make(flavour, frozen=True)
    layer.copy_from(trained)
    y, stats = layer.step(layer.params, layer.stats, X, True)
    assert_array_equal(y, layer.infer(X))
    jax.tree.map(assert_array_equal, stats, trained.stats)
    to_params, to_x = jax.jit(partial(gradients, layer))(X, WEIGHT)
    jax.tree.map(lambda leaf: assert_array_equal(leaf, 0), to_params)
    scale, var = np.asarray(layer.params["scale"]), np.asarray(layer.stats["var"])
    expected = WEIGHT * scale / np.sqrt(var + 1e-5)
    assert_allclose(to_x, expected, rtol=1e-5)


@both
def test_frozen_layer_gives_a_gradient_to_what_comes_from_outside(flavour):
    layer = flavour(flavour.ours, X, use_scale=False, frozen=True)
    loss = lambda scale: jnp.sum(layer.infer(X, scale=scale) * WEIGHT)
    expected = np.sum(reference.normalize(X, np.zeros(3), np.ones(3)) * WEIGHT, 1, keepdims=True)
    assert_allclose(jax.jit(jax.grad(loss))(np.ones((8, 1, 3), np.float32)), expected, rtol=1e-5, atol=1e-5)


# Errors.


@both
def test_what_makes_no_sense_is_named(flavour):
    layer, bare = flavour(flavour.ours, X), flavour(flavour.ours, X, use_scale=False, use_bias=False)
    given = "{0} was given in the call .* use_{0}=False"
    for error, message, call in [
        (ValueError, given.format("scale"), lambda: layer.train(X, scale=np.ones(3))),
        (ValueError, given.format("bias"), lambda: layer.train(X, bias=np.ones(3))),
        (ValueError, r"^scale has shape \(5,\); expected \(3,\)", lambda: bare.train(X, scale=np.ones(5))),
        (
            ValueError,
            r"^bias has shape \(8, 3\); expected \(3,\)",
            lambda: bare.train(X, bias=np.ones((8, 3))),
        ),
        (ValueError, "mask of shape .* does not broadcast", lambda: layer.train(X, mask=np.ones(8, bool))),
        (ValueError, "is not bound here", lambda: flavour(flavour.ours, X, axis_name="i").train(X)),
        (ValueError, "momentum=1.5 is outside", lambda: flavour(flavour.ours, X, momentum=1.5)),
        (
            TypeError,
            "use_running_average is an array of .*; expected True, False, or a traced",
            lambda: jax.jit(lambda train: layer.call(layer.params, layer.stats, X, train))(np.ones(2, bool)),
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
