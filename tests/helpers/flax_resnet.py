"""A residual network as Flax's ImageNet example builds it: bottlenecks, norms by `partial`, zero-init."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp


class Block(nn.Module):
    width: int
    conv: type
    norm: type
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.width, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    stage_sizes: tuple[int, ...] = (1, 2)
    widths: tuple[int, ...] = (4, 8)
    norm: type = nn.BatchNorm
    classes: int = 3

    @nn.compact
    def __call__(self, x, train=True):
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(self.norm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm(name="bn_init")(conv(self.widths[0], (3, 3), name="conv_init")(x)))
        for stage, (blocks, width) in enumerate(zip(self.stage_sizes, self.widths)):
            for block in range(blocks):
                x = Block(width, conv, norm, strides=2 if stage > 0 and block == 0 else 1)(x)
        return nn.Dense(self.classes)(jnp.mean(x, (1, 2)))
