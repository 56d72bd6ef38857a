"""Contexts that see every call of a Linen model, one in another; and what is given in a function's place."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jbn.linen
from jbn.linen._calls import intercept


def adding(number):
    return intercept(lambda call, args, kwargs, context: call(*args, **kwargs) + number, f"add {number}")


def test_what_was_compiled_in_nested_contexts_is_used_in_the_same_ones_only():
    model = nn.Dense(1)
    apply, x = jax.jit(model.apply), jnp.zeros((1, 1))
    variables = {"params": {"kernel": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}}
    with adding(1), adding(2):
        assert apply(variables, x) == 3
    with adding(2):
        assert apply(variables, x) == 2
        with adding(1):
            assert apply(variables, x) == 3
    with adding(4), adding(2):
        assert apply(variables, x) == 6
    assert apply(variables, x) == 0


@pytest.mark.slow
def test_model_or_its_variables_in_place_of_a_function_are_refused():
    model, x = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)]), jnp.ones((3, 2))
    variables = model.init(jax.random.key(0), x)
    for tool, batches in (
        (jbn.linen.recalibrate, [x]),
        (jbn.linen.diagnose, [x]),
        (jbn.linen.find_pairs, x),
    ):
        tool(model.apply, variables, batches)
        with pytest.raises(TypeError, match="apply is a Sequential; expected a function .*model.apply"):
            tool(model, variables, batches)
        with pytest.raises(TypeError, match="apply is a dict; expected a function that runs the model"):
            tool(variables, model.apply, batches)
