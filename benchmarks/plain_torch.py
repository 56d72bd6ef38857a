"""A plain PyTorch loop for a job: `python -m benchmarks.plain_torch CONFIG.toml [--data PATH]`."""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn

from train import data
from train.config import Model, load, total_steps


def network(config: Model, features: int, classes: int) -> nn.Sequential:
    """Builds the network, with PyTorch's own initial weights; `features` are channels for the cnn."""
    convolutional, layers = config.name == "cnn", []
    for width in config.widths:
        for _ in range(2 if convolutional else 1):
            if convolutional:
                layers += [nn.Conv2d(features, width, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(width, momentum=1 - config.norm_momentum)]
            else:
                layers += [nn.Linear(features, width, bias=False)]
                layers += [nn.BatchNorm1d(width, momentum=1 - config.norm_momentum)]
            layers += [nn.ReLU()]
            features = width
        layers += [nn.MaxPool2d(2)] if convolutional else []
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if convolutional else []
    return nn.Sequential(*layers, nn.Linear(features, classes))


def main(path: Path, data_path: str | None) -> dict[str, float]:
    """Trains, and returns the seconds of all steps but the first, and the accuracies after the last."""
    config = load(path, ["--data.path", data_path] if data_path else [])
    dataset = data.load(config.data)

    def tensors(split):
        inputs, labels = split.take(slice(None))
        inputs, labels = torch.from_numpy(dataset.preprocessing(inputs)), torch.from_numpy(labels).long()
        if config.model.name == "cnn":
            return inputs.permute(0, 3, 1, 2).contiguous(), labels
        return inputs.flatten(1), labels

    torch.manual_seed(config.seed)
    inputs, labels = tensors(dataset.train)
    per_epoch = data.steps_per_epoch(len(labels), config.batch_size)
    steps, settings = total_steps(config, per_epoch), config.optimizer
    model = network(config.model, inputs.shape[1], dataset.classes)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others}],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss_of = nn.CrossEntropyLoss()

    model.train()
    for step in range(steps):
        epoch, batch = divmod(step, per_epoch)
        if batch == 0:
            order = torch.from_numpy(data.order(config.seed, epoch, len(labels)))
        rows = order[batch * config.batch_size : (batch + 1) * config.batch_size]
        optimizer.zero_grad()
        loss_of(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
        if step == 0:
            started = time.perf_counter()
    seconds = time.perf_counter() - started

    model.eval()
    found, splits = {}, {"validation_accuracy": dataset.validation, "test_accuracy": dataset.test}
    with torch.inference_mode():
        for name, split in splits.items():
            inputs, labels = tensors(split)
            found[name] = float((model(inputs).argmax(1) == labels).float().mean())
    return {"steps": steps - 1, "seconds": seconds, **found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--data")
    arguments = parser.parse_args()
    print(json.dumps(main(arguments.config, arguments.data)))
