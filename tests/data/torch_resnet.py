"""Writes torch_resnet.json beside itself: what torchvision's ResNets compute, for tests without PyTorch.

pip install torch==2.13.0 torchvision==0.28.0 numpy && PYTHONPATH=. python tests/data/torch_resnet.py
"""

import json
from pathlib import Path

import torch
import torchvision

from tests.helpers.torch_weights import ARCHITECTURES, images, shapes, weights

# Paddings differ where sizes are even: heights are at every stride, some widths are not.
INPUT = (2, 64, 71, 3)


def logits(name):
    network = torchvision.models.get_model(name, num_classes=10)
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert list(expected.items()) == list(shapes(name).items())
    network.load_state_dict({key: torch.tensor(value) for key, value in weights(name).items()})
    with torch.no_grad():
        return network.eval()(torch.tensor(images(*INPUT)).permute(0, 3, 1, 2)).tolist()


def main():
    data = {"torch": torch.__version__, "torchvision": torchvision.__version__, "input": INPUT}
    data |= {name: logits(name) for name in ARCHITECTURES}
    Path(__file__).with_suffix(".json").write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
