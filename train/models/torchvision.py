"""What torchvision calls the layers of our residual networks for large images."""

from collections.abc import Mapping
from typing import Any

from train.config import NetworkName

NAMED: tuple[NetworkName, ...] = ("resnet18", "resnet50")
HEAD = "fc"


def torchvision_names(params: Mapping[str, Any]) -> dict[str, str]:
    """Return torchvision's name of each layer of a `ResNet`, by our path: {"stem/Conv_0": "conv1", ...}."""
    names = {"Dense_0": HEAD} | _convolution("stem", "conv1", "bn1")
    for block in filter(lambda name: name.startswith("stage"), params):  # stage0_block0 is layer1.0
        stage, index = block.removeprefix("stage").split("_block")
        theirs = f"layer{int(stage) + 1}.{index}"
        for ours in params[block]:
            number = int(ours.removeprefix("Convolution_")) + 1 if ours != "shortcut" else 0
            pair = (f"conv{number}", f"bn{number}") if number else ("downsample.0", "downsample.1")
            names |= _convolution(f"{block}/{ours}", *(f"{theirs}.{name}" for name in pair))
    return names


def _convolution(path: str, convolution: str, norm: str) -> dict[str, str]:
    return {f"{path}/Conv_0": convolution, f"{path}/BatchNorm_0": norm}
