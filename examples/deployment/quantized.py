"""Inference in small integers: norms are folded into the layers before them, and their kernels quantized.

Digits, in products of integers that are added up in int32. With 8 bits it is enough to quantize after
training, and 3 lose a point, which training with them does not win back. With 2, which are -1, 0 and 1, the
network has to be trained so: each step rounds kernels as inference will have them, folded by the scale of
`jbn.as_affine` (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.2).

    python examples/deployment/quantized.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jbn

STEPS, BATCH_SIZE, WIDTHS, LEARNING_RATE, FEW_BITS = 300, 64, (64, 64, 64, 10), 1e-2, 2


def init(key):
    """Return kernels and norms of dense layers, each with a norm after it, and the norms' running moments."""
    keys = jax.random.split(key, len(WIDTHS) - 1)
    shapes = zip(WIDTHS[:-1], WIDTHS[1:])
    kernels = [jax.nn.initializers.he_normal()(key, shape) for key, shape in zip(keys, shapes)]
    norms, running = zip(*(jbn.init(width) for width in WIDTHS[1:]))
    return (kernels, list(norms)), list(running)


def quantize(kernel, bits):
    """Return integers and the step of each output: kernel is about integers * steps."""
    steps = jnp.abs(kernel).max(0) / (2 ** (bits - 1) - 1)
    return jnp.round(kernel / steps), steps


def rounded_as_folded(kernel, norm, moments, bits):
    scale, _ = jax.lax.stop_gradient(jbn.as_affine(norm, moments))
    integers, steps = quantize(kernel * scale, bits)
    return kernel + jax.lax.stop_gradient(integers * steps / scale - kernel)  # the gradient passes through


def forward(params, running, x, train, bits=None):
    """Return logits and new running moments."""
    new = []
    for i, (kernel, norm, moments) in enumerate(zip(*params, running)):
        if bits:
            kernel = rounded_as_folded(kernel, norm, moments, bits)
        x = jax.nn.relu(x) if i else x
        x, moments = jbn.batch_norm(x @ kernel, norm, moments, train=train, update=jbn.ema(0.9, debias=True))
        new.append(moments)
    return x, new


def integer_inference(params, running, x, bits):
    for i, (kernel, norm, moments) in enumerate(zip(*params, running)):
        kernel, bias = jbn.fold(kernel, None, norm, moments)
        integers, steps = quantize(kernel, bits)
        x = jax.nn.relu(x) if i else x
        step_of_x = jnp.abs(x).max() / 127
        products = jax.lax.dot(
            jnp.round(x / step_of_x).astype(jnp.int8),
            integers.astype(jnp.int8),
            preferred_element_type=jnp.int32,
        )
        x = products * (step_of_x * steps) + bias
    return x


def trained(x, y, bits, steps):
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    params, running = init(jax.random.key(0))

    def step(carry, key):
        params, running, opt_state = carry
        rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(x))

        def loss(params):
            logits, new = forward(params, running, x[rows], True, bits)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean(), new

        grads, running = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), running, opt_state), None

    carry = params, running, optimizer.init(params)
    keys = jax.random.split(jax.random.key(1), steps)
    (params, running, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(carry)
    return params, running


def main(steps: int = STEPS) -> dict[str, float]:
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    x, x_test, y, y_test = x[:-400], x[-400:], y[:-400], np.asarray(y[-400:])
    usual, aware = (trained(x, y, bits, steps) for bits in (None, FEW_BITS))

    accuracy = lambda logits: float(np.mean(np.asarray(logits).argmax(-1) == y_test))
    integers = jax.jit(integer_inference, static_argnums=3)
    found = {
        "float32": accuracy(jax.jit(forward, static_argnums=3)(*usual, x_test, False)[0]),
        "8 bits": accuracy(integers(*usual, x_test, 8)),
        f"{FEW_BITS} bits": accuracy(integers(*usual, x_test, FEW_BITS)),
        f"{FEW_BITS} bits, trained so": accuracy(integers(*aware, x_test, FEW_BITS)),
    }
    for name, value in found.items():
        print(f"test accuracy, {name}: {value:.3f}")
    return found


if __name__ == "__main__":
    main()
