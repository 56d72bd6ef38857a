import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn._xla import _add_where as add_rows_elsewhere
from jbn._xla import add_rows, decided_at_lowering, spread, take_rows


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


@pytest.mark.slow
def test_rows_are_added_up_and_taken_by_index_on_every_platform_and_for_members_of_vmaps():
    rng = np.random.RandomState(0)
    rows, values = (jnp.asarray(rng.normal(size=(2, 3, n, 4)), jnp.float32) for n in (7, 5))
    index = jnp.asarray(rng.randint(0, 6, (2, 3, 7)), jnp.int32)  # 5 is out of range
    add = lambda rows, index: add_rows(rows, index, 5)
    over = lambda f, *axes: jax.vmap(jax.vmap(f, axes), axes)
    taken = over(take_rows, 0, 0)(values, index)
    for i in np.ndindex(2, 3):
        wanted = np.stack([rows[i][np.asarray(index[i]) == row].sum(0) for row in range(5)])
        assert_allclose(over(add, 0, 0)(rows, index)[i], wanted, rtol=1e-5, atol=1e-6)
        assert_allclose(add_rows_elsewhere(rows[i], index[i], number=5), wanted, rtol=1e-5, atol=1e-6)
        assert_allclose(
            taken[i], np.vstack([values[i], np.full((1, 4), np.nan)])[np.asarray(index[i])], rtol=1e-6
        )
    shared = over(add, 0, None)(rows, index[0, 0])
    assert_allclose(shared[1, 2], add(rows[1, 2], index[0, 0]), rtol=1e-6)
    row, value, one = rows[0, 0], values[0, 0], index[0, 0]
    assert_allclose(
        jax.vjp(lambda values: take_rows(values, one), value)[1](row)[0], add(row, one), rtol=1e-6
    )
    assert_allclose(jax.vjp(lambda rows: add(rows, one), row)[1](value)[0], take_rows(value, one), rtol=1e-6)


def test_values_are_spread_with_their_scale_for_members_of_vmaps_too_and_differentiated_twice():
    rng = np.random.RandomState(0)
    values, scale, weight = (rng.normal(size=shape) for shape in ((3, 2), (2, 3), (2, 5, 3, 4)))

    def loss(values, scale, weight):
        return (spread(values, scale, shape=(5, 3, 4), new_axes=(0, 2)) * weight).sum() ** 2

    of_members = jax.vmap(jax.value_and_grad(loss, (0, 1)), (1, 0, 0))
    found, of_gradient = jax.jit(jax.jvp, static_argnums=0)(
        of_members, *(tuple(map(jnp.float32, (values, scale, weight))),) * 2
    )
    sums = weight.sum((1, 3))
    total = (values.T * scale * sums).sum(1)
    expected = 2 * total[:, None] * scale * sums, 2 * total[:, None] * values.T * sums
    assert_allclose(found[0], total**2, rtol=1e-5)
    # The loss is of degree 6 in all three arrays, and so its gradients of degree 5.
    for gradient, tangent, wanted in zip(found[1], of_gradient[1], expected):
        assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)
        assert_allclose(tangent, 5 * wanted, rtol=1e-4, atol=1e-4)
