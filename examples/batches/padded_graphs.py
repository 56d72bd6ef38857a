"""Graphs that jraph has padded to one size: the norm's mask is that of the real nodes.

Padding holds NaN here, which reaches neither statistics nor gradients: they are those of the graphs without
padding. With zeros in the padding and no mask, as is usual, they are others.

    python examples/batches/padded_graphs.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

import jbn.linen

GRAPHS, FEATURES = 20, 4
PADDED = 256, 512, GRAPHS + 1  # nodes, edges and graphs; jraph has one graph for all padding


class Model(nn.Module):
    """Two rounds of messages, and a number for each graph."""

    @nn.compact
    def __call__(self, graphs, real):
        nodes, sizes = graphs.nodes, graphs.n_node
        for width in 16, 16:
            # The first norm gets the nodes as they come: what is not finite in the padding ends here.
            nodes = jbn.linen.BatchNorm(use_running_average=False, momentum=0)(nodes, mask=real)
            received = jax.ops.segment_sum(nodes[graphs.senders], graphs.receivers, len(nodes))
            nodes = nn.relu(nn.Dense(width)(nodes) + nn.Dense(width)(received))
        graph_of_node = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(nodes))
        return nn.Dense(1)(jax.ops.segment_sum(nodes, graph_of_node, len(sizes)))[:, 0]


def random_graph(rng):
    nodes = rng.integers(3, 12)
    senders, receivers = rng.integers(0, nodes, (2, 2 * nodes))
    features = rng.normal(3, 2, (nodes, FEATURES)).astype(np.float32)
    sizes = {"n_node": np.array([nodes]), "n_edge": np.array([2 * nodes])}
    return jraph.GraphsTuple(features, None, receivers, senders, None, **sizes)


def main() -> dict[str, float]:
    rng = np.random.default_rng(0)
    graphs = jraph.batch_np([random_graph(rng) for _ in range(GRAPHS)])
    targets = rng.normal(0, 1, GRAPHS).astype(np.float32)
    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), graphs, None)

    @jax.jit
    def gradients_and_statistics(graphs, real):
        def loss(params):
            predicted, updated = model.apply(
                {**variables, "params": params}, graphs, real, mutable=["batch_stats"]
            )
            return jnp.mean((predicted[:GRAPHS] - targets) ** 2), updated["batch_stats"]

        return jax.grad(loss, has_aux=True)(variables["params"])

    padded = jraph.pad_with_graphs(graphs, *PADDED)
    real = jraph.get_node_padding_mask(padded)[:, None]
    with_nan = padded._replace(nodes=np.where(real, padded.nodes, np.nan))

    expected = jax.device_get(gradients_and_statistics(graphs, None))
    masked = jax.device_get(gradients_and_statistics(with_nan, real))
    unmasked = jax.device_get(gradients_and_statistics(padded, None))

    def difference(a, b):
        return max(float(abs(x - y).max() / abs(y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b))))

    found = {}
    for case, results in {"NaN, masked": masked, "zeros, not masked": unmasked}.items():
        for name, result, value in zip(("gradients", "statistics"), results, expected):
            found[f"{name}, {case}"] = difference(result, value)
    print("relative difference to graphs without padding")
    for name, value in found.items():
        print(f"{name:>29}: {value:.1e}")
    return found


if __name__ == "__main__":
    main()
