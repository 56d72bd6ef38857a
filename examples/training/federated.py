"""Ten clients, one model: their batch norm statistics merged, beside the average of variances that is usual.

Each client has its own data, with a mean of its own, and sends the running statistics of a shared model to a
server. An average of variances drops the spread between the clients; `jbn.merge_trees` keeps it.

    python examples/training/federated.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jbn
import jbn.linen

CLIENTS, BATCH_SIZE = 10, 50


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return jbn.linen.BatchNorm(use_running_average=not train, update=jbn.pooled())(x)


def main() -> dict[str, float]:
    rng = np.random.default_rng(0)
    batches = [int(number) for number in rng.integers(1, 40, CLIENTS)]
    means = rng.permutation(np.linspace(-2.2, 2.2, CLIENTS))
    data = [rng.normal(mean, 1, (n, BATCH_SIZE, 1)).astype(np.float32) for n, mean in zip(batches, means)]
    model = Model()
    start = model.init(jax.random.key(0), data[0][0], train=False)

    # On each client: an epoch of training, of which the statistics alone matter here.
    @jax.jit
    def update(variables, batch):
        _, updated = model.apply(variables, batch, train=True, mutable=["batch_stats"])
        return variables | updated

    clients = []
    for x in data:
        variables = start
        for batch in x:
            variables = update(variables, batch)
        clients.append(variables["batch_stats"]["BatchNorm_0"])

    # On the server. For layers that count no samples, as Flax's own, `counts=sizes` would be needed.
    sizes = [x.size for x in data]
    merged = jbn.merge_trees(*clients)
    average = np.average([client["var"] for client in clients], axis=0, weights=sizes)
    true = np.concatenate(data).astype(np.float64).var((0, 1))
    assert jnp.allclose(merged["count"], sum(sizes))

    variances = {"true": true, "merged": merged["var"], "average of variances": average}
    variances = {name: float(value[0]) for name, value in variances.items()}
    for name, variance in variances.items():
        print(f"{name:>20}: {variance:.3f}")
    return variances


if __name__ == "__main__":
    main()
