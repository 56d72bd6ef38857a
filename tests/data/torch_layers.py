"""Writes torch_layers.json beside itself: what small networks of PyTorch compute, for tests without PyTorch.

pip install torch==2.13.0 numpy && PYTHONPATH=. python tests/data/torch_layers.py
"""

import json
from pathlib import Path

import torch
from torch import nn

from tests.helpers.torch_weights import LAYERS, images, layers


def networks():
    """Sizes are even where strides are 2, so that a wrong padding shows, and paddings are unequal."""
    one = nn.Sequential(
        nn.Conv1d(4, 8, 4, stride=2, padding=1),
        nn.BatchNorm1d(8, eps=1e-3),
        nn.ReLU(),
        nn.Conv1d(8, 8, 3, padding=1, groups=4, bias=False),
        nn.GroupNorm(2, 8),
        nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1),
        nn.BatchNorm1d(8, affine=False),
        nn.ReLU(),
        nn.ConvTranspose1d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Flatten(),
        nn.LayerNorm(6 * 20),
        nn.Linear(6 * 20, 3),
    )
    two = nn.Sequential(
        nn.ConvTranspose2d(
            4, 4, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2)
        ),
        nn.Conv2d(4, 4, 3, padding=(2, 0), groups=4, dilation=(1, 2)),
    )
    return {"one": one, "two": two}


def main():
    data = {"torch": torch.__version__}
    for name, network in networks().items():
        expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        assert list(expected.items()) == list(LAYERS[name][1].items()), expected
        network.load_state_dict({key: torch.tensor(value) for key, value in layers(name).items()})
        x = torch.tensor(images(*LAYERS[name][0])).movedim(-1, 1)
        y = network.eval()(x).detach()
        y = y if y.ndim == 2 else y.movedim(1, -1)
        data[name] = {"shape": tuple(y.shape), "y": [round(value, 6) for value in y.flatten().tolist()]}
    Path(__file__).with_suffix(".json").write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
