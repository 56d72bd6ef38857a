import jax
import jax.numpy as jnp
from numpy.testing import assert_array_equal

import jbn
from jbn._xla import decided_at_lowering


def product(target, options, x, factor):
    return (x * factor,)


def test_a_primitive_has_the_derivative_of_its_first_argument_alone():
    f = decided_at_lowering(
        product, derivative=lambda options, arrays, dx, results: (dx * arrays[1],), batch=lambda *args: None
    )
    x, factor = jnp.arange(1.0, 4.0), jnp.arange(2.0, 5.0)
    call = lambda x, factor: f((), x, factor)[0]
    assert_array_equal(call(x, factor), x * factor)
    assert_array_equal(jax.jvp(lambda x: call(x, factor), (x,), (x,))[1], x * factor)
    assert_array_equal(jax.jvp(lambda factor: call(x, factor), (factor,), (x,))[1], [0, 0, 0])


def test_gradients_of_scale_and_bias_add_up_the_sums_over_ghost_batches():
    (params, running), x = jbn.init(64), jnp.ones((20, 16, 16, 64))

    def step(x, dy, params):
        forward = lambda *args: jbn.batch_norm(*args, running, train=True, virtual_batch_size=5)
        y, backward, new = jax.vjp(forward, x, params, has_aux=True)
        return y, backward(dy), new

    cost = jax.jit(step).lower(x, x, params).compile().cost_analysis()
    assert cost["bytes accessed"] / x.nbytes < 12.5  # 16 with sums of their own
