"""A big batch in little memory: rematerialisation that keeps the moments, and never measures them again.

Gradients accumulated over small batches are not those of the big batch, since each is normalized with moments
of its own. Those of checkpointed blocks are: a block keeps its input and the moments, whose name is
"batch_norm_moments", and makes everything else again in the backward pass.

    python examples/batches/big_batch.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import jbn.linen

BATCH_SIZE, SIZE, FEATURES, BLOCKS = 64, 16, 32, 3
POLICIES = {
    "all kept": jax.checkpoint_policies.everything_saveable,
    "moments kept": jax.checkpoint_policies.save_only_these_names("batch_norm_moments"),
    "nothing kept": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Conv(FEATURES, (3, 3), use_bias=False)(x)
            x = nn.relu(jbn.linen.BatchNorm(use_running_average=False)(x))
        return x


class Model(nn.Module):
    policy: str
    blocks: int

    @nn.compact
    def __call__(self, x):
        checkpointed = nn.remat(Block, policy=POLICIES[self.policy])
        for i in range(self.blocks):
            x = checkpointed(name=f"block{i}")(x)
        return nn.Dense(1)(x.mean((1, 2)))


def main(blocks: int = BLOCKS) -> dict[str, float]:
    x = jax.random.normal(jax.random.key(0), (BATCH_SIZE, SIZE, SIZE, 3))
    variables = jax.jit(Model("all kept", blocks).init)(jax.random.key(1), x)
    # Before jax 0.12, XLA's passes for CPUs undo rematerialisation.
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if jax.default_backend() == "cpu" else {}
    found, gradients = {}, {}
    for policy in POLICIES:

        def loss(params, x, model=Model(policy, blocks)):
            y, _ = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.mean(y**2)

        program = jax.jit(jax.grad(loss)).lower(variables["params"], x).compile(compiler_options=options)
        gradients[policy] = jax.device_get(program(variables["params"], x))
        found[f"temporary MB, {policy}"] = program.memory_analysis().temp_size_in_bytes / 1e6
        found[f"sums over the batch, {policy}"] = program.as_text().count(" reduce(")
    for policy in list(POLICIES)[1:]:
        pairs = zip(*map(jax.tree.leaves, (gradients[policy], gradients["all kept"])))
        change = max(abs(a - b).max() / abs(b).max() for a, b in pairs)
        found[f"change of gradients, {policy}"] = float(change)
    for name, value in found.items():
        print(f"{name}: {value:.3g}")
    return found


if __name__ == "__main__":
    main()
