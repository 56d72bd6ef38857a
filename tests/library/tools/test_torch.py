"""Weights from PyTorch give Flax's layers the outputs that PyTorch's layers have by definition."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen
from jbn.linen import load_torch as load

RNG = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def _standard_promotion(standard_promotion):
    yield


def draw(*shape):
    return RNG.normal(0, 1, shape).astype(np.float32)


def convolved(x, weight, bias, groups):
    """Compute y[o, p] = bias[o] + sum_ik weight[o, i, k] x[i, p + k], channels first, group by group."""
    size = weight.shape[2:]
    parts = []
    for inputs, kernel in zip(np.split(x, groups, 1), np.split(weight, groups)):
        windows = sliding_window_view(inputs, size, tuple(range(2, x.ndim)))
        windows = windows.reshape(*windows.shape[: x.ndim], -1)
        parts.append(np.einsum("ni...k,oik->no...", windows, kernel.reshape(*kernel.shape[:2], -1)))
    return np.concatenate(parts, 1) + bias.reshape(-1, *[1] * len(size))


def test_convolutions_of_every_dimension_and_grouping_compute_what_pytorchs_do():
    for size, channels, filters, groups in (
        ((3,), 2, 5, 1),
        ((3, 2), 2, 5, 1),
        ((3, 2, 4), 2, 5, 1),
        ((3, 2), 4, 6, 2),
        ((3, 2), 4, 8, 4),  # depthwise, with two filters a channel
    ):
        layer = nn.Conv(filters, size, padding="VALID", feature_group_count=groups)
        x = draw(2, channels, *(7, 6, 5)[: len(size)])
        state = {"c.weight": draw(filters, channels // groups, *size), "c.bias": draw(filters)}
        last = np.moveaxis(x, 1, -1)
        variables = jax.eval_shape(layer.init, jax.random.key(0), last)
        y = layer.apply(load(variables, state, {"": "c"}), last)
        expected = convolved(x, state["c.weight"], state["c.bias"], groups)
        assert_allclose(np.moveaxis(y, -1, 1), expected, rtol=0, atol=1e-5, err_msg=f"{size} {groups}")


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="linear")(x)
        return jbn.linen.BatchNorm(use_running_average=True, update=jbn.ema(0.9, debias=True), name="norm")(x)


NAMES = {"linear": "0", "norm": "body.1"}
STATE = {
    "0.weight": draw(3, 2),
    "0.bias": draw(3),
    "body.1.weight": draw(3),
    "body.1.bias": draw(3),
    "body.1.running_mean": draw(3),
    "body.1.running_var": draw(3) ** 2,
    "body.1.num_batches_tracked": np.array(7),
}
VARIABLES = jax.eval_shape(Pair().init, jax.random.key(0), np.zeros((1, 2), np.float32))


def test_linear_layers_and_norms_compute_what_pytorchs_do_and_their_moments_are_complete():
    x = draw(5, 2)
    variables = load(VARIABLES, STATE, NAMES)
    weight, bias, scale, shift, mean, var, _ = STATE.values()
    expected = (x @ weight.T + bias - mean) / np.sqrt(var + 1e-5) * scale + shift
    assert_allclose(Pair().apply(variables, x), expected, rtol=0, atol=1e-5)
    assert_array_equal(variables["batch_stats"]["norm"]["count"], np.ones(3))
    # A schedule of renorm starts anew.
    stats = {"norm": VARIABLES["batch_stats"]["norm"] | {"num_updates": np.int32(5)}}
    variables = load(VARIABLES | {"batch_stats": stats}, STATE, NAMES)
    assert int(variables["batch_stats"]["norm"]["num_updates"]) == 0
    # Prefixes may be empty, and a variable that both call alike is found by its own name.
    assert load({"params": {"cls": np.zeros(2)}}, {"cls": np.ones(2)}, {"": ""})["params"]["cls"].sum() == 2


def test_attention_takes_linear_layers_as_the_documentation_shapes_them():
    like = {
        "query": {"kernel": np.zeros((4, 2, 2)), "bias": np.zeros((2, 2))},
        "out": {"kernel": np.zeros((2, 2, 4))},
    }
    weights = {"q": draw(4, 4), "o": draw(4, 4)}
    state = {
        "q.weight": weights["q"].T.reshape(4, 2, 2).T,
        "q.bias": np.arange(4.0).reshape(2, 2),
        "o.weight": weights["o"].T.reshape(2, 2, 4).T,
    }
    loaded, x = load({"params": like}, state, {"query": "q", "out": "o"})["params"], draw(3, 4)
    y = x @ weights["q"].T + np.arange(4.0)
    heads = np.einsum("ni,ihd->nhd", x, loaded["query"]["kernel"]) + loaded["query"]["bias"]
    assert_allclose(heads.reshape(3, 4), y, rtol=0, atol=1e-5)
    out = np.einsum("nhd,hdo->no", heads, loaded["out"]["kernel"])
    assert_allclose(out, y @ weights["o"].T, rtol=0, atol=1e-5)


def test_variables_keep_their_dtypes_whatever_the_weights_have():
    class Tensor:
        """A tensor of bfloat16, as PyTorch has them."""

        def __init__(self, value):
            self.value = jnp.asarray(value, jnp.bfloat16)

        def __array__(self, dtype=None, copy=None):
            raise TypeError("Got unsupported ScalarType BFloat16")

        def __dlpack__(self, **options):
            return self.value.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.value.__dlpack_device__()

    rounded = {key: np.asarray(jnp.asarray(value, jnp.bfloat16), np.float32) for key, value in STATE.items()}
    shapes = jax.tree.map(lambda leaf: leaf.shape, VARIABLES)
    for ours in (jnp.float32, jnp.bfloat16):
        like = jax.tree.map(
            partial(np.zeros, dtype=ours), shapes, is_leaf=lambda shape: isinstance(shape, tuple)
        )
        for theirs in (np.float64, np.float16, jnp.bfloat16, Tensor):
            state = {
                key: Tensor(value) if theirs is Tensor else value.astype(theirs)
                for key, value in rounded.items()
            }
            loaded = load(like, state, NAMES)
            assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(ours)}
            kernel = np.asarray(loaded["params"]["linear"]["kernel"], np.float32)
            assert_allclose(kernel, rounded["0.weight"].T, rtol=1e-3 if theirs is np.float16 else 0)


def whole(faults):
    return f"^{re.escape(chr(10).join(faults))}$"


def test_all_faults_are_in_one_message_with_keys_and_shapes_of_both_sides():
    changed = {
        "0.weight": draw(3, 4),
        "body.1.weight": np.array([1, np.nan, 1]),
        "body.1.bias": np.array([1, 2, 3]),
        "body.1.running_var": np.array([1, -1.0, 1]),
        "fc.bias": draw(9),
    }
    state = {key: value for key, value in STATE.items() if key != "body.1.running_mean"} | changed
    faults = (
        "body.1.running_mean: expected (3,) for norm/mean (3,), got no such key",
        "body.1.running_var: expected finite float32 >= 0, got other values",
        "0.weight: expected (3, 2) for linear/kernel (2, 3), got (3, 4)",
        "body.1.bias: expected floating-point numbers on both sides, got int64 for norm/bias",
        "body.1.weight: expected finite float32, got other values",
        "fc.bias: expected no such key, got one of shape (9,)",
        "head: expected a module with variables, got none",
    )
    with pytest.raises(ValueError, match=whole(faults)):
        load(VARIABLES, state, NAMES | {"head": "fc"})
    with pytest.raises(
        ValueError, match=re.escape("norm/bias (3,): expected PyTorch's name of 'norm', got none")
    ):
        load(VARIABLES, STATE, {"linear": "0"})
    with pytest.raises(ValueError, match="0.bias: expected one use, got linear/bias and norm/bias"):
        load(VARIABLES, STATE, {"linear": "0", "norm": "0"})


def test_faults_say_what_to_do_about_other_names_and_kernels():
    like = {
        "params": {
            "up": {"kernel": np.zeros((4, 2, 3))},
            "ConvTranspose_0": {"kernel": np.zeros((4, 3, 3))},
            "mixed": {"kernel": np.zeros((3, 3)), "bias": np.zeros(3)},
        }
    }
    state = {"a.weight": draw(2, 3, 4), "b.weight": draw(3, 3, 4), "c.bias": draw(3)}
    state |= {"c.weight_g": draw(3, 1), "c.weight_v": draw(3, 3), "d.weight": draw(3)}
    names = {"up": "a", "ConvTranspose_0": "b.", "mixed": "c"}
    faults = (
        "ConvTranspose_0: expected transposed=('ConvTranspose_0',), or transposed=() if it has "
        "transpose_kernel=True, got neither, and as many features before as after",
        "c.weight: expected (3, 3) for mixed/kernel (3, 3), got c.weight_g, c.weight_v: remove its "
        "parametrization in PyTorch",
        "a.weight: expected (3, 2, 4) for up/kernel (4, 2, 3), got (2, 3, 4), the shape of a "
        "transposed one: pass transposed=('up',)",
        "d.weight: expected no such key, got one of shape (3,)",
    )
    with pytest.raises(ValueError, match=whole(faults)):
        load(like, state, names)
    state = {"a.weight": state["a.weight"], "b.weight": state["b.weight"], "c.bias": state["c.bias"]}
    state |= {"c.parametrizations.weight.original0": draw(3, 1)}
    faults = (
        "c.weight: expected (3, 3) for mixed/kernel (3, 3), got c.parametrizations.weight.original0: remove "
        "its parametrization in PyTorch",
        "transposed: expected modules with variables, got 'up2'",
    )
    with pytest.raises(ValueError, match=whole(faults)):
        load(like, state, names, transposed=("up", "up2", "ConvTranspose_0"))
    with pytest.raises(ValueError, match=r"^a.weight: expected \(2, 3, 4\) .*, got \(3, 3, 4\)$"):
        load(
            {"params": {"up": like["params"]["up"]}},
            {"a.weight": draw(3, 3, 4)},
            {"up": "a"},
            transposed="up",
        )
    # A shape that can be of one order only needs no word, and `()` is one.
    square = {"params": {"ConvTranspose_0": {"kernel": np.zeros((4, 3, 3))}}}
    load(square, {"a.weight": draw(3, 3, 4)}, {"ConvTranspose_0": "a"}, transposed=())
    state = {"a.weight": draw(2, 3, 4)}
    load({"params": {"ConvTranspose_0": {"kernel": np.zeros((4, 3, 2))}}}, state, {"ConvTranspose_0": "a"})
    # Also where all keys have more in common, and where not all have the prefix.
    like, state = {"params": {"kernel": np.zeros((3, 3))}}, {"fc.weight": draw(3, 3)}
    for given, names, message in (
        ({"module.fc.weight": draw(3, 3)}, "fc", "keys begin with 'module.', and names do not"),
        ({"epoch": draw(1), "a.b.fc.weight": draw(3, 3)}, "fc", "keys begin with 'a.b.', and names do not"),
        (state, "module.fc", "names begin with 'module.', and keys do not"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}: expected both alike\n"):
            load(like, given, {"": names})
    for wrong, message in (
        (None, "names: expected a mapping of paths to PyTorch's names, got a NoneType"),
        ({"": [0]}, r"names\[''\]: expected PyTorch's name, or a list of names, got \[0\]"),
    ):
        with pytest.raises(TypeError, match=message):
            load(like, state, wrong)
    with pytest.raises(
        ValueError, match="fc.weight: expected floating-point numbers .* got int64 for kernel"
    ):
        load({"params": {"kernel": np.zeros((3, 3), np.int64)}}, state, {"": "fc"})
    with pytest.raises(
        ValueError, match="^variables: expected what init returns, .* got a tree of linear, norm"
    ):
        load(VARIABLES["params"], STATE, NAMES)


def test_boxes_and_layers_that_are_stacked_by_scan_are_filled():
    layer = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.zeros, (None, "model")))
    boxed = jax.eval_shape(layer.init, jax.random.key(0), np.zeros((1, 2), np.float32))
    last = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    placed = {"params": {"cls": jax.device_put(np.zeros(2), last)}}
    assert load(placed, {"cls": np.ones(2)}, {"": ""})["params"]["cls"].sharding == last
    loaded = load(boxed, {"weight": STATE["0.weight"], "bias": STATE["0.bias"]}, {"": ""})["params"]
    assert isinstance(loaded["kernel"], nn.Partitioned) and loaded["kernel"].names == (None, "model")
    assert_array_equal(loaded["kernel"].value, STATE["0.weight"].T)

    stacked = {"params": {"blocks": {"kernel": np.zeros((2, 2, 3)), "bias": np.zeros((2, 3))}}}
    state = {
        f"{i}.{leaf}": draw(*shape) for i in (0, 1) for leaf, shape in (("weight", (3, 2)), ("bias", (3,)))
    }
    loaded = load(stacked, state, {"blocks": ["0", "1"]})["params"]["blocks"]
    assert_array_equal(loaded["kernel"], np.stack([state["0.weight"].T, state["1.weight"].T]))
    assert_array_equal(loaded["bias"], np.stack([state["0.bias"], state["1.bias"]]))
    with pytest.raises(
        ValueError, match=r"blocks/kernel \(2, 2, 3\): expected as many names as its first axis"
    ):
        load(stacked, state, {"blocks": ["0", "1", "1"]})
