import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jbn.linen
import jbn.nnx
from jbn import inspection

# The shift of gradients.

X, Y = (np.random.RandomState(seed).normal(size=(6, 2)) for seed in (0, 1))


def linear_layers(seed, dtype="float32"):
    rng = np.random.RandomState(seed)
    return tuple(np.asarray(rng.normal(size=shape), dtype) for shape in [(2, 3), (3, 4), (4, 2)])


def squared_error(layers):
    y = functools.reduce(jnp.matmul, layers, X.astype(layers[0].dtype))
    return jnp.sum((y - Y.astype(y.dtype)) ** 2) / 2


def gradients_by_hand(layers):
    first, second, third = map(np.float64, layers)
    error = X @ first @ second @ third - Y
    return [
        X.T @ error @ third.T @ second.T,
        (X @ first).T @ error @ third.T,
        (X @ first @ second).T @ error,
    ]


def shift_by_hand(before, after):
    pairs = [
        (gradients_by_hand(before)[i], gradients_by_hand((*after[:i], *before[i:]))[i])
        for i in range(len(before))
    ]
    return (
        [np.linalg.norm(a - b) for a, b in pairs],
        [np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs],
    )


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_shift_of_a_linear_network_is_that_by_hand(dtype):
    with jax.enable_x64(dtype == "float64"):
        before, after = linear_layers(2, dtype), linear_layers(3, dtype)
        measure = jax.jit(functools.partial(inspection.gradient_shift, squared_error))
        shift, (distance, cosine) = measure(before, after), shift_by_hand(before, after)
        rtol = 1e-12 if dtype == "float64" else 1e-5
        assert_allclose(shift.distance, distance, rtol=rtol)
        assert_allclose(shift.cosine, cosine, rtol=rtol, atol=rtol)
        assert (shift.distance[0], shift.cosine[0]) == (0, 1)
        assert shift.distance.dtype == shift.cosine.dtype == dtype


def scaled_shift(scale, before, after):
    return inspection.gradient_shift(lambda layers: scale * squared_error(layers), before, after)


def test_a_layer_that_moves_shifts_only_the_layers_after_it():
    # Many at once, in a vmap: gradients of any size, whatever layer moves.
    cases = [(seed, moved, scale) for seed in range(5) for moved in range(3) for scale in (1e-25, 1.0, 1e25)]
    before = [linear_layers(seed) for seed, _, _ in cases]
    after = [
        tuple(layer + np.float32(i == moved) for i, layer in enumerate(layers))
        for layers, (_, moved, _) in zip(before, cases)
    ]
    scales = np.float32([scale for *_, scale in cases])
    stack = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    shifts = jax.jit(jax.vmap(scaled_shift))(scales, stack(before), stack(after))
    for case, old, new, distance, cosine in zip(cases, before, after, *map(np.asarray, shifts)):
        _, moved, scale = case
        assert_array_equal(distance[: moved + 1], 0, err_msg=case)
        assert_array_equal(cosine[: moved + 1], 1, err_msg=case)
        assert np.all(distance[moved + 1 :] > 0), case
        assert np.all(np.abs(cosine) <= 1), case
        expected_distance, expected_cosine = shift_by_hand(old, new)
        assert_allclose(distance / scale, expected_distance, rtol=1e-3, err_msg=case)
        assert_allclose(cosine, expected_cosine, rtol=1e-3, atol=1e-3, err_msg=case)


def test_the_last_layer_to_move_is_without_effect_on_every_layer():
    before, measure = linear_layers(2), jax.jit(functools.partial(scaled_shift, 1.0))
    a = measure(before, linear_layers(3))
    b = measure(before, (*linear_layers(3)[:2], before[2] * np.float32(np.nan)))
    assert_array_equal(a, b)


def test_cosine_is_one_where_nothing_changed_and_zero_where_one_gradient_is_zero():
    measure = jax.jit(
        lambda before, after: inspection.gradient_shift(lambda ls: ls[0] * ls[1], before, after)
    )
    for first, second, cosine in (0.0, 0.0, 1), (2.0, 0.0, 0), (0.0, 2.0, 0), (2.0, 4.0, 1), (2.0, -1.0, -1):
        shift = measure((first, 3.0), (second, 5.0))
        assert_array_equal(shift.distance, [0, abs(first - second)])
        assert_array_equal(shift.cosine, [1, cosine], err_msg=(first, second))


def test_nan_in_one_layer_stays_with_the_gradients_that_have_it():
    loss = lambda layers: layers[0] ** 2 + layers[1] ** 2 + layers[1] * layers[2]
    measure = jax.jit(functools.partial(inspection.gradient_shift, loss))
    shift = measure((1.0, 2.0, 3.0), (4.0, np.nan, 5.0))
    assert_array_equal(shift.distance, [0, 0, np.nan])
    assert_array_equal(shift.cosine, [1, 1, np.nan])


@pytest.mark.slow
def test_the_program_holds_the_loss_once_however_many_layers():
    for depth in 1, 20:
        layers = [np.ones(3, np.float32)] * depth
        shift = lambda layers: inspection.gradient_shift(
            lambda layers: jnp.sum(jnp.sinh(sum(layers))), layers, layers
        )
        assert str(jax.make_jaxpr(shift)(layers)).count("sinh") == 1


def test_layers_may_be_any_pytrees_of_any_dtypes():
    ones = np.ones(2, np.float32)
    before = [{"kernel": np.ones((2, 2), jnp.bfloat16), "bias": ones}, ones]
    after = jax.tree.map(lambda leaf: leaf + leaf, before)

    def loss(layers):
        inner, outer = layers
        return jnp.sum((jnp.sum(inner["kernel"].astype(jnp.float32), 0) + inner["bias"]) * outer)

    shift = jax.jit(functools.partial(inspection.gradient_shift, loss))(before, after)
    assert_allclose(shift.distance, [0, 3 * np.sqrt(2)], rtol=1e-6)
    assert shift.distance.dtype == jnp.float32


# The split into layers.


class Linen(nn.Module):
    norm: type = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        for width in range(4, 15):
            x = nn.Dense(width)(x)
            x = nn.relu(self.norm(use_running_average=False)(x))
        return nn.Dense(2)(x)


LINEN_NAMES = tuple(f"Dense_{i}/kernel" for i in range(12))
INPUTS = jnp.asarray(X, jnp.float32)


@functools.cache
def linen(norm=jbn.linen.BatchNorm):
    """Returns the network as a function of its parameters, and these: which hold 0, to be traced only."""
    model = Linen(norm)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), INPUTS))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def apply(params):
        return model.apply(variables | {"params": params}, INPUTS, mutable=["batch_stats"])

    return apply, variables["params"]


def half(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


WRAPPERS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "jit in jit": lambda f: jax.jit(lambda params: jax.jit(f)(params)),
    "checkpoint": jax.checkpoint,
    "converted before": lambda f: lambda params: f(half(params)),
    "converted in a jit before": lambda f: lambda params: jax.jit(f)(jax.jit(half)(params)),
    "value and gradient": lambda f: jax.value_and_grad(lambda params: jnp.sum(f(params)[0])),
    "one branch of cond": lambda f: lambda params: jax.lax.cond(jnp.sum(INPUTS) > 0, f, f, params),
    "scan": lambda f: lambda params: jax.lax.scan(lambda p, _: (p, f(p)), params, None, 2),
    "while loop": lambda f: (
        lambda params: jax.lax.while_loop(
            lambda state: state[0] < 1,
            lambda state: (state[0] + jnp.sum(f(params)[0]), state[1]),
            (0.0, params),
        )
    ),
    "vmap": lambda f: lambda params: jax.vmap(lambda _: f(params))(jnp.arange(2)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("norm", [jbn.linen.BatchNorm, nn.BatchNorm])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_layers_of_a_linen_network_are_in_the_order_of_the_network(norm, wrapper):
    apply, params = linen(norm)
    layers = inspection.split_layers(WRAPPERS[wrapper](apply), params)
    assert layers.names == LINEN_NAMES
    split = layers.split(params)
    assert [len(layer) for layer in split] == [4] * 11 + [2]
    for i, (kernel, *rest) in enumerate(split):
        assert kernel is params[f"Dense_{i}"]["kernel"]
        assert rest[0] is params[f"Dense_{i}"]["bias"]
        assert all(leaf.shape == kernel.shape[1:] for leaf in rest)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.z_first = nnx.Linear(2, 8, rngs=rngs)
        self.a_norm = jbn.nnx.BatchNorm(8, rngs=rngs)
        self.a_last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.a_last(nnx.relu(self.a_norm(self.z_first(x))))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_layers_of_an_nnx_network_are_split_joined_and_measured():
    graphdef, params, rest = nnx.split(NNX(nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    def apply(params):
        return nnx.merge(graphdef, params, rest, copy=True)(INPUTS)

    layers = inspection.split_layers(apply, params)
    assert [name.split("/")[:2] for name in layers.names] == [["z_first", "kernel"], ["a_last", "kernel"]]
    assert [len(layer) for layer in layers.split(params)] == [4, 2]
    joined = layers.join(layers.split(params))
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params)))

    loss = lambda layers_: jnp.mean((apply(layers.join(layers_)) - 1) ** 2)
    after = jax.tree.map(lambda leaf: leaf + 0.1, params)
    shift = jax.jit(functools.partial(inspection.gradient_shift, loss))(
        layers.split(params), layers.split(after)
    )
    assert shift.distance[0] == 0 and shift.distance[1] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_layers_work_inside_jit_as_static_and_on_gradients():
    apply, params = linen()
    layers = inspection.split_layers(apply, jax.eval_shape(lambda: params))
    split = jax.jit(lambda layers, params: layers.split(params), static_argnums=0)
    again = inspection.split_layers(jax.jit(apply), params)
    assert layers == again and hash(layers) == hash(again)
    assert_array_equal(split(layers, params)[0][0], params["Dense_0"]["kernel"])
    gradients = jax.eval_shape(jax.grad(lambda params: jnp.sum(apply(params)[0] ** 2)), params)
    assert layers.split(gradients)[-1][0] is gradients["Dense_11"]["kernel"]


def test_leaves_before_the_first_kernel_join_the_first_layer_and_unused_ones_go_last():
    params = {"a_unused": jnp.ones(2), "b_unused": jnp.ones((1, 1)), "kernel": jnp.ones((2, 2))}
    params |= {"shift": jnp.ones(2), "tail": jnp.ones((2, 1))}
    apply = lambda p: ((INPUTS + p["shift"][None]) @ p["kernel"]) @ p["tail"]
    layers = inspection.split_layers(apply, params)
    assert layers.names == ("kernel", "tail", "b_unused")
    assert layers.split({name: name for name in params}) == (
        ("shift", "kernel"),
        ("tail", "a_unused"),
        ("b_unused",),
    )


def test_without_a_kernel_there_is_one_layer():
    layers = inspection.split_layers(lambda p: p[1] * (INPUTS[:, 0] + p[0]), [jnp.ones(6), jnp.ones(6)])
    assert layers.names == ("0",)
    assert layers.split([1, 2]) == ((1, 2),)


def test_use_is_where_a_leaf_meets_data_and_not_where_it_is_made_ready():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((2, 3))}

    def apply(params):
        ready = {name: jnp.maximum(w - jnp.mean(w, 0, keepdims=True), 0.0) for name, w in params.items()}
        return ready["a"] @ (ready["b"].T @ jnp.ones((2, 1)))  # data, made of a constant

    assert inspection.split_layers(apply, params).names == ("b", "a")


def test_embeddings_and_layers_stacked_for_a_scan_are_kernels():
    params = {"stack": jnp.ones((4, 3, 3)), "table": jnp.ones((7, 3)), "out": jnp.ones((3, 1))}

    def apply(params):
        h = jnp.take(params["table"], jnp.array([1, 2]), axis=0)
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
        return h @ params["out"]

    assert inspection.split_layers(apply, params).names == ("table", "stack", "out")


ONE_LAYER = inspection.split_layers(lambda p: INPUTS @ p["w"], {"w": jnp.ones((2, 2))})


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda w: inspection.split_layers(lambda p: INPUTS, {}), ValueError, "params has no leaves"),
        (lambda w: ONE_LAYER.split({"v": w}), ValueError, "params has structure .*'v'.*; expected .*'w'"),
        (lambda w: ONE_LAYER.join(((w, w),)), ValueError, r"layers have \[2\] leaves; expected \[1\]"),
        (lambda w: ONE_LAYER.join(()), ValueError, r"layers have \[\] leaves; expected \[1\]"),
        (lambda w: inspection.gradient_shift(sum, (), ()), ValueError, "before has no layers"),
        (
            lambda w: inspection.gradient_shift(sum, (w, ()), (w, ())),
            ValueError,
            r"before\[1\] has no leaves",
        ),
        (lambda w: inspection.gradient_shift(sum, (w,), (w, w)), ValueError, "after has structure"),
        (
            lambda w: inspection.gradient_shift(sum, (w, {"b": w}), (w, {"b": w[0]})),
            ValueError,
            r"after\[1\]\['b'\] has shape \(2,\) and dtype float32; expected those of before, \(2, 2\)",
        ),
        (
            lambda w: inspection.gradient_shift(sum, (w,), (w.astype(jnp.bfloat16),)),
            ValueError,
            r"after\[0\] has shape \(2, 2\) and dtype bfloat16; expected",
        ),
        (
            lambda w: inspection.gradient_shift(sum, (w, {"n": 1}), (w, {"n": 1})),
            TypeError,
            r"before\[1\]\['n'\] has dtype int32",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((2, 2)))
