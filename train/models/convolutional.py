"""Convolutional networks in Flax Linen: a small one, and residual ones.

He et al. 2016, "Deep Residual Learning for Image Recognition".
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from train.models.initialization import HE, LECUN, kernel_init
from train.models.norms import Domain, Layer, Norm


class CNN(nn.Module):
    """For each width two 3x3 convolutions, each with normalization and activation, and 2x2 pooling; then the
    mean over positions and a linear map to the classes: images (n, h, w, c) -> logits (n, classes)."""

    widths: tuple[int, ...]
    classes: int
    norm: Norm
    activation: Layer
    kernel_std: float
    dtype: str
    head = "Dense_0"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, domain: Domain = None) -> jax.Array:
        init = kernel_init(self.kernel_std, LECUN)
        x = self.norm.linen_input_layer(train=train, domain=domain)(x.astype(self.dtype))
        options = {"use_bias": not self.norm.kind.has_bias, "kernel_init": init, "dtype": self.dtype}
        for width in self.widths:
            for _ in range(2):
                x = nn.Conv(width, (3, 3), **options)(x)
                x = self.activation(self.norm.linen_layer(train=train, domain=domain)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        return nn.Dense(self.classes, kernel_init=init, name=self.head)(x.astype(jnp.float32).mean((1, 2)))


class Convolution(nn.Module):
    """A convolution and normalization: (n, h, w, c) -> (n, ceil(h / strides), ceil(w / strides), filters)."""

    filters: int
    size: int  # odd
    strides: int
    norm: Norm
    train: bool
    domain: Domain
    kernel_std: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.filters,
            (self.size, self.size),
            self.strides,
            padding=self.size // 2,
            use_bias=not self.norm.kind.has_bias,
            kernel_init=kernel_init(self.kernel_std, HE),
            dtype=self.dtype,
        )(x)
        return self.norm.linen_layer(train=self.train, domain=self.domain)(x)


class Block(nn.Module):
    """activation(F(x) + shortcut(x)), where F is two or three convolutions: figure 5.

    A basic block has two of 3x3. A bottleneck has 1x1, 3x3, 1x1, the last with 4 times the channels; it
    strides in the 3x3 one, as all do today, and not in the first, as the paper does.

    Where F changes the shape, the shortcut is a 1x1 convolution with normalization (option B), or, without
    parameters, every `strides`-th position with zeros for the channels that are new (option A).
    """

    width: int
    strides: int
    bottleneck: bool
    project: bool
    activation: Layer
    convolution: Callable[..., Layer]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        basic = (self.width, 3, self.strides), (self.width, 3, 1)
        bottleneck = (self.width, 1, 1), (self.width, 3, self.strides), (4 * self.width, 1, 1)
        *inner, last = bottleneck if self.bottleneck else basic
        y = x
        for filters, size, strides in inner:
            y = self.activation(self.convolution(filters, size, strides)(y))
        y = self.convolution(*last)(y)
        if x.shape != y.shape and self.project:
            x = self.convolution(y.shape[-1], 1, self.strides, name="shortcut")(x)
        elif x.shape != y.shape:
            x = x[:, :: self.strides, :: self.strides]
            more = y.shape[-1] - x.shape[-1]  # negative where channels are dropped
            x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), (0, 0, 0), (0, more, 0)))
        return self.activation(x + y)


class ResNet(nn.Module):
    """A stem, stages of blocks of which each after the first halves the image, the mean over positions, and a
    linear map to the classes: images (n, h, w, c) -> logits (n, classes).

    For small images (section 4.2) the stem is a 3x3 convolution and shortcuts have no parameters; for large
    ones (table 1) it is a 7x7 convolution and a 3x3 pool, which halve the image each, and shortcuts project.
    """

    blocks: tuple[int, ...]  # of each stage
    bottleneck: bool
    large: bool
    widths: tuple[int, ...]  # of each stage; bottlenecks put out 4 times as many channels
    classes: int
    norm: Norm
    activation: Layer
    kernel_std: float
    dtype: str
    head = "Dense_0"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, domain: Domain = None) -> jax.Array:
        options = {"norm": self.norm, "kernel_std": self.kernel_std, "dtype": self.dtype}
        convolution = partial(Convolution, train=train, domain=domain, **options)
        block = partial(
            Block,
            bottleneck=self.bottleneck,
            project=self.large,
            activation=self.activation,
            convolution=convolution,
        )
        size, strides = (7, 2) if self.large else (3, 1)
        x = self.norm.linen_input_layer(train=train, domain=domain)(x.astype(self.dtype))
        x = self.activation(convolution(self.widths[0], size, strides, name="stem")(x))
        if self.large:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage, (blocks, width) in enumerate(zip(self.blocks, self.widths)):
            for i in range(blocks):
                strides = 2 if stage and not i else 1
                x = block(width, strides, name=f"stage{stage}_block{i}")(x)
        head = nn.Dense(self.classes, kernel_init=kernel_init(self.kernel_std, LECUN), name=self.head)
        return head(x.astype(jnp.float32).mean((1, 2)))
