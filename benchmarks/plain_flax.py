"""A plain Flax loop for a job: `python -m benchmarks.plain_flax CONFIG.toml [--data PATH]`."""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from train import data
from train.config import Model, load, total_steps


class Net(nn.Module):
    config: Model
    classes: int

    @nn.compact
    def __call__(self, x, train):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=self.config.norm_momentum)
        convolutional = self.config.name == "cnn"
        x = x if convolutional else x.reshape(len(x), -1)
        for width in self.config.widths:
            for _ in range(2 if convolutional else 1):
                layer = (
                    nn.Conv(width, (3, 3), use_bias=False)
                    if convolutional
                    else nn.Dense(width, use_bias=False)
                )
                x = nn.relu(norm()(layer(x)))
            x = nn.max_pool(x, (2, 2), (2, 2)) if convolutional else x
        return nn.Dense(self.classes)(x.mean((1, 2)) if convolutional else x)


def main(path: Path, data_path: str | None) -> dict[str, float]:
    """Trains, and returns the seconds of all steps but the first, and the accuracies after the last."""
    config = load(path, ["--data.path", data_path] if data_path else [])
    dataset = data.load(config.data)
    train, validation, test = (_examples(dataset, split) for split in dataset[:3])
    inputs, labels = train
    per_epoch = data.steps_per_epoch(len(labels), config.batch_size)
    steps, settings = total_steps(config, per_epoch), config.optimizer
    optimizer = optax.chain(
        optax.add_decayed_weights(
            settings.weight_decay, mask=partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
        ),
        optax.sgd(
            optax.cosine_decay_schedule(settings.learning_rate, steps), settings.momentum, nesterov=True
        ),
    )
    model = Net(config.model, dataset.classes)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(config.seed), inputs[:1])
    params, batch_stats = variables["params"], variables["batch_stats"]

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, inputs, labels, rows):
        params, batch_stats, opt_state = state

        def mean_loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = model.apply(variables, inputs[rows], train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
            return losses.mean(), updated["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

    @jax.jit
    def accuracy(params, batch_stats, split):
        inputs, labels = split
        logits = model.apply({"params": params, "batch_stats": batch_stats}, inputs, train=False)
        return jnp.mean(logits.argmax(-1) == labels)

    state = params, batch_stats, optimizer.init(params)
    for step in range(steps):
        epoch, batch = divmod(step, per_epoch)
        if batch == 0:
            order = data.order(config.seed, epoch, len(labels))
        rows = order[batch * config.batch_size : (batch + 1) * config.batch_size]
        state, loss = train_step(state, inputs, labels, rows)
        if step == 0:
            loss.block_until_ready()
            started = time.perf_counter()
    jax.block_until_ready(state)
    seconds = time.perf_counter() - started
    splits = {"validation_accuracy": validation, "test_accuracy": test}
    found = {name: float(accuracy(*state[:2], split)) for name, split in splits.items()}
    return {"steps": steps - 1, "seconds": seconds, **found}


def _examples(dataset: data.Dataset, split: data.Split) -> tuple[jax.Array, jax.Array]:
    inputs, labels = split.take(slice(None))
    return jax.device_put((dataset.preprocessing(inputs), labels))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--data")
    arguments = parser.parse_args()
    print(json.dumps(main(arguments.config, arguments.data)))
