"""Initial weights."""

from collections.abc import Callable

import flax.linen as nn

LECUN = nn.initializers.lecun_normal()
# He et al. 2015; by what goes out, so that gradients keep their size on the way back.
HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def kernel_init(std: float, usual: Callable) -> Callable:
    """Return the initializer that a job asks for: Gaussian weights, or the usual ones where `std` is 0."""
    return nn.initializers.normal(std) if std else usual
