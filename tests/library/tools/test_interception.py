"""Contexts that see every call of a Linen model, one in another."""

import flax.linen as nn
import jax
import jax.numpy as jnp

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
