"""What PyTorch's `update_bn` makes of averaged weights: writes torch_update_bn.npz, beside this file.

pip install torch==2.13.0 scikit-learn && python tests/data/torch_update_bn.py

A network is trained on the digits in batches of 4, its weights are averaged over the second half, and the
running statistics of the averaged network are computed over batches of 4 too.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

BATCH, TRAIN, EPOCHS = 4, 1436, 6
torch.manual_seed(0)


def make():
    layers = [nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU()]
    layers += [nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)]
    return nn.Sequential(*layers)


def metrics(model):
    model.eval()
    with torch.no_grad():
        logits = model(x[TRAIN:])
    loss = nn.functional.cross_entropy(logits, labels[TRAIN:]).item()
    return [loss, (logits.argmax(1) == labels[TRAIN:]).float().mean().item()]


digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
model = make()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
averaged = AveragedModel(model)
for epoch in range(EPOCHS):
    for rows in torch.randperm(TRAIN).split(BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
    if epoch >= EPOCHS // 2:
        averaged.update_parameters(model)
weights = {f"before/{name}": value.numpy().copy() for name, value in averaged.module.state_dict().items()}
before = metrics(averaged.module)
update_bn(x[:TRAIN].split(BATCH), averaged.module)
after = metrics(averaged.module)
state = averaged.module.state_dict()
updated = {f"update_bn/{name}": state[name].numpy() for name in state if "running" in name}
path = Path(__file__).with_suffix(".npz")
np.savez_compressed(path, **weights, **updated, metrics_before=before, metrics_update_bn=after)
print("test loss and accuracy before", before, "with update_bn", after)
