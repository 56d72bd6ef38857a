"""Batch renormalization: values by NumPy float64, derivatives by the formula with r and d held constant."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference
from tests.helpers.layers import on_devices, random

X = np.asarray(random((8, 3)))
SCALE, BIAS = np.float32([1.5, 0.5, -2]), np.float32([0, 1, -1])
PARAMS = jbn.Params(SCALE, BIAS)
# Within the limits; beyond both, above and below; r below.
MEAN, VAR = np.float32([2.5, 6, -4]), np.float32([4.5, 0.1, 900])
RUNNING = jbn.Moments(MEAN, VAR, np.float32(1))
TARGET = np.random.RandomState(5).normal(0, 1, X.shape)
ROWS = np.array([1, 1, 0, 0, 1, 0, 1, 1], bool)[:, None]  # unequal numbers in parts of two
GAMMA = np.random.RandomState(4).gamma(1.0, size=X.shape)


def call(f, x, params=PARAMS, running=RUNNING, **options):
    return f(x, params, running, **dict(train=True, update=jbn.ema(0.5)) | options)


renorm, plain = partial(call, jbn.batch_renorm), partial(call, jbn.batch_norm)
compiled = jax.jit(renorm)
masked = jax.jit(lambda x, mask: renorm(x, mask=mask))


def expected(x, mean=MEAN, var=VAR, scale=SCALE, bias=BIAS, r_max=3.0, d_max=5.0, **options):
    return reference.batch_renorm(x, mean, var, r_max, d_max, scale, bias, **options)


def assert_same_bits(actual, wanted):
    as_bytes = lambda leaf: np.asarray(leaf).tobytes()
    assert jax.tree.map(as_bytes, actual) == jax.tree.map(as_bytes, wanted)


# Values


def test_values_are_those_of_float64_within_and_beyond_the_limits():
    r, d = reference.corrections(X, MEAN, VAR, np.inf, np.inf)
    assert 1 / 3 < r[0] < 3 < r[1] and r[2] < 1 / 3 and abs(d[0]) < 5 and d[1] < -5
    of_limits = jax.jit(lambda r_max, d_max: renorm(X, r_max=r_max, d_max=d_max)[0])
    for r_max, d_max in (3.0, 5.0), (1.0, 5.0), (3.0, 0.0), (np.inf, np.inf), (1.0, 0.0):
        wanted = expected(X, r_max=r_max, d_max=d_max)
        assert_allclose(of_limits(r_max, d_max), wanted, rtol=1e-4, atol=1e-4)
    # Without limits it is inference.
    assert_allclose(expected(X, r_max=np.inf, d_max=np.inf), reference.normalize(X, MEAN, VAR, SCALE, BIAS))


def test_masks_and_weights_of_any_scale():
    f = lambda mask: masked(X, mask)[0]
    assert_allclose(f(ROWS), expected(X, mask=ROWS), rtol=1e-4, atol=1e-4)
    for scale in 1, 1e-35, 1e37:
        weights = np.float32(GAMMA * scale)
        assert_allclose(f(weights), expected(X, mask=GAMMA), rtol=1e-4, atol=1e-4, err_msg=scale)
    y = f(np.zeros_like(GAMMA, np.float32))
    assert_allclose(y, expected(X, mask=np.zeros_like(X)), rtol=1e-5)


def test_what_a_mask_hides_has_no_effect_and_what_it_does_not_stays_in_its_feature():
    weights = np.float32(ROWS * GAMMA)
    for value in np.nan, np.inf:
        y, new = masked(np.where(ROWS, X, np.float32(value)), weights)
        wanted, wanted_new = masked(X, weights)
        assert_array_equal(np.where(ROWS, y, 0), np.where(ROWS, wanted, 0))
        jax.tree.map(assert_array_equal, new, wanted_new)
        assert np.isfinite(y).all()  # they act as the mean
        x = X.copy()
        x[0, 1] = value
        y, new = masked(x, weights)
        assert_array_equal(np.isfinite(y).all(0), [True, False, True])
        assert_array_equal(new.mean[1], MEAN[1])


def test_variances_and_distances_beyond_the_largest_number():
    x = np.float32(X * [1, 1e30, 0] + [0, 0, 1e25])
    y, _ = jax.jit(lambda: renorm(x, running=RUNNING._replace(var=np.zeros(3, np.float32)), epsilon=1e-37))()
    assert_array_equal(y[:, 1:], [BIAS[1:] + [0, 5 * SCALE[2]]] * 8)


def test_within_the_limits_the_rounding_of_a_large_mean_cancels():
    x, running = X + np.float32(1e5), RUNNING._replace(mean=MEAN + np.float32(1e5))
    error = compiled(x, running=running)[0] - expected(x, mean=running.mean)
    assert np.abs(error[:, 0]).max() < 1e-5 and np.abs(error).max() < 0.02


def test_features_of_any_axes_and_float64(x64):
    x = np.float64(random((4, 5, 2)))
    mean, var, count, scale, bias = np.random.RandomState(1).gamma(3.0, size=(5, 4, 2))
    running, params = jbn.Moments(mean, var, count), jbn.Params(scale, bias)
    y, _ = jax.jit(lambda x: renorm(x, params, running, axis=(-1, 0), r_max=1.3, d_max=0.3))(x)
    wanted = expected(x, mean, var, scale, bias, 1.3, 0.3, axis=(0, 2))
    assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_dtypes(dtype):
    x = random(X.shape, dtype)
    is_complex = jnp.iscomplexobj(x)
    running = RUNNING._replace(mean=np.complex64(MEAN - 2j)) if is_complex else RUNNING
    y, new = compiled(x, running=running)
    assert (y.dtype, new.mean.dtype, new.var.dtype) == (x.dtype, running.mean.dtype, np.float32)
    x, y = (np.asarray(a, np.complex128 if is_complex else np.float64) for a in (x, y))
    eps = 1e-5 if is_complex else float(jnp.finfo(dtype).eps)
    assert_allclose(y, expected(x, running.mean), rtol=eps, atol=10 * eps)


# What it is equal to, bit for bit


def test_limits_that_allow_no_correction_make_the_program_of_batch_norm():
    of = lambda f, **limits: str(jax.make_jaxpr(jax.grad(lambda x: f(x, **limits)[0].sum()))(X))
    assert of(renorm, r_max=1, d_max=0) == of(plain) != of(renorm)
    inference = partial(of, train=False)
    assert inference(renorm) == inference(plain)


def test_traced_limits_that_allow_no_correction_change_no_bit():
    """Of outputs, running moments and all gradients, -0.0 included."""

    def both(f):
        value = lambda x, params: jnp.sum(f(x, params)[0] * TARGET.astype(np.float32))
        return lambda x, params: (f(x, params), jax.grad(value, (0, 1))(x, params))

    x = np.float32(np.where(X > 3, X, -0.0))
    x[:, 2] = -0.0
    of_limits = jax.jit(lambda x, params, r, d: both(partial(renorm, r_max=r, d_max=d))(x, params))
    of_plain = jax.jit(both(plain))
    for params in PARAMS, PARAMS._replace(bias=np.float32([-0.0] * 3)), jbn.Params(None, None):
        assert_same_bits(of_limits(x, params, 1.0, 0.0), of_plain(x, params))


def test_traced_train_takes_either_program():
    """In inference limits have no effect, whatever they are, nor has an infinite running variance."""
    f = jax.jit(lambda running, train, r_max: renorm(X, running=running, train=train, r_max=r_max))
    inference = jax.jit(lambda running: renorm(X, running=running, train=False))
    for var in VAR, np.float32([4.5, np.inf, 900]):
        running = RUNNING._replace(var=var)
        assert_same_bits(f(running, False, np.nan), inference(running))
    assert_same_bits(f(RUNNING, True, 3.0), compiled(X, running=RUNNING))


def test_running_moments_of_no_samples_correct_nothing():
    rules = jbn.cumulative(), jbn.pooled(), jbn.ema(0.5, debias=True)
    running = RUNNING._replace(count=np.float32([0, 0.5, 0]))
    by_rule = lambda f: jax.jit(lambda: [f(X, running=running, update=rule) for rule in rules])()
    for (y, new), (wanted, wanted_new) in zip(by_rule(renorm), by_rule(plain)):
        assert_same_bits((y[:, ::2], new), (wanted[:, ::2], wanted_new))
        assert_allclose(y[:, 1], expected(X)[:, 1], rtol=1e-5, atol=1e-5)


def test_conditional_scale_and_bias_apply_after_the_correction():
    scale = np.float32(GAMMA)
    y, _ = jax.jit(lambda: renorm(X, jbn.Params(scale, BIAS)))()
    ones = np.ones(3)
    assert_allclose(y, expected(X, scale=ones, bias=0 * ones) * scale + BIAS, rtol=1e-5, atol=1e-5)


# Parts and devices


def test_each_ghost_batch_is_corrected_by_itself():
    parts = [np.array_split(a, 3) for a in (X, GAMMA)]
    wanted = np.concatenate([expected(x, mask=weights) for x, weights in zip(*parts)])
    hidden, weights = np.where(ROWS, X, np.float32(np.nan)), np.float32(ROWS * GAMMA)
    f = jax.jit(lambda x, weights: renorm(x, mask=weights, virtual_batch_size=3)[0])
    assert_allclose(f(X, np.float32(GAMMA)), wanted, rtol=1e-5, atol=1e-4)
    wanted = f(X, weights)
    with jax.debug_nans(True):
        assert_array_equal(np.where(ROWS, f(hidden, weights), 0), np.where(ROWS, wanted, 0))


def derive(f):
    """Returns `y`, the new moments, and the gradients of sum(y * target)."""

    def loss(x, params, mask):
        y, new = f(x, mask, params, RUNNING)
        return jnp.sum(y * TARGET.astype(y.dtype)), (y, new)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


def with_mask(x, mask, params, running, **options):
    return renorm(x, params, running, mask=mask, **options)


def in_vmap(x, mask, params, running):
    f = jax.vmap(partial(with_mask, axis_name="i"), (0, 0, None, None), (0, None), axis_name="i")
    y, new = f(x.reshape(4, 2, 3), mask.reshape(4, 2, 1), params, running)
    return y.reshape(x.shape), new


WAYS = {
    "alone": with_mask,
    "shard_map": on_devices(partial(with_mask, axis_name="a"), "a"),
    "vmap": in_vmap,
    "sharded": with_mask,
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_hold_r_and_d_constant_also_over_devices(way):
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Explicit,))
    is_sharded = way == "sharded"
    with jax.set_mesh(mesh) if is_sharded else nullcontext():
        put = lambda a: jax.device_put(a, NamedSharding(mesh, P("a"))) if is_sharded else a
        (dx, dparams), (y, new) = derive(WAYS[way])(put(X), PARAMS, put(ROWS))
    assert_allclose(y, expected(X, mask=ROWS), rtol=1e-5, atol=1e-4)
    mean, var, _ = reference.moments(X, mask=ROWS)
    assert_allclose(new[:2], ((MEAN + mean) / 2, (VAR + var) / 2), rtol=1e-5)
    r, d = reference.corrections(X, MEAN, VAR, 3, 5, mask=ROWS)
    wanted, dscale, dbias = reference.gradients(X, TARGET, r * SCALE, mask=ROWS)
    assert_allclose(dx, wanted, rtol=1e-4, atol=1e-5)
    assert_allclose(dparams, (r * dscale + d * dbias, dbias), rtol=1e-4, atol=1e-5)


def test_groups_are_corrected_by_themselves():
    f = partial(renorm, axis_name="i", axis_index_groups=[[0, 3], [1, 2]])
    y, _ = jax.jit(jax.vmap(f, axis_name="i"))(X.reshape(4, 2, 3))
    for group in ([0, 3], [1, 2]):
        x = X.reshape(4, 2, 3)[group]
        assert_allclose(y[np.array(group)], expected(x), rtol=1e-5, atol=1e-4)


# Derivatives


def formula(x, scale, bias):
    r, d = reference.corrections(X, MEAN, VAR, 3, 5)
    deviation = x - jnp.mean(x, 0, keepdims=True)
    y = deviation / jnp.sqrt(jnp.mean(deviation**2, 0, keepdims=True) + 1e-5)
    return (y * r[None] + d[None]) * scale[None] + bias[None]


def ours(x, scale, bias):
    return renorm(x, jbn.Params(scale, bias), jax.tree.map(np.float64, RUNNING))[0]


def scanned(x, scale, bias):
    step = jax.checkpoint(lambda carry, _: (carry, ours(x, scale, bias)))
    return jax.lax.scan(step, None, None, length=2)[1].mean(0)


def mapped(*args):
    return jax.vmap(ours)(*(a[None] for a in args))[0]


@pytest.mark.parametrize("f", [ours, *(pytest.param(f, marks=pytest.mark.slow) for f in (scanned, mapped))])
def test_derivatives_of_any_order_are_those_of_the_formula(x64, f):
    args = jax.tree.map(np.float64, (X, SCALE, BIAS))
    along = jax.tree.map(np.cos, args)

    @partial(jax.jit, static_argnums=0)
    def derivatives(f):
        loss = lambda *args: jnp.sum(jnp.sin(f(*args)) * TARGET)
        # r and d depend on x, so that both are those at this x.
        return jax.jvp(f, args, along), jax.jvp(jax.grad(loss, (0, 1, 2)), args, along)

    jax.tree.map(partial(assert_allclose, rtol=1e-9, atol=1e-9), derivatives(f), derivatives(formula))


def test_limits_and_running_moments_carry_no_gradient():
    def total(running, r_max, d_max):
        f = partial(renorm, running=running, r_max=r_max, d_max=d_max)
        of_members = jax.vmap(partial(f, axis_name="i"), axis_name="i")  # which has another rule
        return jnp.sum(f(X)[0] ** 2) + jnp.sum(of_members(X)[0] ** 2)

    running = RUNNING._replace(count=np.ones(3, np.float32))
    zero = jax.jit(jax.grad(total, (0, 1, 2)))(running, 1.5, 0.5)
    jax.tree.map(lambda leaf: assert_array_equal(leaf, 0), zero)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-37])
def test_derivatives_are_finite_where_batch_or_running_variance_is_0(epsilon):
    x = np.float32(np.where([0, 1, 0], X, 3))
    running = RUNNING._replace(var=np.float32([0, 0, 1]))
    f = lambda x, scale: renorm(x, jbn.Params(scale, BIAS), running, epsilon=epsilon)[0]
    loss = lambda *args: jnp.sum(f(*args) * TARGET.astype(np.float32))

    @jax.jit
    def derivatives(x, scale):
        gradient = jax.grad(loss, (0, 1))
        return f(x, scale), gradient(x, scale), jax.jvp(gradient, (x, scale), (x, scale))[1][1]

    y, (dx, dscale), second = derivatives(x, SCALE)
    options = dict(epsilon=epsilon)
    assert_allclose(y, expected(x, var=running.var, **options), rtol=1e-4, atol=1e-4)
    r, d = reference.corrections(x, MEAN, running.var, 3, 5, **options)
    wanted, dnormal, dbias = reference.gradients(x, TARGET, r * SCALE, **options)
    assert_allclose(dx, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    assert_allclose(dscale, r * dnormal + d * dbias, rtol=1e-4, atol=1e-4)
    assert np.isfinite(second).all()


# Limits


def test_schedule_is_that_of_the_paper_or_of_crossq():
    n = np.int32([0, 4_999, 5_000, 12_500, 25_000, 30_000, 40_000, 99_999, 100_000, 2**31 - 1])
    crossq = jbn.renorm_limits(plain=np.int64(100_000), r_steps=0, d_steps=0)
    paper, at_once = jax.jit(jax.vmap(lambda n: (jbn.renorm_limits()(n), crossq(n))))(n)
    wanted = np.interp(n, [5_000, 40_000], [1, 3]), np.interp(n, [5_000, 25_000], [0, 5])
    assert_allclose(paper, wanted, rtol=1e-6)
    assert_array_equal(at_once, np.where(n < 100_000, [[1], [0]], [[3], [5]]))
    assert hash(jbn.renorm_limits()) == hash(jbn.renorm_limits()) and jbn.renorm_limits() != crossq


def test_limits_may_be_numbers_of_any_type():
    f = lambda **limits: renorm(
        X, running=RUNNING._replace(count=np.float32(0)), update=jbn.pooled(), **limits
    )
    for limit in np.int32(3), np.float64(3), jnp.bfloat16(3), jnp.int32(3):
        jax.eval_shape(lambda limit=limit: f(r_max=limit, d_max=limit))
        jax.eval_shape(lambda limit: f(r_max=limit, d_max=limit), limit)


def test_limits_out_of_range_are_refused_by_name():
    for limits, error, message in (
        (dict(r_max=0.5), ValueError, "r_max=0.5; expected a number >= 1"),
        (dict(r_max=np.nan), ValueError, "r_max=nan; expected a number >= 1"),
        (dict(d_max=-1), ValueError, "d_max=-1; expected a number >= 0"),
        (dict(d_max=None), TypeError, "d_max=None; expected a number >= 0"),
        (dict(d_max="5"), TypeError, "d_max='5'; expected a number >= 0"),
        (dict(r_max=jbn.renorm_limits()), TypeError, "Call a schedule: r_max, d_max = schedule"),
        (dict(r_max=[3, 3, 3]), ValueError, r"r_max has shape \(3,\); expected one number"),
    ):
        with pytest.raises(error, match=message):
            renorm(X, **limits)
        with pytest.raises(error, match=message):
            jbn.renorm_limits(**limits)
    with pytest.raises(ValueError, match="plain=-1; expected a number >= 0: a number of updates"):
        jbn.renorm_limits(plain=-1)
    with pytest.raises(TypeError, match="d_steps=None; expected a number >= 0: a number of updates"):
        jbn.renorm_limits(d_steps=None)
    with pytest.raises(TypeError, match="got rmax=3, another library's name; expected r_max"):
        renorm(X, rmax=3)
    with pytest.raises(TypeError, match="got warm_up_steps=7, another library's name; expected plain"):
        jbn.renorm_limits(warm_up_steps=7)
