"""Programs for other machines, made on this one, for a batch of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from numpy.testing import assert_allclose

import jbn

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
MODES = ["training", "inference", "traced flag", "gradient"]
MASKS = {
    "no mask": lambda rows, height: None,
    "rows": lambda rows, height: (rows, 1, 1),
    "positions per feature": lambda rows, height: (1, height, 3),
}


def assert_close(actual, expected, tolerance):
    def compare(a, b):
        assert a.dtype == b.dtype
        assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)

    jax.tree.map(compare, actual, expected)


def program(mode, **options):
    def forward(x, params, running, mask, train):
        flag = {"inference": False, "traced flag": train}.get(mode, True)
        return jbn.batch_norm(x, params, running, train=flag, mask=mask, **options)

    def gradient(x, params, *rest):
        loss = lambda x, params: jnp.sum(jnp.sin(forward(x, params, *rest)[0]))
        return jax.grad(loss, (0, 1))(x, params)

    return jax.jit(gradient if mode == "gradient" else forward)


def exported(f, shape, mask_shape, dtype):
    spec = lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    layer = jax.tree.map(lambda leaf: spec(leaf.shape), jbn.init(3))
    mask = None if mask_shape is None else spec(mask_shape)
    return export.export(f, platforms=PLATFORMS)(spec(shape, dtype), *layer, mask, spec((), bool))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, mask", [*(("float32", mask) for mask in MASKS), ("bfloat16", "no mask")])
def test_one_program_serves_every_platform_and_batch_size(dtype, mask, mode):
    shape_of_mask = MASKS[mask]
    b, h = export.symbolic_shape("b, h")
    compiled = exported(program(mode), (b, h, 3), shape_of_mask(b, h), dtype)
    assert compiled.platforms == PLATFORMS
    rng = np.random.RandomState(0)
    for rows, height in (2, 5), (7, 1):
        shape = shape_of_mask(rows, height)
        weights = None if shape is None else np.float32(rng.rand(*shape))
        args = jnp.asarray(rng.normal(3, 2, (rows, height, 3)), dtype), *jbn.init(3), weights, np.True_
        assert_close(compiled.call(*args), program(mode)(*args), 1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("mode", MODES)
def test_virtual_batches_are_exported_for_any_number_of_them(mode):
    f = program(mode, virtual_batch_size=4)
    compiled = exported(f, export.symbolic_shape("4*parts, 3"), None, "float32")
    for parts in 1, 3:
        x = np.float32(np.random.RandomState(0).normal(3, 2, (4 * parts, 3)))
        args = x, *jbn.init(3), None, np.True_
        jax.tree.map(lambda p, q: assert_allclose(p, q, rtol=1e-5, atol=1e-5), compiled.call(*args), f(*args))
