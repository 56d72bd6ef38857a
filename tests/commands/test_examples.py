"""The programs in examples/ run, and print what they promise."""

import importlib.util

import pytest

from tests.helpers.command import ROOT


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_federated_statistics_are_those_of_all_clients_and_an_average_of_variances_is_not(capsys):
    found = load("federated").main()
    assert found["merged"] == pytest.approx(found["true"], rel=1e-5)
    assert found["average of variances"] < found["true"] / 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0].strip() for line in lines] == list(found)
