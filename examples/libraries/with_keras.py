"""A Keras layer over jbn, on Keras' JAX backend, in `model.fit` as any other.

It trains on digits for one epoch beside `keras.layers.BatchNormalization`, both with the momentum that Keras
has by default, 0.99. Debiased running statistics are right from the first step on.

    python examples/libraries/with_keras.py
"""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import keras
import numpy as np
from sklearn.datasets import load_digits

import jbn

EPOCHS, BATCH_SIZE, WIDTH, LEARNING_RATE = 1, 32, 64, 3e-3


class BatchNorm(keras.layers.Layer):
    def __init__(self, update=jbn.ema(0.99, debias=True), epsilon=1e-3, **kwargs):
        super().__init__(**kwargs)
        self.options = {"update": update, "epsilon": epsilon}

    def build(self, shape):
        features = shape[-1:]
        self.gamma = self.add_weight(name="gamma", shape=features, initializer="ones")
        self.beta = self.add_weight(name="beta", shape=features, initializer="zeros")
        initializers = {"moving_mean": "zeros", "moving_variance": "ones", "count": "zeros"}
        self.running = [
            self.add_weight(name=name, shape=features, initializer=initializer, trainable=False)
            for name, initializer in initializers.items()
        ]

    def call(self, x, training=False):
        params = jbn.Params(self.gamma.value, self.beta.value)
        running = jbn.Moments(*(weight.value for weight in self.running))
        y, running = jbn.batch_norm(x, params, running, train=bool(training), **self.options)
        for weight, value in zip(self.running, running):
            weight.assign(value)
        return y


def accuracy(norm, x, y, x_test, y_test):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [layers.Dense(WIDTH, use_bias=False), norm(), layers.ReLU(), layers.Dense(10, activation="softmax")]
    )
    optimizer = keras.optimizers.Adam(LEARNING_RATE)
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=0)
    return float(model.evaluate(x_test, y_test, batch_size=len(x_test), verbose=0)[1])


def main() -> dict[str, float]:
    x, y = load_digits(return_X_y=True)
    x, y = x.astype(np.float32) / 16, y.astype(np.int32)
    whole = len(x) * 3 // 4 // BATCH_SIZE * BATCH_SIZE  # whole batches, so that Keras compiles one program
    split = x[:whole], y[:whole], x[whole:], y[whole:]
    found = {
        "jbn": accuracy(BatchNorm, *split),
        "keras": accuracy(keras.layers.BatchNormalization, *split),
    }
    for name, value in found.items():
        print(f"test accuracy, {name}: {value:.3f}")
    return found


if __name__ == "__main__":
    main()
