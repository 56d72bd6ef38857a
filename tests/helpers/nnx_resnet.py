"""torchvision's ResNets in NNX, as a user would write them, for images with channels last."""

from flax import nnx

import jbn.nnx
from tests.helpers.torch_weights import ARCHITECTURES


class ConvNorm(nnx.Module):
    def __init__(self, into, out, size, strides, rngs):
        pad = size // 2
        self.conv = nnx.Conv(into, out, (size, size), strides, padding=pad, use_bias=False, rngs=rngs)
        self.norm = jbn.nnx.BatchNorm(out, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class Block(nnx.Module):
    def __init__(self, into, width, out, sizes, strides, rngs):
        self.shortcut = ConvNorm(into, out, 1, strides, rngs) if strides > 1 or into != out else None
        self.layers = nnx.List()
        for number, size in enumerate(sizes, start=1):
            filters = out if number == len(sizes) else width
            # The layer before the last one strides.
            self.layers.append(
                ConvNorm(into, filters, size, strides if number == len(sizes) - 1 else 1, rngs)
            )
            into = filters

    def __call__(self, x):
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for layer in list(self.layers)[:-1]:
            x = nnx.relu(layer(x))
        return nnx.relu(self.layers[-1](x) + shortcut)


class ResNet(nnx.Module):
    def __init__(self, name, classes, rngs):
        blocks, sizes, expansion = ARCHITECTURES[name]
        self.stem = ConvNorm(3, 64, 7, 2, rngs)
        self.stages, into = nnx.List(), 64
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            out, stage_blocks = expansion * width, nnx.List()
            for block in range(count):
                strides = 2 if stage and not block else 1
                stage_blocks.append(Block(into, width, out, sizes, strides, rngs))
                into = out
            self.stages.append(stage_blocks)
        self.head = nnx.Linear(into, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.stem(x)), (3, 3), (2, 2), padding=[(1, 1), (1, 1)])
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean((1, 2)))


def torchvision_names(model):
    """Return {"stages/0/1/layers/0/conv": "layer1.1.conv1", ...}."""
    names = {"stem/conv": "conv1", "stem/norm": "bn1", "head": "fc"}
    for s, stage in enumerate(model.stages):
        for b, block in enumerate(stage):
            ours, theirs = f"stages/{s}/{b}", f"layer{s + 1}.{b}"
            for number in range(len(block.layers)):
                at = f"{ours}/layers/{number}"
                names[f"{at}/conv"], names[f"{at}/norm"] = (
                    f"{theirs}.{kind}{number + 1}" for kind in ("conv", "bn")
                )
            if block.shortcut is not None:
                at = f"{ours}/shortcut"
                names[f"{at}/conv"], names[f"{at}/norm"] = f"{theirs}.downsample.0", f"{theirs}.downsample.1"
    return names
