"""Programs for other machines, made on this one, for a batch of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from numpy.testing import assert_allclose

import jbn
from tests.helpers.layers import layer, random

pytestmark = pytest.mark.slow
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
CASES = {
    "training": dict(train=True),
    "training in bfloat16": dict(train=True, dtype="bfloat16"),
    "training with a mask of rows": dict(train=True, mask="b, 1, 1"),
    "training with a mask of positions per feature": dict(train=True, mask="1, h, 3"),
    "training of virtual batches": dict(train=True, shape="4*b, h, 3", virtual_batch_size=4),
    "inference": dict(train=False),
    "a traced flag": dict(train="traced"),
}


def step_of(train, **options):
    """Returns the function of arrays that is exported: `y`, the running moments, and all gradients."""

    def step(x, params, running, mask, flag):
        def loss(x, params):
            y, new = jbn.batch_norm(
                x, params, running, train=flag if train == "traced" else train, mask=mask, **options
            )
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    return step


@pytest.mark.parametrize("case", CASES)
def test_one_program_serves_every_platform_and_batch_size(case):
    options = {"dtype": "float32", "shape": "b, h, 3", "mask": None} | CASES[case]
    dtype, x, mask = (options.pop(name) for name in ("dtype", "shape", "mask"))
    scope = export.SymbolicScope()

    def like(text, dtype="float32"):
        return jax.ShapeDtypeStruct(export.symbolic_shape(text, scope=scope), dtype)

    step, state = step_of(**options), layer(3)
    specs = like(x, dtype), *jax.tree.map(lambda leaf: like("3"), state), mask and like(mask), like("", bool)
    exported = export.export(jax.jit(step), platforms=PLATFORMS)(*specs)
    assert exported.platforms == PLATFORMS
    for rows, height in [(7, 5), (2, 1)] if case in ("training", "training of virtual batches") else [(7, 5)]:
        sizes = {"b": rows, "4*b": 4 * rows, "h": height, "3": 3, "1": 1}
        concrete = lambda text, sizes=sizes: tuple(sizes[size] for size in text.split(", "))
        weights = None if mask is None else np.random.RandomState(0).rand(*concrete(mask)).astype("float32")
        args = random(concrete(x), dtype), *state, weights, np.True_
        actual, expected = jax.jit(exported.call)(*args), jax.jit(step)(*args)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            assert_allclose(
                np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance, err_msg=f"{rows} x {height}"
            )
