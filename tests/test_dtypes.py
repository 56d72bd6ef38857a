import jax.numpy as jnp
import pytest

from jbn.dtypes import arithmetic_dtype, promote, real_dtype


@pytest.mark.parametrize(
    "given, promoted, computed_in",
    [
        (["bfloat16"], "bfloat16", "float32"),
        (["float16", "bfloat16"], "float32", "float32"),
        (["bfloat16", "float64"], "float64", "float64"),
        (["complex64", "bfloat16"], "complex64", "complex64"),
        (["complex64", "float64"], "complex128", "complex128"),
    ],
)
def test_promotion_works_in_strict_mode_and_arithmetic_is_float32_at_least(x64, given, promoted, computed_in):
    for values in given, [jnp.zeros(2, dtype) for dtype in given]:
        assert promote(*values) == promoted
        assert arithmetic_dtype(*values) == computed_in


@pytest.mark.parametrize(
    "dtype, real", [("complex64", "float32"), ("complex128", "float64"), ("bfloat16", "bfloat16")]
)
def test_real_dtype_is_that_of_the_real_part(dtype, real):
    assert real_dtype(dtype) == real
