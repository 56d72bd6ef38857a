"""Programs compiled for machines that are not there: what is counted in them, and the command."""

import json
from importlib import import_module

import pytest

from benchmarks import compiled
from benchmarks.programs import MACHINES, count, is_installed, operations, size_of

# 1024 floats are N = 4096 bytes. The fusion reads all of x, and of the table only a row.
FUSED = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: f32[32,32], p1: f32[8,32]) -> (f32[32], bf16[32,32]) {
  %p0 = f32[32,32]{1,0:T(8,128)} parameter(0)
  %p1 = f32[8,32]{1,0} parameter(1)
  %zero = f32[] constant(0)
  %row = f32[1,32]{1,0} slice(%p1), slice={[2:3], [0:32]}
  %flat = f32[32]{0} bitcast(%row)
  %wide = f32[32,32]{1,0} broadcast(%flat), dimensions={1}
  %product = f32[32,32]{1,0} multiply(%p0, %wide)
  %sums = f32[32]{0} reduce(%product, %zero), dimensions={0}, to_apply=%add
  %narrow = bf16[32,32]{1,0} convert(%product)
  ROOT %both = (f32[32]{0}, bf16[32,32]{1,0}) tuple(%sums, %narrow)
}

ENTRY %main (x: f32[32,32], table: f32[8,32]) -> (f32[32], bf16[32,32]) {
  %x = f32[32,32]{1,0:T(8,128)} parameter(0)
  %table = f32[8,32]{1,0} parameter(1)
  %copy-start = (f32[8,32]{1,0:S(1)}, f32[8,32]{1,0}, u32[]{:S(2)}) copy-start(%table)
  %copy-done = f32[8,32]{1,0:S(1)} copy-done(%copy-start)
  %fusion = (f32[32]{0}, /*index=1*/bf16[32,32]{1,0:T(8,128)(2,1)}) fusion(%x, %copy-done), calls=%fused
  %get-tuple-element = f32[32]{0} get-tuple-element(%fusion), index=0
  %get-tuple-element.1 = bf16[32,32]{1,0} get-tuple-element(%fusion), index=1
  %bitcast = bf16[1024]{0} bitcast(%get-tuple-element.1)
  %twice = bf16[1024]{0} add(%bitcast, %bitcast)
  %again = bf16[32,32]{1,0} bitcast(%twice)
  ROOT %tuple = (f32[32]{0}, bf16[32,32]{1,0}) tuple(%get-tuple-element, %again)
}
"""


def test_kernels_are_what_is_not_free():
    assert count(FUSED).kernels == {"fusion": 1, "add": 1}


def test_a_slice_is_read_alone_and_every_output_is_written():
    fusion = 4096 + 32 * 4 + 32 * 4 + 2048  # x and a row; the sums and the narrow product
    add = 2048 + 2048  # an operand is read once, however often it is named
    assert count(FUSED).bytes == fusion + add


def test_what_else_uses_an_operand_reads_all_of_it():
    more = FUSED.replace("%flat = f32[32]{0} bitcast(%row)", "%flat = f32[32]{0} reduce(%p1, %zero)")
    assert count(more).bytes - count(FUSED).bytes == (8 - 1) * 32 * 4


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="expected the text of a compiled program, got one without an ENTRY"):
        count("HloModule empty")


def test_sizes_are_in_bytes():
    sizes = {"f32[2,3]": 24, "pred[]": 1, "(bf16[4], s8[3], u8[0])": 11, "c64[2]": 16, "token[]": 0}
    assert {shape: size_of(shape) for shape in sizes} == sizes


def test_operations_of_a_function_count_at_each_call():
    text = """\
module @jit_f {
  func.func public @main(%arg0: tensor<4xf32>) -> tensor<4xf32> {
    %0 = call @twice(%arg0) : (tensor<4xf32>) -> tensor<4xf32>
    %1 = stablehlo.add %0, %arg0 : tensor<4xf32>
    %2 = func.call @twice(%1) : (tensor<4xf32>) -> tensor<4xf32>
    return %2 : tensor<4xf32>
  }
  func.func private @twice(%arg0: tensor<4xf32>) -> tensor<4xf32> {
    %0 = stablehlo.add %arg0, %arg0 : tensor<4xf32>
    %1 = "stablehlo.negate"(%0) : (tensor<4xf32>) -> tensor<4xf32>
    return %1 : tensor<4xf32>
  }
}
"""
    assert operations(text) == 5


class InThisProcess:
    """A `benchmarks.interleave.Worker` that starts no process; tests/commands has one that does."""

    def __init__(self, module, **environment):
        assert environment["JAX_NUM_CPU_DEVICES"] == "4" and environment["JAX_PLATFORMS"] == "cpu"
        self.module = import_module(module)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def prepare(self, case):
        self.candidates = self.module.prepare(case)
        return {name: candidate.facts for name, candidate in self.candidates.items()}

    def seconds(self, name):
        return self.candidates[name].seconds()


@pytest.mark.slow
def test_without_compilers_it_says_what_to_install_and_does_the_rest(
    tmp_path, monkeypatch, capsys, standard_promotion
):
    monkeypatch.setattr(compiled, "Worker", InThisProcess)
    monkeypatch.setattr(compiled.jax, "clear_caches", lambda: None)  # no times are compared here
    monkeypatch.setattr(compiled, "is_installed", lambda platform: False)
    monkeypatch.setattr(compiled, "find_spec", lambda module: None)  # peers
    monkeypatch.setattr(compiled, "LAYERS", 1)
    monkeypatch.setattr(compiled, "OURS", ("no norm", "flax.linen", "jbn.linen"))
    compiled.main(tmp_path, quick=True)
    printed = capsys.readouterr().out
    assert "pip install 'jax[cuda12]==" in printed and "pip install 'jax[tpu]==" in printed
    assert "haiku, equinox, keras: left out" in printed
    record = json.loads((tmp_path / "compiled.json").read_text())
    found = {
        key: {each["name"]: each["facts"] for each in table["programs"]} for key, table in record.items()
    }
    assert set(found) == {"devices cpu", "lowered cpu", "seconds cpu"}
    sent = found["devices cpu"]
    assert 0 < sent["no norm"]["their bytes"] < sent["jbn.linen"]["their bytes"]
    assert found["lowered cpu"]["no norm"] == {"cpu": 0, "cuda": 0, "tpu": 0}
    assert all(number > 0 for number in found["lowered cpu"]["jbn.linen"].values())
    assert found["seconds cpu"]["flax.linen"]["over flax.linen"] == 1
    assert "| jbn.linen " in printed


def test_a_label_that_nothing_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected some of a label .* got 'gpu'"):
        compiled.main(tmp_path, quick=True, only="gpu")


def test_a_table_adds_to_those_of_the_same_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "describe", lambda: {"jax": "1"})
    path, program = tmp_path / "compiled.json", {"table": "models", "platform": "tpu", "options": {}}
    write = lambda name, facts: compiled._write(
        path, "models tpu", {"title": "", "programs": [program | {"name": name, "facts": facts}]}
    )
    read = lambda: {
        each["name"]: each["facts"] for each in json.loads(path.read_text())["models tpu"]["programs"]
    }
    write("a", 1), write("b", 2), write("a", 3)
    assert read() == {"a": 3, "b": 2}
    monkeypatch.setattr(compiled, "describe", lambda: {"jax": "2"})
    write("b", 4)
    assert read() == {"b": 4}


@pytest.mark.parametrize("platform", MACHINES)
def test_layers_are_compiled_for_machines_that_are_not_there(platform, tmp_path, capsys):
    if not is_installed(platform):
        pytest.skip(f"needs {MACHINES[platform].package}")
    compiled.main(tmp_path, quick=True, only=f"layers {platform} 8x8 float32 jbn.linen")
    assert f"Compiled for {MACHINES[platform].name}, not run on it." in capsys.readouterr().out
    programs = json.loads((tmp_path / "compiled.json").read_text())[f"layers {platform}"]["programs"]
    assert [each["name"] for each in programs] == ["jbn.linen", "jbn.linen, use_fast_variance=False"]
    assert all(each["facts"]["kernels"] > 0 and each["facts"]["bytes"] > 0 for each in programs)
