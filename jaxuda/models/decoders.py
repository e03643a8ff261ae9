"""Decoders that join the maps of all stages of a backbone: those of DAFormer and SegFormer."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxuda.models.layers import BatchNorm, Conv, resize_bilinear
from jaxuda.models.transformer_layers import Depthwise, Linear

ASPP_DILATIONS = (6, 12, 18)


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalisation and ReLU.

    dilation: that of a depthwise 3x3 convolution, which keeps the number of channels; 0: a plain one.
    """

    features: int
    size: int
    dtype: str
    axis_name: str | None
    dilation: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.dilation:
            x = Depthwise(self.dilation, dtype=self.dtype, name="conv")(x)
        else:
            x = Conv(self.features, self.size, dtype=self.dtype, name="conv")(x)
        return nn.relu(BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="bn")(x, train))


class Separable(nn.Module):
    """A depthwise 3x3 convolution, then a 1x1 convolution, both with batch normalisation and ReLU."""

    features: int
    dilation: int
    dtype: str
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        layer = functools.partial(ConvNorm, dtype=self.dtype, axis_name=self.axis_name)
        x = layer(x.shape[-1], 3, dilation=self.dilation, name="depthwise")(x, train)
        return layer(self.features, 1, name="pointwise")(x, train)


def embedded(levels: tuple[jax.Array, ...], features: int, dtype: str) -> jax.Array:
    """The maps of all stages, each through a linear layer (embed0, ...), at the size of the first, joined.

    For modules of Flax; weights and biases start uniform in +-1 / sqrt(fan-in).
    """
    maps = []
    for level, x in enumerate(levels):
        limit = x.shape[-1] ** -0.5
        kernel_init, bias_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), symmetric(limit)
        x = Linear(features, dtype, kernel_init, bias_init, name=f"embed{level}")(x)
        maps.append(resize_bilinear(x, levels[0].shape[1:3], align_corners=False))
    return jnp.concatenate(maps, axis=-1)


def symmetric(limit: float) -> nn.initializers.Initializer:
    """Uniform in +-limit."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


class DAFormerDecoder(nn.Module):
    """DAFormer's head without its classifier (Hoyer et al., CVPR 2022): all stages, then a separable ASPP."""

    features: int
    dtype: str
    axis_name: str | None

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...], train: bool) -> jax.Array:
        """Maps (N, h_i, w_i, A_i), the largest first -> (N, h_0, w_0, features)."""
        x = embedded(levels, self.features, self.dtype)
        shared: dict[str, Any] = {"dtype": self.dtype, "axis_name": self.axis_name}
        branches = [ConvNorm(self.features, 1, **shared, name="branch0")(x, train)]
        for place, dilation in enumerate(ASPP_DILATIONS, start=1):
            branches.append(Separable(self.features, dilation, **shared, name=f"branch{place}")(x, train))
        return ConvNorm(self.features, 3, **shared, name="bottleneck")(jnp.concatenate(branches, axis=-1), train)


class SegFormerDecoder(nn.Module):
    """SegFormer's head without its classifier (Xie et al., NeurIPS 2021): all stages, then a 1x1 convolution."""

    features: int
    dtype: str
    axis_name: str | None

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...], train: bool) -> jax.Array:
        """Maps (N, h_i, w_i, A_i), the largest first -> (N, h_0, w_0, features)."""
        x = embedded(levels, self.features, self.dtype)
        return ConvNorm(self.features, 1, self.dtype, self.axis_name, name="fuse")(x, train)
