"""Training steps of residual networks in JAX, with and without rematerialisation of normalized values."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Literal
from jax.typing import DTypeLike

import jbn.linen
from benchmarks.worker import Candidate

# What the backward pass of batch norm reads. Its outputs are made from them again in one elementwise pass.
INPUTS_AND_MOMENTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names("batch_norm_moments"),
    # Flax's moments have no name; they are made of sums.
    lambda primitive, *_, **__: primitive.name in ("conv_general_dilated", "reduce_sum"),
)
OPTIMIZER = optax.sgd(1e-3, momentum=0.9)
CANDIDATES = {
    "jbn": dict(norm=jbn.linen.BatchNorm),
    "flax": dict(norm=nn.BatchNorm),
    "flax two-pass": dict(norm=partial(nn.BatchNorm, use_fast_variance=False)),
    "jbn remat": dict(norm=jbn.linen.BatchNorm, policy=INPUTS_AND_MOMENTS),
    "flax remat": dict(norm=nn.BatchNorm, policy=INPUTS_AND_MOMENTS),
    "without norm": dict(norm=None),
    "without norm, remat": dict(norm=None, policy=INPUTS_AND_MOMENTS),
}


class Convolution(nn.Module):
    """A convolution and what follows it: batch norm, or nothing."""

    filters: int
    size: int
    strides: int
    norm: Callable[..., nn.Module] | None
    dtype: DTypeLike
    train: bool

    @nn.compact
    def __call__(self, x):
        window, strides = (self.size,) * 2, (self.strides,) * 2
        x = nn.Conv(self.filters, window, strides, self.size // 2, use_bias=False, dtype=self.dtype)(x)
        if self.norm is None:
            return x
        return self.norm(use_running_average=not self.train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)(x)


class Stem(nn.Module):
    """What is before the blocks: for small images one convolution, for large ones also a pool."""

    filters: int
    strides: int
    convolution: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        if self.strides == 1:
            return nn.relu(self.convolution(self.filters, 3, 1)(x))
        x = nn.relu(self.convolution(self.filters, 7, self.strides)(x))
        return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


class Block(nn.Module):
    """Convolutions of one or several sizes, and a shortcut around them."""

    filters: Sequence[int]
    sizes: Sequence[int]
    strides: int
    convolution: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        y, strided = x, self.sizes.index(3)
        for i, (filters, size) in enumerate(zip(self.filters, self.sizes)):
            y = self.convolution(filters, size, self.strides if i == strided else 1)(nn.relu(y) if i else y)
        if x.shape != y.shape:
            x = self.convolution(self.filters[-1], 1, self.strides)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network of basic blocks or bottlenecks: He et al. 2016."""

    bottleneck: bool
    stages: Sequence[int]
    filters: int
    classes: int
    norm: Callable[..., nn.Module] | None
    policy: Callable[..., bool] | None = None
    dtype: DTypeLike = jnp.float32
    train: bool = True

    @nn.compact
    def __call__(self, x):
        remat = (lambda module: module) if self.policy is None else partial(nn.remat, policy=self.policy)
        convolution = partial(Convolution, norm=self.norm, dtype=self.dtype, train=self.train)
        x = remat(Stem)(self.filters, 2 if self.bottleneck else 1, convolution, name="stem")(x)
        for stage, blocks in enumerate(self.stages):
            f = self.filters * 2**stage
            filters, sizes = ((f, f, 4 * f), (1, 3, 1)) if self.bottleneck else ((f, f), (3, 3))
            for i in range(blocks):
                strides = 2 if stage and not i else 1
                x = remat(Block)(filters, sizes, strides, convolution, name=f"stage{stage}_block{i}")(x)
        x = nn.Dense(self.classes, dtype=self.dtype)(jnp.mean(x, (1, 2)))
        return x.astype(jnp.float32)


def prepare(case: dict[str, Any]) -> dict[str, Candidate]:
    """Compiles each candidate's training step, and sees that those with batch norm take the same steps."""
    random = np.random.RandomState(0)
    images = jnp.asarray(random.normal(size=(case["batch"], case["size"], case["size"], 3)), jnp.float32)
    labels = jnp.asarray(random.randint(case["classes"], size=case["batch"]))
    candidates, losses = {}, {}
    for name, options in CANDIDATES.items():
        size = {key: case[key] for key in ("bottleneck", "stages", "filters", "classes")}
        candidates[name], losses[name] = _candidate(partial(ResNet, **size, **options), images, labels)
    for name, values in losses.items():
        # In float32 a gradient of a new ResNet-50 is 2% off, whatever its layer; the second loss shows it.
        if "without norm" not in name and not np.allclose(values, losses["jbn"], rtol=(1e-4, 1e-2)):
            raise RuntimeError(f"the first losses of {name} are {values}, and those of jbn {losses['jbn']}.")
    return candidates


def loss(model, params, batch_stats, images, labels):
    variables = {"params": params, "batch_stats": batch_stats}
    logits, updated = model.apply(variables, images, mutable=["batch_stats"])
    value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return value, updated.get("batch_stats", {})


def train_step(model, state, images, labels):
    params, batch_stats, opt_state = state
    (value, batch_stats), grads = jax.value_and_grad(partial(loss, model), has_aux=True)(
        params, batch_stats, images, labels
    )
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return (optax.apply_updates(params, updates), batch_stats, opt_state), value


def _candidate(make_model, images, labels):
    """Returns a candidate and its first losses, of which the second depends on the gradients."""
    model = make_model()
    variables = initial(model.init, jax.random.key(0), images)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    facts = {
        "residual bytes": _residual_bytes(model, params, batch_stats, images, labels),
        "residual bytes in bfloat16": _residual_bytes(
            make_model(dtype=jnp.bfloat16), params, batch_stats, images, labels
        ),
    }
    state, options = (params, batch_stats, OPTIMIZER.init(params)), _compiler_options(model)
    step = jax.jit(partial(train_step, model), donate_argnums=0, compiler_options=options)
    step = step.lower(state, images, labels).compile()
    facts |= _facts(step)
    if options:
        del facts["bytes accessed"]  # the barriers that stay are counted as copies

    def run():
        nonlocal state
        start = time.perf_counter()
        state, value = jax.block_until_ready(step(state, images, labels))
        return time.perf_counter() - start, float(value)

    return Candidate(lambda: run()[0], facts), [run()[1] for _ in range(2)]


def initial(init, key, images):
    """Does without `jit(init)(key, images)`, which takes longer to compile than the training step."""
    random = np.random.RandomState(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return jnp.asarray(random.normal(0, math.prod(leaf.shape[:-1]) ** -0.5, leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, key, images))


def _compiler_options(model):
    # Before jax 0.12 the compiler for CPUs drops the barriers between the two passes too early, sees that the
    # same is computed twice, and keeps the outputs after all.
    forgets = jax.default_backend() == "cpu" and jax.__version_info__ < (0, 12)
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if model.policy is not None and forgets else {}


def _facts(compiled):
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "temp bytes": memory.temp_size_in_bytes,
        "argument bytes": memory.argument_size_in_bytes,
        "output bytes": memory.output_size_in_bytes,
        "bytes accessed": cost["bytes accessed"],
        "flops": cost["flops"],
    }


def _residual_bytes(model, params, *args):
    """Counts what the forward pass keeps for the backward pass, beyond arguments and what is broadcast."""

    def residuals(params, *args):
        return jax.vjp(lambda params: loss(model, params, *args), params, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(residuals)(params, *args).jaxpr
    kept = set(_origins(jaxpr, jaxpr.invars)) - set(jaxpr.invars) - set(jaxpr.constvars) - {None}
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)


def _origins(jaxpr, args):
    """Returns for each output the variable that first had this value; None for what is broadcast."""
    origin = dict(zip(jaxpr.invars, args))

    def of(v):
        return None if isinstance(v, Literal) else origin.get(v, v)

    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name == "name":
            origin[eqn.outvars[0]] = of(eqn.invars[0])
        elif eqn.primitive.name == "broadcast_in_dim":
            origin[eqn.outvars[0]] = None
        elif inner is not None:
            outer, first = [of(v) for v in eqn.invars], {}
            for v, found in zip(eqn.outvars, _origins(getattr(inner, "jaxpr", inner), outer)):
                # A function that is called twice has the same variables, but not the same values.
                origin[v] = found if found is None or found in outer else first.setdefault(found, v)
    return [of(v) for v in jaxpr.outvars]
