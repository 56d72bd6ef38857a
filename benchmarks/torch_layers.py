"""Batch normalization of PyTorch, channels last and channels first."""

import time
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.worker import Candidate


def prepare(case: dict[str, Any]) -> dict[str, Candidate]:
    """Makes the layer in both layouts; nothing where PyTorch has no such layer."""
    case = Case(**case | {"shape": tuple(case["shape"])})
    if case.mask or case.devices > 1:
        return {}
    layouts = ["channels last", "channels first"][case.channels_first :]
    layouts = layouts if len(case.shape) == 4 else ["channels last"]
    return {f"torch, {layout}": _candidate(case, layout) for layout in layouts}


def _candidate(case, layout):
    torch.manual_seed(0)
    channels = case.shape[-1]
    kind = torch.nn.BatchNorm2d if len(case.shape) == 4 else torch.nn.BatchNorm1d
    layer = kind(channels, momentum=0.01).train(case.mode != "inference")
    shape = (case.shape[0], channels, *case.shape[1:-1])
    x, dy = (torch.randn(shape).add_(mean).to(getattr(torch, case.dtype)) for mean in (case.mean, 0))
    if len(shape) == 4 and layout == "channels last":
        x, dy = (array.to(memory_format=torch.channels_last) for array in (x, dy))
    backward = case.mode == "forward+backward"
    x.requires_grad_(backward)

    def seconds():
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            y = layer(x)
            y = torch.relu(y) if case.relu else y
            if backward:
                torch.autograd.grad(y, (x, *layer.parameters()), dy)
        return time.perf_counter() - start

    return Candidate(seconds, {})
