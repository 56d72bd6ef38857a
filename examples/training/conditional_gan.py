"""A GAN of digits whose generator knows the class through the scale and bias of its norms alone.

A norm without parameters of its own gets a scale and a bias for each example, here rows of tables that are
learnt, one row a class. A classifier of real digits says whether the generator draws the class asked for.

    python examples/training/conditional_gan.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import jbn.linen

STEPS, BATCH_SIZE, WIDTH, NOISE, LEARNING_RATE = 2000, 64, 64, 16, 1e-3
CLASSES, PIXELS = 10, 64


class ConditionalNorm(nn.Module):
    @nn.compact
    def __call__(self, x, label, train):
        scale = nn.Embed(CLASSES, x.shape[-1], embedding_init=nn.initializers.ones, name="scale")(label)
        bias = nn.Embed(CLASSES, x.shape[-1], embedding_init=nn.initializers.normal(1), name="bias")(label)
        norm = jbn.linen.BatchNorm(use_scale=False, use_bias=False, momentum=0.9)
        return norm(x, use_running_average=not train, scale=scale, bias=bias)


class Generator(nn.Module):
    @nn.compact
    def __call__(self, noise, label, train):
        x = noise
        for _ in range(2):
            x = nn.relu(ConditionalNorm()(nn.Dense(WIDTH, use_bias=False)(x), label, train))
        return nn.sigmoid(nn.Dense(PIXELS)(x))


class Discriminator(nn.Module):
    """Says whether an image is a real one of its class."""

    @nn.compact
    def __call__(self, x, label):
        x = nn.leaky_relu(nn.Dense(2 * WIDTH)(x), 0.2)
        x = nn.leaky_relu(nn.Dense(WIDTH)(x), 0.2)
        return nn.Dense(1)(x)[:, 0] + jnp.sum(x * nn.Embed(CLASSES, WIDTH)(label), axis=-1)


def main(steps: int = STEPS) -> dict[str, float]:
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    generator, discriminator = Generator(), Discriminator()
    keys = jax.random.split(jax.random.key(0), 3)
    variables = jax.jit(generator.init, static_argnums=3)(keys[0], jnp.zeros((1, NOISE)), labels[:1], False)
    params = {
        "generator": variables["params"],
        "discriminator": jax.jit(discriminator.init)(keys[1], images[:1], labels[:1])["params"],
    }
    optimizer = optax.adam(LEARNING_RATE, b1=0.5)

    def step(carry, key):
        params, batch_stats, opt_state = carry
        of_noise, of_rows = jax.random.split(key)
        noise = jax.random.normal(of_noise, (BATCH_SIZE, NOISE))
        rows = jax.random.randint(of_rows, (BATCH_SIZE,), 0, len(images))
        real, label = images[rows], labels[rows]

        def loss(params):
            """One loss, of which each network sees its own part."""
            fixed = jax.lax.stop_gradient(params)
            variables = {"params": params["generator"], "batch_stats": batch_stats}
            fake, updated = generator.apply(variables, noise, label, True, mutable=["batch_stats"])
            judge = lambda params, x: discriminator.apply({"params": params["discriminator"]}, x, label)
            of_discriminator = nn.softplus(-judge(params, real)) + nn.softplus(
                judge(params, jax.lax.stop_gradient(fake))
            )
            of_generator = nn.softplus(-judge(fixed, fake))
            return jnp.mean(of_discriminator + of_generator), updated["batch_stats"]

        grads, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), None

    carry = params, variables["batch_stats"], optimizer.init(params)
    carry, _ = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))(
        carry, jax.random.split(keys[2], steps)
    )
    variables = {"params": carry[0]["generator"], "batch_stats": carry[1]}

    # Inference: every class a hundred times, from the same noise.
    asked = np.repeat(np.arange(CLASSES), 100)
    noise = np.tile(np.random.default_rng(0).normal(size=(100, NOISE)).astype(np.float32), (CLASSES, 1))
    drawn = np.asarray(jax.jit(generator.apply, static_argnums=3)(variables, noise, asked, False))
    images, labels = np.asarray(images), np.asarray(labels)
    classifier = KNeighborsClassifier(1).fit(images, labels)
    spread = lambda x, y: np.mean([x[y == label].std(0).mean() for label in range(CLASSES)])
    found = {
        "drawn digits that are of the class asked for": float(np.mean(classifier.predict(drawn) == asked)),
        "spread within a class, drawn / real": float(spread(drawn, asked) / spread(images, labels)),
    }
    for name, value in found.items():
        print(f"{name}: {value:.2f}")
    return found


if __name__ == "__main__":
    main()
