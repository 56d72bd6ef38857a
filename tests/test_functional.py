import copy
from functools import partial
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from layers import MASKS, layer, random
from numpy.testing import assert_allclose, assert_array_equal

import jbn

TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2, "float64": 1e-13, "complex64": 1e-5}


# The four steps, on paper's numbers.

VECTORS = jnp.array([[0.23, 1.26, -2.41], [0.56, 0.75, 1.00]])


def test_worked_example_gives_0_and_2_with_scale_and_bias_1():
    y, _ = jbn.batch_norm(VECTORS, jbn.Params(jnp.ones(3), jnp.ones(3)), jbn.init(3)[1], train=True)
    assert_allclose(y, [[0, 2, 0], [2, 0, 2]], atol=4e-4)  # up to epsilon over the variance, 1e-5 / 0.027
    exact = 1 + np.array([[-1, 1, -1], [1, -1, 1]]) / np.sqrt(
        1 + 1e-5 / np.array([0.027225, 0.065025, 2.907025])
    )
    assert_allclose(y, exact, atol=2e-6)


def test_scale_and_bias_can_recover_the_identity():
    mean, var, _ = jbn.moments(VECTORS)
    params = jbn.Params(scale=jnp.sqrt(var + 1e-5), bias=mean)
    y, _ = jbn.batch_norm(VECTORS, params, jbn.init(3)[1], train=True)
    assert_allclose(y, VECTORS, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis, mask", [(-1, "no mask"), (-1, "rows"), (1, "weights"), ((1, 3), "rows")])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_training_and_inference_are_those_of_float64(dtype, axis, mask):
    with jax.enable_x64(dtype == "float64"):
        x, rng = random((6, 4, 5, 3), dtype), np.random.RandomState(3)
        mask = {
            "no mask": None,
            "rows": rng.rand(6, 1, 1, 1) < 0.6,
            "weights": rng.rand(6, 4, 5, 3).astype(np.float32),
        }[mask]
        params, running = layer(tuple(x.shape[a] for a in np.atleast_1d(axis)), dtype)
        rule = jbn.ema(0.75)
        step = jax.jit(partial(jbn.batch_norm, axis=axis, update=rule), static_argnames="train")
        y, new = step(x, params, running, train=True, mask=mask)
        assert_allclose(y, reference.batch_norm(x, *params, axis, mask=mask), atol=20 * TOLERANCE[dtype])
        mean, var, _ = reference.moments(x, axis, mask)
        tolerance = TOLERANCE["float32" if dtype == "bfloat16" else dtype]
        assert_allclose(new.mean, 0.25 * mean, rtol=tolerance, atol=tolerance)
        assert_allclose(new.var, 0.75 + 0.25 * var, rtol=tolerance)

        z, same = step(x, params, new, train=False, mask=mask)
        assert_allclose(
            z, reference.normalize(x, new.mean, new.var, *params, axis), atol=20 * TOLERANCE[dtype]
        )
        jax.tree.map(assert_array_equal, same, new)
        assert y.dtype == z.dtype == x.dtype
        assert [leaf.dtype for leaf in new] == [leaf.dtype for leaf in running]


@pytest.mark.parametrize("train", [True, False])
def test_epsilon_is_added_to_the_variance_in_both_modes(train):
    x, (params, running) = random((7, 3), sd=0.5), layer(3)
    y, _ = jbn.batch_norm(x, params, running, train=train, epsilon=0.7)
    mean, var = reference.moments(x)[:2] if train else running[:2]
    assert_allclose(y, reference.normalize(x, mean, var, *params, epsilon=0.7), atol=5e-6)


def test_running_moments_after_k_steps_are_the_geometric_sum():
    decay, x = 0.9, random((5, 16, 3))
    _, running = jbn.init(3)
    for batch in x:
        _, running = jbn.batch_norm(batch, None, running, train=True, update=jbn.ema(decay))
    weights = (1 - decay) * decay ** np.arange(5)[::-1]
    assert_allclose(running.mean, weights @ np.mean(x, 1), rtol=1e-5)
    assert_allclose(running.var, decay**5 + weights @ np.var(x, 1), rtol=1e-5)


@pytest.mark.parametrize("params", [None, jbn.Params(None, None), jbn.Params(jnp.full(3, 2.0), None)])
def test_scale_and_bias_are_optional(params):
    x, running = random((7, 3)), jbn.init(3)[1]
    y, _ = jbn.batch_norm(x, params, running, train=True)
    assert_allclose(y, reference.batch_norm(x) * (2 if params and params.scale is not None else 1), atol=5e-6)


@pytest.mark.parametrize("features, shape", [(3, (3,)), ((3, 2), (3, 2)), ((), ())])
def test_init_makes_the_identity_map_and_empty_moments(features, shape):
    params, running = jbn.init(features, dtype=jnp.bfloat16)
    for leaf, value, dtype in zip(
        (*params, *running), (1, 0, 0, 1, 0), [jnp.bfloat16] * 2 + [jnp.float32] * 3
    ):
        assert_array_equal(leaf, np.full(shape, value))
        assert leaf.dtype == dtype
    assert jbn.init(3, use_scale=False, use_bias=False)[0] == jbn.Params(None, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_dtype_may_be_chosen(dtype):
    x, (params, running) = random((7, 3), "float16"), layer(3)
    assert jbn.normalize(x, running, params, dtype=dtype).dtype == dtype
    for train in (True, False):
        assert jbn.batch_norm(x, params, running, train=train, dtype=dtype)[0].dtype == dtype


def test_low_precision_parameters_and_input_are_computed_in_float32():
    x, (params, running) = random((512, 3), "bfloat16", mean=20.0), layer(3, "bfloat16")
    y, new = jbn.batch_norm(x, params, running, train=True, update=jbn.ema(0.0), dtype=jnp.float32)
    assert_allclose(y, reference.batch_norm(x, *params), atol=2e-5)
    assert_allclose(new.var, reference.moments(x)[1], rtol=1e-5)


def test_wider_moments_and_parameters_widen_the_arithmetic(x64):
    x, (params, running) = random((7, 3)), layer(3, "float64")
    running = running._replace(mean=running.mean + np.pi, var=running.var * np.e)
    y = jbn.normalize(x, running, params, dtype=jnp.float64)
    assert_allclose(y, reference.normalize(x, running.mean, running.var, *params), rtol=1e-13)
    dparams = jax.grad(lambda p: jnp.sum(jnp.sin(jbn.batch_norm(x, p, jbn.init(3)[1], train=True)[0])))(
        params
    )
    assert [leaf.dtype for leaf in dparams] == [jnp.float64] * 2


@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_large_mean_costs_no_accuracy(mean):
    x = random((1024, 8), mean=mean, sd=1.0)
    y, _ = jbn.batch_norm(x, None, jbn.init(8)[1], train=True)
    assert_allclose(y, reference.batch_norm(x), atol=4 * np.spacing(np.float32(1e4)))


# Masks.


@pytest.mark.parametrize("held", [np.nan, np.inf])
@pytest.mark.parametrize("train", [True, False])
def test_uncounted_rows_may_hold_anything_when_the_loss_is_masked_too(train, held):
    x, (params, running), mask = random((7, 3)), layer(3), MASKS["Boolean"]
    poisoned = jnp.where(mask, x, held)

    def loss(x, params):
        y, new = jbn.batch_norm(x, params, running, train=train, mask=mask)
        return jnp.sum(jnp.sin(y), where=mask), (y, new)

    (dx, dparams), (y, new) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    (dx_poisoned, dparams_poisoned), (y_poisoned, new_poisoned) = jax.grad(loss, (0, 1), has_aux=True)(
        poisoned, params
    )
    # The two ways to measure, in one pass and in two, lose some roundings each.
    assert_allclose(dx_poisoned[mask[:, 0]], dx[mask[:, 0]], rtol=1e-5, atol=1e-6)
    assert_array_equal(dx_poisoned[~mask[:, 0]], 0)
    assert_allclose(y_poisoned[mask[:, 0]], y[mask[:, 0]], rtol=1e-5, atol=1e-6)
    assert_allclose(y_poisoned[~mask[:, 0]], jnp.broadcast_to(params.bias, (2, 3)), rtol=1e-5, atol=1e-6)
    for actual, expected in zip(
        jax.tree.leaves((dparams_poisoned, new_poisoned)), jax.tree.leaves((dparams, new))
    ):
        assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_uncounted_rows_are_normalized_from_their_own_x():
    x, (params, running), mask = random((7, 3)), layer(3), MASKS["Boolean"]
    y, _ = jbn.batch_norm(x, params, running, train=True, mask=mask)
    counted = mask[:, 0]
    mean, var, _ = reference.moments(x[counted])
    assert_allclose(y[~counted], reference.normalize(x, mean, var, *params)[~counted], atol=5e-6)


@pytest.mark.parametrize("rule", [jbn.ema(0.9), jbn.pooled(), lambda running, batch: batch])
def test_fully_masked_batch_changes_nothing_and_is_finite(rule):
    x, (params, running), mask = random((7, 3)), layer(3), np.zeros((7, 1), bool)

    def loss(x, params):
        y, new = jbn.batch_norm(x, params, running, train=True, mask=mask, update=rule)
        return jnp.sum(jnp.sin(y), where=mask), (y, new)

    grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    assert np.isfinite(y).all()
    jax.tree.map(assert_array_equal, new, running)
    for leaf in jax.tree.leaves(grads):
        assert_array_equal(leaf, 0)


# State.


@pytest.mark.parametrize("rule", [jbn.ema(0.9), jbn.cumulative(), jbn.pooled(), lambda running, batch: batch])
def test_batch_that_is_not_finite_spares_the_running_moments_feature_by_feature(rule):
    x, (_, running) = random((7, 3)), layer(3)
    _, clean = jbn.batch_norm(x, None, running, train=True, update=rule)
    # NaN; infinity; a finite mean and a variance that overflows.
    for poison in ({2: np.nan}, {2: np.inf}, {2: 1e30, 3: -1e30}):
        poisoned = x
        for row, value in poison.items():
            poisoned = poisoned.at[row, :2].set(value)
        _, new = jbn.batch_norm(poisoned, None, running, train=True, update=rule)
        for leaf, old, wanted in zip(new, running, clean):
            assert_array_equal(leaf, [old[0], old[1], wanted[2]])


def test_running_moments_stay_finite_when_the_new_ones_would_not_be():
    # A variance of 1.6e5 is finite, and too large for a running variance in float16.
    running = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), jbn.init(2)[1])
    x = jnp.array([[-400.0, 1.0], [400.0, 3.0]])
    _, new = jbn.batch_norm(x, None, running, train=True, update=jbn.ema(0.5))
    assert_allclose(new.mean, [0, 1])
    assert_allclose(new.var, [1, 1])
    assert_array_equal(new.count, [0, 1])


def test_count_keeps_its_own_dtype():
    running = jbn.Moments(jnp.zeros(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16), jnp.full(3, 256.0))
    _, new = jbn.batch_norm(random((7, 3)), None, running, train=True)
    assert new.count.dtype == jnp.float32
    assert_array_equal(new.count, 257)


def test_epsilon_may_be_of_any_type_of_number(x64):
    x, (params, running) = random((7, 3)), layer(3)
    for train in True, False:
        y, _ = jbn.batch_norm(x, params, running, train=train, epsilon=np.float64(1e-5))
        at_trace_time = jax.jit(partial(jbn.batch_norm, train=train, epsilon=jnp.float64(1e-5)))
        assert_allclose(at_trace_time(x, params, running)[0], y, rtol=1e-5, atol=1e-6)
        assert y.dtype == jnp.float32


def test_epsilon_that_is_traced_is_named():
    params, running = jbn.init(3)
    call = lambda epsilon: jbn.batch_norm(VECTORS, params, running, train=True, epsilon=epsilon)
    with pytest.raises(TypeError, match="epsilon=.*; expected a number > 0 that is not traced"):
        jax.jit(call)(1e-5)


def test_update_may_be_any_function():
    x, (_, running) = random((7, 3)), layer(3)
    rule = lambda running, batch: batch._replace(var=batch.var + running.var)
    _, new = jbn.batch_norm(x, None, running, train=True, update=rule)
    mean, var, count = reference.moments(x)
    for leaf, wanted in zip(new, (mean, var + 1, count)):
        assert_allclose(leaf, wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scan_over_steps_keeps_the_dtypes_of_the_state(dtype):
    x, running = random((5, 16, 3)), jax.tree.map(lambda leaf: leaf.astype(dtype), jbn.init(3)[1])

    def step(running, batch):
        y, running = jbn.batch_norm(batch, None, running, train=True, update=jbn.ema(0.5))
        return running, y

    new, _ = jax.lax.scan(step, running, x)
    weights = 0.5 * 0.5 ** np.arange(5)[::-1]
    assert_allclose(np.float32(new.mean), weights @ np.mean(x, 1), rtol=2e-2)
    assert [leaf.dtype for leaf in new] == [dtype] * 3


@pytest.mark.parametrize("train", [True, False])
def test_traced_train_flag_is_the_static_one_and_compiles_once(train):
    x, (params, running) = random((7, 3)), layer(3)
    running = running._replace(mean=running.mean + 0.5)
    traces = []

    @jax.jit
    def step(train):
        traces.append(train)
        return jbn.batch_norm(x, params, running, train=train)

    step(not train)
    actual, expected = step(train), jbn.batch_norm(x, params, running, train=train)
    assert len(traces) == 1
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-6, atol=1e-6), actual, expected)


@pytest.mark.parametrize("train", [True, False])
def test_jit_is_eager(train):
    x, (params, running) = random((7, 3)), layer(3)

    def f(x, params, running):
        return jbn.batch_norm(x, params, running, train=train)

    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        jax.jit(f)(x, params, running),
        f(x, params, running),
    )


def test_traced_inference_keeps_what_is_not_finite_to_its_own_sample():
    x, (params, running) = random((7, 3)), layer(3)
    x = x.at[2, 0].set(np.nan).at[3, 1].set(np.inf)
    f = jax.jit(jax.grad(lambda x, train: jnp.sum(jbn.batch_norm(x, params, running, train=train)[0] ** 2)))
    finite = np.isfinite(x)
    expected = jax.grad(lambda x: jnp.sum(jbn.normalize(x, running, params) ** 2))(x)
    assert_allclose(f(x, False)[finite], expected[finite], rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"virtual_batch_size": 3}, {"axis_name": "i", "axis_index_groups": [[0], [1]]}],
    ids=range(3),
)
def test_steps_with_equal_options_trace_once(options):
    traces = []

    @partial(jax.jit, static_argnames="update")
    def step(x, mask, params, running, update):
        traces.append(update)
        f = lambda x, mask: jbn.batch_norm(
            x, params, running, train=True, mask=mask, update=update, **copy.deepcopy(options)
        )
        return jax.vmap(f, axis_name="i")(x, mask)

    x, (params, running) = random((2, 7, 3)), layer(3)
    for i in range(4):
        step(x + i, jnp.arange(14).reshape(2, 7, 1) > i, params, running, update=jbn.ema(0.9))
    assert len(traces) == 1


def test_integer_weights_equal_repeated_rows_in_output_gradient_and_state(x64):
    x, repeats, (params, running) = random((5, 3), "float64"), np.array([2, 0, 1, 3, 1]), layer(3, "float64")

    def weighted(x, params):
        y, new = jbn.batch_norm(x, params, running, train=True, mask=repeats[:, None])
        return jnp.sum(repeats.astype(float)[:, None] * jnp.sin(y) ** 2), (y, new)

    def repeated(x, params):
        y, new = jbn.batch_norm(jnp.repeat(x, repeats, 0), params, running, train=True)
        return jnp.sum(jnp.sin(y) ** 2), (y, new)

    (grads, (y, new)), (grads_repeated, (y_repeated, new_repeated)) = (
        jax.jit(jax.grad(f, (0, 1), has_aux=True))(x, params) for f in (weighted, repeated)
    )
    actual, expected = (jnp.repeat(y, repeats, 0), grads, new), (y_repeated, grads_repeated, new_repeated)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-10, atol=1e-12), actual, expected)


def test_decay_may_come_from_a_schedule_inside_a_compiled_step():
    x, (_, running) = random((3, 8, 3)), layer(3)

    def step(running, batch_and_decay):
        batch, decay = batch_and_decay
        y, running = jbn.batch_norm(batch, None, running, train=True, update=jbn.ema(decay))
        return running, y

    new, _ = jax.lax.scan(step, running, (x, jnp.array([0.0, 0.5, 0.9])))
    mean = np.mean(x, 1)
    assert_allclose(new.mean, 0.9 * (0.5 * mean[0] + 0.5 * mean[1]) + 0.1 * mean[2], rtol=1e-5)


def test_vmap_trains_an_ensemble_in_which_each_member_has_its_own_state():
    x = random((4, 16, 3), seed=7) * jnp.arange(1.0, 5.0)[:, None, None]
    members = jax.vmap(lambda _: layer(3))(jnp.arange(4))
    f = jax.vmap(lambda x, params, running: jbn.batch_norm(x, params, running, train=True))
    y, running = f(x, *members)
    for i in range(4):
        actual, (params, start) = jax.tree.map(itemgetter(i), ((y, running), members))
        expected = jbn.batch_norm(x[i], params, start, train=True)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


# One value per feature is its own mean.


def train(x, **options):
    return jbn.batch_norm(x, None, jbn.init(3)[1], train=True, **options)


def train_in_vmap(shape, **options):
    return jax.vmap(lambda x: train(x, axis_name="i", **options), axis_name="i")(jnp.ones(shape))


ONE_VALUE = {
    "one row": (lambda: train(jnp.ones((1, 3))), r"x of shape \(1, 3\) has one value per feature\. "),
    "one position": (lambda: train(jnp.ones((1, 1, 1, 3))), "every output is the bias"),
    "one example in a vmap": (lambda: train_in_vmap((1, 3)), r"counted over axis_name=\('i',\)\."),
    "a group of one": (
        lambda: train_in_vmap((3, 3), axis_index_groups=[[0, 1], [2]]),
        "counted over .* in the smallest group",
    ),
    "virtual batches of one": (lambda: train(jnp.ones((4, 3)), virtual_batch_size=1), "in 4 virtual batches"),
    "one of the virtual batches": (
        lambda: train(jnp.ones((3, 3)), virtual_batch_size=2),
        "in 2 virtual batches",
    ),
}


@pytest.mark.parametrize("case", ONE_VALUE)
def test_one_value_per_feature_warns_at_trace_time(case):
    call, message = ONE_VALUE[case]
    with pytest.warns(jbn.OneValueWarning, match=message):
        jax.eval_shape(call)


def test_one_value_per_feature_warns_with_a_traced_flag():
    with pytest.warns(jbn.OneValueWarning, match="train=False"):
        jax.eval_shape(lambda flag: jbn.batch_norm(jnp.ones((1, 3)), None, jbn.init(3)[1], train=flag), True)


def test_warning_points_at_the_caller_and_comes_once_a_compilation():
    step = jax.jit(train)
    with pytest.warns(jbn.OneValueWarning, match="one value per feature") as caught:
        train(jnp.ones((1, 3)))
        step(jnp.ones((1, 3)))
        step(jnp.ones((1, 3)))
    assert len(caught) == 2
    assert caught[0].filename == __file__
    values = {"norm": jbn.batch_norm, "x": jnp.ones((1, 3)), "running": jbn.init(3)[1]}
    beside = f"{Path(jbn.__file__).parent}_models/net.py"  # a user's, though its name begins like ours
    with pytest.warns(jbn.OneValueWarning, match="one value per feature") as caught:
        exec(compile("norm(x, None, running, train=True)", beside, "exec"), values)
    assert caught[0].filename == beside


@pytest.mark.parametrize(
    "call",
    [
        lambda: train(jnp.ones((1, 5, 3))),
        lambda: train(jnp.ones((2, 3))),
        lambda: train(jnp.ones((0, 3))),
        lambda: train(jnp.ones((4, 3)), virtual_batch_size=2),
        lambda: train_in_vmap((2, 3)),
        lambda: jbn.batch_norm(jnp.ones((1, 3)), None, jbn.init(3)[1], train=False),
        lambda: jbn.moments(jnp.ones((1, 3))),
    ],
    ids=range(7),
)
def test_more_values_or_inference_do_not_warn(call):
    jax.eval_shape(call)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (dict(x=np.ones((4, 3), int)), TypeError, "x has dtype int"),
        (dict(axis=5), ValueError, "axis=5 is out of range"),
        (dict(axis=(0, 0)), ValueError, r"axis=\(0, 0\) names a feature axis twice"),
        (
            dict(axis=0),
            ValueError,
            r"has shape \(3,\), but x of shape \(4, 3\) has features of shape \(4,\) on axis",
        ),
        (
            dict(x=np.ones((4, 5), np.float32)),
            ValueError,
            r"running.mean has shape \(3,\).*features of shape \(5,\)",
        ),
        (dict(params=jbn.init(2)[0]), ValueError, r"params.scale has shape \(2,\).*jbn.init"),
        (dict(params=(1.0, 2.0)), TypeError, "params is a tuple; wanted jbn.Params"),
        (dict(running=jbn.init(3)[0]), TypeError, "running is a Params; wanted jbn.Moments"),
        (
            dict(dtype=np.int32),
            TypeError,
            "dtype=int32 cannot hold the result for x of dtype float32; wanted inexact",
        ),
        (
            dict(mask=np.full((4, 1), np.inf)),
            ValueError,
            "mask holds a weight that is negative or not finite",
        ),
        (dict(update=0.9), TypeError, "update=0.9; wanted a rule, such as jbn.ema"),
        (dict(update=jbn.ema), TypeError, "wanted a rule, such as jbn.ema"),
        (dict(update=lambda running, batch: None), TypeError, "returned a NoneType; wanted jbn.Moments"),
        (
            dict(update=lambda running, batch: batch._replace(mean=batch.mean[None])),
            ValueError,
            r"returned leaves of shapes \[\(1, 3\), .*wanted \(3,\)",
        ),
        (dict(train=None), TypeError, "train=None; wanted True, False, or a traced Boolean scalar"),
        (dict(exact=None), TypeError, "exact=None; expected True or False"),
        (
            dict(exact=jnp.array(True)),
            TypeError,
            "exact=Array.*; expected True or False. .* a static argument",
        ),
        (dict(train=np.array([True, False, True])), TypeError, "train=array.*Boolean scalar"),
        (dict(train="no"), TypeError, "train='no'; wanted True"),
        (dict(epsilon=0.0), ValueError, "epsilon=0.0; expected a number > 0"),
        (dict(epsilon=None), TypeError, "epsilon=None; expected a number > 0"),
        (dict(mask=np.ones(7)), ValueError, r"mask of shape \(7,\) does not broadcast"),
        (dict(mask=-np.ones((4, 1))), ValueError, "mask holds a weight that is negative"),
        (
            dict(x=np.ones((4, 3), np.complex64)),
            ValueError,
            "running.mean has dtype float32, but x is complex",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    params, running = jbn.init(3)
    arguments = {
        "x": np.ones((4, 3), np.float32),
        "params": params,
        "running": running,
        "train": True,
        **call,
    }
    with pytest.raises(error, match=message):
        jbn.batch_norm(**arguments)


def test_normalize_names_bad_input_too():
    with pytest.raises(ValueError, match=r"moments.mean has shape \(2,\)"):
        jbn.normalize(jnp.ones((4, 3)), jbn.init(2)[1])
    with pytest.raises(ValueError, match="epsilon=-1"):
        jbn.normalize(jnp.ones((4, 3)), jbn.init(3)[1], epsilon=-1)
