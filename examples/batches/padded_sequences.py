"""Sequences padded to one length: a mask of shape (batch, time, 1) keeps the padding out of the statistics.

With it, statistics are those of the real steps, and outputs stay the same however long the padding is.
Without it, both depend on the longest sequence of the batch.

    python examples/batches/padded_sequences.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jbn.linen

SEQUENCES, FEATURES, LONGEST = 64, 8, 100


class Model(nn.Module):
    """A convolution over time, a norm, and the mean over the real steps."""

    masked: bool

    @nn.compact
    def __call__(self, x, lengths):
        real = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]  # (batch, time, 1)
        x = nn.Conv(16, (5,), use_bias=False)(x)
        norm = jbn.linen.BatchNorm(use_running_average=False, momentum=0, name="norm")
        x = nn.relu(norm(x, mask=real if self.masked else None))
        x = jnp.sum(x, axis=1, where=real) / lengths[:, None]
        return nn.Dense(1)(x)


def pad(sequences, length):
    return np.stack([np.pad(x, ((0, length - len(x)), (0, 0))) for x in sequences])


def main() -> dict[str, float]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, LONGEST, SEQUENCES)
    sequences = [rng.normal(5, 1, (length, FEATURES)).astype(np.float32) for length in lengths]
    x, longer = pad(sequences, LONGEST), pad(sequences, 2 * LONGEST)
    variables = jax.jit(Model(masked=True).init)(jax.random.key(0), x, lengths)

    # What the norm should have seen: the convolution of each sequence, one after the other.
    kernel = np.asarray(variables["params"]["Conv_0"]["kernel"], np.float64)
    windows = [np.lib.stride_tricks.sliding_window_view(np.pad(s, ((2, 2), (0, 0))), 5, 0) for s in sequences]
    true = np.einsum("nct,tcf->nf", np.concatenate(windows), kernel).var(0)

    found = {}
    for masked in True, False:
        name = "masked" if masked else "not masked"
        apply = jax.jit(Model(masked).apply, static_argnames="mutable")
        y, updated = apply(variables, x, lengths, mutable=("batch_stats",))
        y_longer, _ = apply(variables, longer, lengths, mutable=("batch_stats",))
        ratio = np.mean(updated["batch_stats"]["norm"]["var"] / true)
        change = np.abs(np.asarray(y) - y_longer).max()
        found[f"variance / true variance, {name}"] = float(ratio)
        found[f"change of outputs with twice the padding, {name}"] = float(change)
    for name, value in found.items():
        print(f"{name}: {value:.3g}")
    return found


if __name__ == "__main__":
    main()
