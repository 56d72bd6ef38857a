"""Jobs start from PyTorch's weights and compute what PyTorch does; what does not fit is said."""

import functools
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import save_file

from tests.helpers.torch_weights import images, weights
from train.config import Model
from train.models import build
from train.training.trained.pretrained import start_from

PYTORCH = json.loads((Path(__file__).parents[3] / "data/torch_resnet.json").read_text())
NARROW = (4, 6, 8, 10)
STATE = weights("resnet18", widths=NARROW)
RESNET18 = Model(name="resnet18", widths=NARROW)


@functools.cache
def untrained(model, classes=10, shape=(64, 71, 3)):
    """Return a network and variables of its shapes, without the time to draw them."""
    network = build(model, shape, classes)
    like = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, *shape), np.float32))
    return network, jax.tree.map(lambda leaf: np.full(leaf.shape, 7, leaf.dtype), like)


def start(path, model=RESNET18, **options):
    return start_from(path, model, untrained(model, **options)[1], head="Dense_0")


@pytest.fixture
def save(tmp_path):
    """Write weights as the name's suffix says, and return the path."""

    def save(state, name="weights.npz"):
        path = tmp_path / name
        np.savez(path, **state) if path.suffix == ".npz" else save_file(state, path)
        return path

    return save


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_outputs_equal_pytorchs_padding_and_strides_included(save, name):
    x, expected = images(*PYTORCH["input"]), np.array(PYTORCH[name])
    network, initial = untrained(Model(name=name))
    variables, notes = start_from(save(weights(name)), Model(name=name), initial, head="Dense_0")
    logits = jax.jit(lambda variables: network.apply(variables, x, train=False)[0])(variables)
    assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert notes == ()


@pytest.mark.slow
def test_file_means_the_same_in_every_format_dtype_and_wrapping_and_for_every_batch_norm(save):
    expected, _ = start(save(STATE))
    assert {float(leaf.min()) for leaf in jax.tree.leaves(expected.params)}.isdisjoint({7.0})
    wrapped = {f"_orig_mod.module.{key}": value for key, value in STATE.items()}
    for state, name in (STATE, "a.safetensors"), (wrapped, "b.safetensors"), (wrapped, "c.NPZ.npz"):
        jax.tree.map(assert_array_equal, start(save(state, name))[0], expected)
    half = {key: value.astype(jnp.bfloat16) for key, value in STATE.items() if value.ndim}
    rounded, _ = start(save(half, "half.safetensors"))
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=2**-8), rounded, expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rounded)} == {"float32"}
    for norm in ("ghost", "flax"):
        found, _ = start(save(STATE), Model(name="resnet18", widths=NARROW, norm=norm))
        jax.tree.map(assert_array_equal, found.params, expected.params)
        stem = found.batch_stats["stem"]["BatchNorm_0"]
        assert_array_equal(stem["var"], STATE["bn1.running_var"])
        assert sorted(stem) == ["count", "mean", "var"][norm == "flax" :]


def test_head_of_another_size_or_none_starts_anew_and_is_said(save):
    headless = {key: value for key, value in STATE.items() if not key.startswith("fc.")}
    for state, classes, note in (
        (STATE, 3, "the head starts anew: 10 classes there, 3 here"),
        (headless, 10, "the head starts anew: no classes there, 10 here"),
    ):
        variables, notes = start(save(state), classes=classes)
        assert notes == (note,)
        head = variables.params["Dense_0"]
        assert (
            head["kernel"].shape == (10, classes)
            and (head["kernel"] == 7).all()
            and (head["bias"] == 7).all()
        )
        assert_array_equal(variables.params["stem"]["BatchNorm_0"]["scale"], STATE["bn1.weight"])


@pytest.mark.slow
def test_weights_of_another_network_are_refused_with_all_differences(save, refusal):
    sentence = refusal(start, save(STATE), shape=(64, 71, 1))
    assert sentence.startswith("init_from: '") and sentence.endswith(
        "' does not fit model.name = 'resnet18': conv1.weight: expected (4, 1, 7, 7) for stem/Conv_0/kernel "
        "(7, 7, 1, 4), got (4, 3, 7, 7)."
    )
    changed = {"bn1.weight": np.full(4, np.nan), "conv1.bias": np.zeros(4), "fc.weight": np.zeros((10, 9))}
    sentence = refusal(start, save(STATE | changed))
    for part in (
        "bn1.weight: expected finite float32, got other values; ",
        "conv1.bias: expected no such key, got one of shape (4,)",
        "fc.weight: expected (10, 10) for Dense_0/kernel (10, 10), got (10, 9); ",
    ):
        assert part in sentence
    no_bias = {key: value for key, value in STATE.items() if key != "fc.bias"}
    assert "fc.bias: expected (10,) for Dense_0/bias (10,), got no such key" in refusal(start, save(no_bias))
    of_resnet50 = refusal(start, save(weights("resnet50", widths=NARROW)))
    assert "layer1.0.conv1.weight: expected (4, 4, 3, 3) for stage0_block0/Convolution_0" in of_resnet50
    assert len(of_resnet50.split("; ")) == 21 and of_resnet50.endswith("; and 169 more.")
    of_transformers = refusal(start, save({f"resnet.{key}": value for key, value in STATE.items()}))
    assert of_transformers.partition("such as conv1.weight, got ")[2] == (
        "resnet.bn1.bias, resnet.bn1.num_batches_tracked, resnet.bn1.running_mean."
    )
    assert refusal(start, save({})).endswith("such as conv1.weight, got no arrays.")
    for options, expected in (
        (
            {"name": "resnet20"},
            "expected model.name = 'resnet18' or 'resnet50' with a file of PyTorch's weights",
        ),
        (
            {"norm": "layer"},
            "expected model.norm = 'batch' or 'renorm' or 'ghost' or 'flax' with a file of PyTorch's weights",
        ),
        ({"norm_inputs": True}, "BatchNorm_0/bias (3,): expected PyTorch's name of 'BatchNorm_0', got none"),
    ):
        assert expected in refusal(start, save(STATE), Model(**{"name": "resnet18"} | options)), options


def test_files_that_hold_no_weights_are_refused_in_a_sentence(save, tmp_path, refusal):
    whole = save(STATE, "whole.safetensors").read_bytes()
    zipped = save(STATE).read_bytes()
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, **STATE | {"conv1.weight": np.array([{"a": 1}], object)})
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
        file.write(bytes(2**21))
    contents = {
        "empty.safetensors": b"",
        "cut.safetensors": whole[: len(whole) // 2],
        "header_cut.safetensors": whole[:100],
        "huge_header.safetensors": struct.pack("<Q", 2**63) + b"{}",
        "no_json.safetensors": struct.pack("<Q", 8) + b"\xff" * 8,
        "zip.safetensors": zipped,
        "cut.npz": zipped[: len(zipped) // 2],
        "flipped.npz": zipped[:3000] + bytes([zipped[3000] ^ 1]) + zipped[3001:],
        "pickle.npz": pickle.dumps(STATE),
        "empty.npz": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.training.trained.pretrained.MAX_BYTES", 2**20)
        escapes = save({"conv1.weight\n\x1b[2J": np.zeros(1)}, "escapes.npz")
        for path in (*(tmp_path / name for name in contents), pickled, escapes, bomb):
            sentence = refusal(start, path)
            assert sentence.startswith(f"{path} cannot be read: "), sentence
            assert f"expected a {path.suffix} file of arrays, of at most " in sentence
        assert "it holds 2,097,152 bytes" in sentence  # the bomb's, which are not unpacked
    for name in ("resnet18.pth", "model.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(STATE))
        sentence = refusal(start, tmp_path / name)
        assert f"got '{tmp_path / name}', a pickle, which may run any program and is never opened" in sentence
        code = sentence.partition("Convert it in Python: ")[2]
        compile(code, "", "exec")
        assert f"'{(tmp_path / name).with_suffix('.safetensors')}')" in code
    expected = "init_from: expected a run directory, or a .safetensors or .npz file of PyTorch's names, got "
    os.mkfifo(tmp_path / "fifo.npz")
    (tmp_path / "weights.h5").write_bytes(b"")
    for name, reason in (
        ("none.npz", ", which does not exist."),
        ("fifo.npz", ", which is no file."),
        ("weights.h5", "."),
    ):
        assert refusal(start, tmp_path / name) == f"{expected}'{tmp_path / name}'{reason}"
    assert refusal(start, tmp_path) == f"{expected}'{tmp_path}', which has no config.json."
