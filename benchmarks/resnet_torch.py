"""The training steps of `benchmarks.resnet_jax` in PyTorch, with channels last in memory."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.worker import Candidate


def convolution(norm: bool, inputs: int, filters: int, size: int, strides: int) -> nn.Module:
    conv = nn.Conv2d(inputs, filters, size, strides, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(filters)) if norm else conv


class Block(nn.Module):
    """Convolutions of one or several sizes, and a shortcut around them."""

    def __init__(self, norm: bool, inputs: int, filters: Sequence[int], sizes: Sequence[int], strides: int):
        super().__init__()
        layers, before = [], inputs
        for i, (after, size) in enumerate(zip(filters, sizes)):
            layers.append(convolution(norm, before, after, size, strides if i == sizes.index(3) else 1))
            before = after
        self.layers = nn.ModuleList(layers)
        same = inputs == before and strides == 1
        self.shortcut = nn.Identity() if same else convolution(norm, inputs, before, 1, strides)

    def forward(self, x):
        y = self.layers[0](x)
        for layer in self.layers[1:]:
            y = layer(F.relu(y, inplace=True))
        return F.relu(y.add_(self.shortcut(x)), inplace=True)


def resnet(norm: bool, case: dict[str, Any]) -> nn.Module:
    """Makes a residual network of basic blocks or bottlenecks: He et al. 2016."""
    inputs, bottleneck = case["filters"], case["bottleneck"]
    size, strides = (7, 2) if bottleneck else (3, 1)
    layers = [convolution(norm, 3, inputs, size, strides), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(3, 2, 1)] if bottleneck else []
    for stage, blocks in enumerate(case["stages"]):
        f = case["filters"] * 2**stage
        filters, sizes = ((f, f, 4 * f), (1, 3, 1)) if bottleneck else ((f, f), (3, 3))
        for i in range(blocks):
            layers.append(Block(norm, inputs, filters, sizes, 2 if stage and not i else 1))
            inputs = filters[-1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, case["classes"]))


def prepare(case: dict[str, Any]) -> dict[str, Candidate]:
    """Makes the models, each with an optimizer and random data."""
    torch.manual_seed(0)
    images = torch.randn(case["batch"], 3, case["size"], case["size"])
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(case["classes"], (case["batch"],))
    return {
        name: _candidate(resnet(norm, case), images, labels)
        for name, norm in {"torch": True, "torch without norm": False}.items()
    }


def _candidate(model, images, labels):
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def seconds():
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - start

    return Candidate(seconds, {"residual bytes": _residual_bytes(model, images, labels)})


def _residual_bytes(model, images, labels):
    """Counts what autograd saves, each storage once, beyond parameters, statistics and data."""
    kept = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        value = F.cross_entropy(model(images), labels)
    for known in (images, labels, *model.parameters(), *model.buffers()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    del value  # until here the graph held every storage, so that no address was used twice
    return sum(kept.values())
