"""What jbn becomes when it is compiled: passes over memory, and what other platforms are given to fuse."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from numpy.testing import assert_allclose

import jbn.linen
import jbn.nnx
from tests.helpers.compiled import OPTIMIZED
from tests.helpers.layers import layer, random

SHAPES = [(16, 14, 14, 64), (2048, 128)]


def train_step(x, dy, params, running, **options):
    def forward(x, params):
        return jbn.batch_norm(x, params, running, train=True, **options)

    y, backward, new = jax.vjp(forward, x, params, has_aux=True)
    return y, *backward(dy), new


def flax_step(x, dy, params, running):
    module = nn.BatchNorm(use_running_average=False, use_fast_variance=False)

    def forward(x, params):
        variables = {"params": params._asdict(), "batch_stats": {"mean": running.mean, "var": running.var}}
        return module.apply(variables, x, mutable=["batch_stats"])

    y, backward, new = jax.vjp(forward, x, params, has_aux=True)
    return y, *backward(dy), new


def inputs(shape, dtype="float32"):
    return random(shape, dtype), random(shape, dtype, seed=1), *layer(shape[-1])


def passes(step, args):
    """Return the bytes that a user's program reads and writes, as XLA counts them, in sizes of x."""
    compiled = jax.jit(step, compiler_options=OPTIMIZED).lower(*args).compile()
    return compiled.cost_analysis()["bytes accessed"] / args[0].nbytes


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_a_training_step_moves_at_most_twelve_times_its_input(shape, standard_promotion):
    args = inputs(shape)
    # XLA counts the costlier branch, which takes a second pass over x; the usual one has two passes less.
    assert passes(train_step, args) < 12.5
    if len(shape) == 2:
        assert passes(flax_step, args) > 17.5


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_narrow_samples_are_read_as_they_are(shape):
    # Of what is as wide as float32 only the converted dy is written, once.
    assert passes(train_step, inputs(shape, "bfloat16")) < 18


@pytest.mark.slow
def test_ghost_batches_cost_no_more_passes():
    x, dy, params, running = inputs((20, 16, 16, 64))
    batch_norm = partial(jbn.batch_norm, params=params, running=running, train=True, virtual_batch_size=5)

    def step(x, dy):
        y, backward = jax.vjp(lambda x: batch_norm(x)[0], x)
        return y, backward(dy)

    assert passes(step, (x, dy)) < 12.5


def reductions_of(text, shape):
    """Counts the reductions over arrays of a shape."""
    of_shape = "x".join(map(str, shape))
    return len(re.findall(rf"stablehlo\.reduce\(.*: \(tensor<{of_shape}x", text))


@pytest.mark.parametrize(
    "platform, exact, reductions", [("cuda", True, 3), ("tpu", True, 4), ("tpu", False, 6)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_other_platforms_are_given_what_they_fuse(platform, exact, reductions, shape):
    step = partial(train_step, exact=exact)
    traced = jax.jit(step, compiler_options=OPTIMIZED).trace(*inputs(shape))
    lowered = traced.lower(lowering_platforms=(platform,))
    # Nothing hides from them that two reductions read the same, and nothing looks at values before it goes
    # on. (XLA for CPU compiles what was lowered for others too: of the choice of platforms nothing is left.)
    of_shape = "x".join(map(str, shape))
    assert not re.search(rf"optimization_barrier.*tensor<{of_shape}x", lowered.as_text())
    assert "conditional(" not in lowered.compile().as_text()
    # Two backward. Forward one of two arrays for a GPU, two for a TPU; about two shifts, known before, four.
    assert reductions_of(lowered.as_text(), shape) == reductions
    # A pilot is the mean of 64 samples; without one, all sums can be fused into what makes x.
    pilots = reductions_of(lowered.as_text(), (4, 4, 4) if len(shape) == 4 else (64,))
    assert pilots == (1 if exact else 0)


def operations(step, *args, **kwargs):
    """Counts the operations of a program as JAX lowers it."""
    text = jax.jit(step).trace(*args).lower(**kwargs).as_text()
    return len(re.findall(r"^\s+(?:%\S+ = )?\"?stablehlo\.", text, re.MULTILINE))


@pytest.mark.parametrize("platform, first", [("cpu", 150), ("cuda", 110), ("tpu", 120)])
def test_layers_of_one_shape_share_what_measures_and_what_updates(platform, first):
    x, _, params, running = inputs(SHAPES[0])

    def chain(layers):
        def loss(x, params):
            for _ in range(layers):
                x, _ = jbn.batch_norm(x, params, running, train=True)
            return jnp.sum(x)

        return operations(jax.grad(loss, (0, 1)), x, params, lowering_platforms=(platform,))

    assert chain(1) <= first
    assert chain(4) - chain(3) <= 75


def test_the_program_for_cpu_looks_once_whether_one_pass_was_exact():
    assert jax.jit(train_step).lower(*inputs(SHAPES[0])).compile().as_text().count(" conditional(") == 1


def test_rematerialisation_can_keep_the_moments_and_never_measures_again():
    x, dy, params, running = inputs(SHAPES[0])

    def gradient(policy):
        f = lambda x: jnp.sum(jnp.sin(jbn.batch_norm(x, params, running, train=True)[0]) * dy)
        return jax.grad(jax.checkpoint(f, policy=policy))

    policies = jax.checkpoint_policies
    everything, moments, nothing = (
        gradient(policy)
        for policy in (
            policies.everything_saveable,
            policies.save_only_these_names("batch_norm_moments"),
            policies.nothing_saveable,
        )
    )
    measured = [str(jax.make_jaxpr(f)(x)).count("measure_on[") for f in (everything, moments, nothing)]
    assert measured[0] == measured[1] == measured[2] / 2
    assert_allclose(jax.jit(moments)(x), jax.jit(everything)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fast, pilots", [(True, 0), (False, 1)])
def test_modules_take_a_pilot_on_a_tpu_unless_their_variance_is_fast(fast, pilots):
    x, *_ = inputs(SHAPES[1])
    linen = jbn.linen.BatchNorm(use_running_average=False, use_fast_variance=fast)
    variables = linen.init(jax.random.key(0), x)
    layer = jbn.nnx.BatchNorm(x.shape[-1], use_fast_variance=fast, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    for f in (
        lambda x: linen.apply(variables, x, mutable=["batch_stats"]),
        lambda x: nnx.merge(graph, state, copy=True)(x),
    ):
        text = jax.jit(f).trace(x).lower(lowering_platforms=("tpu",)).as_text()
        assert reductions_of(text, (64,)) == pilots
