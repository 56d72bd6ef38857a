"""Bad input is named as the user wrote it, with what was expected, by every function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import jbn
from jbn._checks import as_samples, as_weights

X = np.ones((4, 3), np.float32)
PARAMS, RUNNING = jbn.init(3)
ELSEWHERE = jbn.init(2)
COMPLEX = X.astype(np.complex64)


def named(error, message, call, *args, **kwargs):
    """Checks while tracing, where nothing has to be computed."""
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: call(*args, **kwargs))


def test_bad_input_of_moments_is_named():
    for error, message, options in (
        (ValueError, r"axis=2 is out of range for x with 2 dim.*-2 to 1", dict(axis=2)),
        (ValueError, r"axis=\(1, -1\) names a feature axis twice", dict(axis=(1, -1))),
        (TypeError, "axis=0.5; .* an integer", dict(axis=0.5)),
        (TypeError, r"x has dtype int32; .* a floating.*astype", dict(x=X.astype(np.int32))),
        (ValueError, r"mask of shape \(4,\) does not broadcast to x", dict(mask=X[:, 0])),
        (ValueError, r"mask of shape \(1, 4, 3\) does not", dict(mask=X[None])),
        (ValueError, "mask holds a weight that is negative", dict(mask=-X)),
        (ValueError, "mask holds a weight .* not finite", dict(mask=X[:, :1] * np.nan)),
        (TypeError, "mask has dtype complex64", dict(mask=COMPLEX)),
    ):
        named(error, message, jbn.moments, **({"x": X} | options))


def test_bad_input_of_merge_is_named():
    named(ValueError, "merge got no moments", jbn.merge)
    named(TypeError, "merge got a list; .* jbn.Moments", jbn.merge, [RUNNING])
    named(ValueError, r"merge got a mean of shape \(2,\); expected \(3,\)", jbn.merge, RUNNING, ELSEWHERE[1])
    for field, shape in (("var", (2,)), ("var", ()), ("count", (2,)), ("count", (1, 3))):
        other = RUNNING._replace(**{field: np.ones(shape, np.float32)})
        named(ValueError, rf"merge got a {field} of shape .*; expected \(3,\)", jbn.merge, RUNNING, other)


def test_bad_input_of_batch_norm_is_named():
    shape = lambda running, batch: batch._replace(mean=batch.mean[None])
    for error, message, options in (
        (TypeError, "x has dtype int", dict(x=X.astype(np.int32))),
        (ValueError, "axis=5 is out of range", dict(axis=5)),
        (ValueError, r"axis=\(0, 0\) names a feature axis twice", dict(axis=(0, 0))),
        (ValueError, r"has shape \(3,\); expected \(4,\), .* x of shape \(4, 3\) on axis 0:", dict(axis=0)),
        (ValueError, r"running.mean has shape \(3,\); expected \(5,\)", dict(x=np.ones((4, 5)))),
        (ValueError, r"params.scale has shape \(2,\).*jbn.init", dict(params=ELSEWHERE[0])),
        (TypeError, "running.var is None; expected an array", dict(running=RUNNING._replace(var=None))),
        (TypeError, "params is a tuple; .* jbn.Params", dict(params=(1.0, 2.0))),
        (TypeError, "running is a Params; .* jbn.Moments", dict(running=PARAMS)),
        (
            TypeError,
            "dtype=int32 cannot hold the result for x of .* float32; expected a floating point",
            dict(dtype="int32"),
        ),
        (ValueError, "running.mean has dtype float32, but x is complex", dict(x=COMPLEX)),
        (ValueError, "mask holds a weight that is negative or not finite", dict(mask=X * np.inf)),
        (ValueError, "mask holds a weight that is negative", dict(mask=-X)),
        (ValueError, r"mask of shape \(7,\) does not broadcast", dict(mask=np.ones(7))),
        (TypeError, "update=0.9; .* a rule, such as jbn.ema", dict(update=0.9)),
        (TypeError, "update=.* a rule, such as jbn.ema", dict(update=jbn.ema)),
        (TypeError, "returned a NoneType; .* jbn.Moments", dict(update=lambda running, batch: None)),
        (ValueError, r"returned leaves of shapes \[\(1, 3\), .* \(3,\)", dict(update=shape)),
        (TypeError, "train=None; .* True, False, or a traced Boolean scalar", dict(train=None)),
        (TypeError, "train=array.*Boolean scalar", dict(train=np.array([True, False]))),
        (TypeError, "train='no'; .* True", dict(train="no")),
        (TypeError, "train=1; .* True", dict(train=1)),
        (TypeError, "exact=None; expected True or False", dict(exact=None)),
        (TypeError, "exact=.*; expected True or False. .* a static argument", dict(exact=np.array(True))),
        (ValueError, "epsilon=0.0; expected a number from 1.17.* to 3.4", dict(epsilon=0.0)),
        (TypeError, "epsilon=None; expected a number > 0", dict(epsilon=None)),
        (TypeError, "epsilon='1e-5'; expected a number > 0", dict(epsilon="1e-5")),
        (ValueError, "virtual_batch_size=0; .* a number of examples >= 1", dict(virtual_batch_size=0)),
        (ValueError, "virtual_batch_size=-2; .* a number", dict(virtual_batch_size=-2, train=False)),
        (TypeError, "virtual_batch_size=2.5; .* an integer", dict(virtual_batch_size=2.5)),
        (TypeError, "virtual_batch_size=2.5; .* an integer", dict(virtual_batch_size=2.5, train=False)),
    ):
        given = {"x": X, "params": PARAMS, "running": RUNNING, "train": True} | options
        named(error, message, jbn.batch_norm, **given)


def test_x_without_a_batch_axis_to_split_is_named():
    f = lambda x: jbn.batch_norm(x, None, RUNNING, train=True, axis_name="i", virtual_batch_size=2)[0]
    named(ValueError, r"needs a batch axis to split, but x of shape \(3,\)", jax.vmap(f, axis_name="i"), X)


def test_bad_input_of_normalize_is_named():
    named(ValueError, r"moments.mean has shape \(2,\)", jbn.normalize, X, ELSEWHERE[1])
    named(ValueError, "epsilon=-1", jbn.normalize, X, RUNNING, epsilon=-1)


def test_decay_is_one_number_in_the_unit_interval():
    named(TypeError, "decay=None; expected a number", jbn.ema, None)
    named(TypeError, "decay='0.9'; expected a number", jbn.ema, "0.9")
    named(ValueError, r"decay has shape \(3,\); expected one number", jbn.ema, np.ones(3))
    for decay in -0.1, 1.1, float("nan"):
        named(ValueError, r"decay=.* is outside \[0, 1\].*PyTorch", jbn.ema, decay)


def test_a_new_layer_has_a_number_of_features_and_a_dtype_that_can_be_learnt():
    for features in 3.5, "3", None, (2, "a"):
        named(TypeError, "features=.*; expected the number of features", jbn.init, features)
    for features in -1, (2, -3):
        named(ValueError, "features=.*; expected >= 0", jbn.init, features)
    for dtype in int, "int8", bool:
        named(TypeError, "dtype=.*; expected a floating point or complex", jbn.init, 3, dtype=dtype)
    named(TypeError, "dtype='float99'; expected a dtype", jbn.init, 3, dtype="float99")
    named(TypeError, "dtype='float99'; expected a dtype", jbn.normalize, X, RUNNING, dtype="float99")


def test_samples_may_be_any_array_of_floating_point():
    for x in np.ones(2, np.float32), 1.5, jnp.ones(2, jnp.bfloat16):
        assert_array_equal(as_samples(x), x)


def test_weights_line_up_with_the_samples_from_the_right():
    x = jnp.zeros((4, 2, 3))
    for shape, lined_up in ((), (1, 1, 1)), ((3,), (1, 1, 3)), ((4, 1, 1), (4, 1, 1)), ((2, 1), (1, 2, 1)):
        assert as_weights(np.ones(shape), x).shape == lined_up


def test_weights_that_jit_hides_are_not_looked_at():
    x = jnp.zeros((4, 2, 3))
    assert_array_equal(jax.jit(lambda mask: as_weights(mask, x))(-jnp.ones(3)), -np.ones((1, 1, 3)))
    named(ValueError, "mask holds a weight that is negative", as_weights, -np.ones(3), x)
