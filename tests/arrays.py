"""Arrays as people bring them: in Keras' layout."""

import numpy as np


def keras_arrays(n_train=20, n_test=8, shape=(4, 4), dtype=np.uint8):
    rng = np.random.RandomState(0)
    return {
        "x_train": rng.randint(0, 256, (n_train, *shape)).astype(dtype),
        "y_train": np.arange(n_train, dtype=np.uint8) % 3,
        "x_test": rng.randint(0, 256, (n_test, *shape)).astype(dtype),
        "y_test": np.arange(n_test, dtype=np.uint8) % 4,
    }
