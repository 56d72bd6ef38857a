"""Writes torch_batch_norm.json beside itself: what PyTorch's own layer computes, for tests without PyTorch.

pip install torch==2.13.0 numpy && python tests/data/torch_batch_norm.py
"""

import json
from pathlib import Path

import numpy as np
import torch

FEATURES, BATCHES = 3, 4


def run(momentum):
    rng = np.random.RandomState(0)
    layer = torch.nn.BatchNorm1d(FEATURES, momentum=momentum, eps=1e-5)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.0, -1.0, 1.0]))
    steps = []
    for rows in range(2, 2 + BATCHES):
        x = torch.tensor(rng.normal(3, 2, (rows, FEATURES)).round(2), dtype=torch.float32, requires_grad=True)
        target = torch.tensor(rng.normal(0, 1, (rows, FEATURES)).round(2), dtype=torch.float32)
        layer.zero_grad()
        y = layer(x)
        (torch.sin(y) * target).sum().backward()
        steps.append(
            {
                "x": x,
                "target": target,
                "y": y,
                "dx": x.grad,
                "dscale": layer.weight.grad.clone(),
                "dbias": layer.bias.grad.clone(),
                "running_mean": layer.running_mean.clone(),
                "running_var": layer.running_var.clone(),
            }
        )
    inference = layer.eval()(steps[0]["x"])
    return {
        "momentum": momentum,
        "scale": layer.weight.tolist(),
        "bias": layer.bias.tolist(),
        "steps": [{name: value.tolist() for name, value in step.items()} for step in steps],
        "inference": inference.tolist(),
    }


def main():
    runs = [run(momentum) for momentum in (0.1, 0.5, None)]
    data = {"torch": torch.__version__, "runs": runs}
    Path(__file__).with_suffix(".json").write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
