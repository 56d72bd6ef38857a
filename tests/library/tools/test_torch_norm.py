"""One batch norm of PyTorch is jbn's, and the other way round; its numbers were computed by PyTorch."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn

(RUN, *_) = json.loads((Path(__file__).parents[2] / "data/torch_batch_norm.json").read_text())["runs"]
LAST = RUN["steps"][-1]
STATE = {
    "bn.weight": np.array(RUN["scale"], np.float32),
    "bn.bias": np.array(RUN["bias"], np.float32),
    "bn.running_mean": np.array(LAST["running_mean"], np.float32),
    "bn.running_var": np.array(LAST["running_var"], np.float32),
    "bn.num_batches_tracked": np.array(len(RUN["steps"]), np.int64),
}


def test_a_layer_of_pytorch_evaluates_alike_and_comes_back_as_it_was():
    for prefix in ("bn", "bn."):
        params, running = jbn.from_torch(STATE | {"fc.weight": np.ones((2, 2))}, prefix)
        x = jnp.asarray(RUN["steps"][0]["x"])
        y, _ = jbn.batch_norm(x, params, running, train=False)
        assert_allclose(y, RUN["inference"], rtol=0, atol=1e-6)
        assert_array_equal(running.count, np.ones(3))
        back = jbn.to_torch(params, running._replace(count=jnp.full(3, 4.0)), prefix)
        assert back.keys() == STATE.keys()
        for key, value in back.items():
            assert_array_equal(value, STATE[key])
            assert (value.dtype, value.flags.writeable) == (STATE[key].dtype, True)


def test_layers_without_parameters_or_in_other_dtypes():
    bare = {key.removeprefix("bn."): value for key, value in STATE.items()}
    half = {key: value.astype(jnp.bfloat16) for key, value in bare.items()}
    params, running = jbn.from_torch(half)
    assert (params.scale.dtype, running.mean.dtype, running.var.dtype) == (jnp.bfloat16, "float32", "float32")
    assert {value.dtype for value in jbn.to_torch(params, running).values()} == {
        np.dtype("float32"),
        np.dtype("int64"),
    }
    del bare["weight"], bare["bias"]
    params, running = jbn.from_torch(bare)
    assert params == jbn.Params(None, None)
    assert list(jbn.to_torch(None, running)) == ["running_mean", "running_var", "num_batches_tracked"]
    # PyTorch's layer has both or neither, and strict loading wants both.
    one = jbn.to_torch(jbn.Params(None, jnp.arange(3.0)), running)
    assert_array_equal(one["weight"], np.ones(3))
    assert_array_equal(one["bias"], np.arange(3))
    # A debiased count is rounded up, so that PyTorch takes the moments as measured.
    assert jbn.to_torch(None, running._replace(count=jnp.full(3, 0.1)))["num_batches_tracked"] == 1


def test_what_is_no_batch_norm_is_said():
    def without(*names):
        return {key: value for key, value in STATE.items() if key.rpartition(".")[2] not in names}

    cases = (
        (
            without("running_mean", "running_var"),
            "bn",
            "'bn.running_mean': .*track_running_stats=False.*keep()",
        ),
        (STATE, "bn1", "'bn1.running_mean': expected an array, got no such key. Batch norms are at 'bn'."),
        ({}, "", "'running_mean': .*Batch norms are at no prefix."),
        (
            STATE | {"bn.bias": np.ones(2)},
            "bn",
            "bn.bias: expected (3,), the shape of bn.running_mean, got (2,).",
        ),
        (STATE | {"bn.running_var": -np.ones(3)}, "bn", "bn.running_var: expected finite float32 >= 0, got"),
        (STATE | {"bn.weight": np.full(3, 1e300)}, "bn", "bn.weight: expected finite float32, got others."),
        (STATE | {"bn.running_mean": np.ones(())}, "bn", "bn.running_mean: expected (features,)"),
        (
            STATE | {"bn.weight": np.ones(3, int)},
            "bn",
            "bn.weight: expected floating-point numbers, got int64.",
        ),
    )
    for state, prefix, message in cases:
        pattern = re.escape(message).replace(r"\.\*", ".*")
        with pytest.raises(ValueError, match=pattern):
            jbn.from_torch(state, prefix)
    with pytest.raises(TypeError, match="state is a list; expected a mapping"):
        jbn.from_torch([STATE])
    with pytest.raises(TypeError, match="state has the key 1; expected PyTorch's names"):
        jbn.from_torch({1: np.ones(3)})
    with pytest.raises(ValueError, match=r"running.mean has shape \(2, 2\); expected \(features,\)"):
        jbn.to_torch(*jbn.init((2, 2)))
    params, running = jbn.init(3)
    with pytest.raises(TypeError, match="params, running: expected .*, got Moments and Params"):
        jbn.to_torch(running, params)
    for wrong in (jnp.ones(2), jnp.ones(3, "complex64")):
        with pytest.raises(ValueError, match=r"scale: expected real numbers, \(3,\) as running.mean, got"):
            jbn.to_torch(jbn.Params(wrong, None), running)
