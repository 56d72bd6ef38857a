"""Batch normalization of the JAX libraries, all behind one signature."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from benchmarks.cases import Case

MOMENTUM, EPSILON, AXIS_NAME = 0.99, 1e-5, "devices"


class Layer(NamedTuple):
    params: Any
    state: Any
    apply: Callable[..., Any]  # (params, state, x, mask) -> (y, state); in inference the state as it came
    channels_last: bool = True


def layers(case: Case) -> dict[str, Callable[[], Layer]]:
    """Returns what makes the layer of each library that is installed and can do what the case asks."""
    found = {
        "jbn": lambda: _jbn(case),
        "jbn.linen": lambda: _linen(jbn.linen.BatchNorm, case),
        "jbn.nnx": lambda: _nnx(jbn.nnx.BatchNorm, case),
        "flax.linen": lambda: _linen(nn.BatchNorm, case),
        "flax.linen, two passes": lambda: _linen(nn.BatchNorm, case, use_fast_variance=False),
        "flax.nnx": lambda: _nnx(nnx.BatchNorm, case),
    }
    if case.channels_first:
        return found | ({"equinox": lambda: _equinox(case)} if find_spec("equinox") else {})
    if not case.mask and find_spec("haiku"):
        found["haiku"] = lambda: _haiku(case)
    if not case.mask and case.devices == 1:
        found |= {"equinox": lambda: _equinox(case)} if find_spec("equinox") else {}
        found |= {"keras": lambda: _keras(case)} if find_spec("keras") else {}
    if case.mode == "inference":
        found["folded"] = lambda: _folded(case)
    if case.section.startswith("Training: forward and backward"):
        found["jbn, ghost batches"] = lambda: _jbn(case, virtual_batch_size=-(-case.shape[0] // 4))
        found["jbn, uneven ghosts"] = lambda: _jbn(case, virtual_batch_size=-(-case.shape[0] // 5))
    return found


def _train(case):
    return case.mode != "inference"


def _axis(case):
    return 1 if case.channels_first else -1


def _axis_name(case):
    return AXIS_NAME if case.devices > 1 else None


def _jbn(case, **options):
    def apply(params, running, x, mask):
        return jbn.batch_norm(
            x,
            params,
            running,
            train=_train(case),
            update=jbn.ema(MOMENTUM),
            epsilon=EPSILON,
            mask=mask,
            axis=_axis(case),
            axis_name=_axis_name(case),
            **options,
        )

    return Layer(*jbn.init(case.shape[-1]), apply, not case.channels_first)


def _flax_options(case):
    return {
        "use_running_average": not _train(case),
        "axis": _axis(case),
        "momentum": MOMENTUM,
        "epsilon": EPSILON,
        "dtype": case.dtype,
        "axis_name": _axis_name(case),
    }


def _linen(module, case, **options):
    layer = module(**_flax_options(case), **options)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, case.shape[-1]), case.dtype))

    def apply(params, batch_stats, x, mask):
        variables = {"params": params, "batch_stats": batch_stats}
        y, updated = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    return Layer(variables["params"], variables["batch_stats"], apply, not case.channels_first)


def _nnx(module, case):
    layer = module(case.shape[-1], **_flax_options(case), rngs=nnx.Rngs(0))
    graph, params, batch_stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def apply(params, batch_stats, x, mask):
        layer = nnx.merge(graph, params, batch_stats, copy=True)  # of this trace
        y = layer(x, mask=mask)
        return y, nnx.state(layer, nnx.BatchStat)

    return Layer(params, batch_stats, apply, not case.channels_first)


def _haiku(case):
    import haiku

    def forward(x):
        layer = haiku.BatchNorm(True, True, MOMENTUM, EPSILON, cross_replica_axis=_axis_name(case))
        return layer(x, is_training=_train(case))

    layer = haiku.transform_with_state(forward)
    single = haiku.transform_with_state(lambda x: haiku.BatchNorm(True, True, MOMENTUM, EPSILON)(x, True))
    example = jnp.zeros((2, *[1] * (len(case.shape) - 2), case.shape[-1]), case.dtype)
    params, state = single.init(None, example)
    return Layer(params, state, lambda params, state, x, mask: layer.apply(params, state, None, x))


def _equinox(case):
    import equinox

    layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(
        case.shape[-1],
        "batch",
        EPSILON,
        momentum=MOMENTUM,
        mode="batch",
        inference=not _train(case),
        dtype=case.dtype,
    )
    params, static = equinox.partition(layer, equinox.is_inexact_array)

    def apply(params, state, x, mask):
        layer = equinox.combine(params, static)
        return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    return Layer(params, state, apply, channels_last=False)


def _keras(case):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    policy = "mixed_bfloat16" if case.dtype == "bfloat16" else "float32"
    layer = keras.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, dtype=policy)
    layer.build(case.shape)
    values = lambda variables: [variable.value for variable in variables]

    def apply(params, state, x, mask):
        return layer.stateless_call(params, state, x, training=_train(case))

    return Layer(values(layer.trainable_variables), values(layer.non_trainable_variables), apply)


def _folded(case):
    """What is left of the layer in inference when mean, var, scale and bias have become two vectors."""
    scale_and_shift = jbn.as_affine(*jbn.init(case.shape[-1]), epsilon=EPSILON)
    return Layer(
        scale_and_shift, (), lambda params, state, x, mask: ((x * params[0] + params[1]).astype(x.dtype), ())
    )
