"""A user's network family: a small encoder and decoder with batch normalisation and dropout.

Its section of the config: {"name": "plugins.encoder_decoder", "width": 8, "dropout": 0.1, "depth": False,
"dtype": "float32"}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxuda.models import Outputs
from jaxuda.models.layers import BatchNorm, Conv, Dropout, DropPath, resize_bilinear

STAGES = 3


class Encoder(nn.Module):
    """One map per stage, each with half the size and twice the channels of the one before."""

    width: int
    dropout: float
    dtype: str
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, index: jax.Array | None) -> tuple[jax.Array, ...]:
        maps = []
        for stage in range(STAGES):
            x = Conv(self.width * 2**stage, 3, stride=2, dtype=self.dtype, name=f"conv{stage}")(x)
            x = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=f"bn{stage}")(x, train)
            x = nn.relu(x)
            branch = Conv(x.shape[-1], 3, dtype=self.dtype, name=f"branch{stage}")(x)
            x = x + DropPath(self.dropout)(branch, train, index)
            maps.append(x)
        return tuple(maps)


class Decoder(nn.Module):
    """The maps of an encoder at the size of the second, joined."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, maps: tuple[jax.Array, ...]) -> jax.Array:
        maps = [resize_bilinear(x, maps[1].shape[1:3], align_corners=False) for x in maps]
        return nn.relu(Conv(4 * self.width, 1, dtype=self.dtype, use_bias=True, name="join")(jnp.concatenate(maps, -1)))


class EncoderDecoder(nn.Module):
    """See `jaxuda.models` for the contract of a network."""

    num_classes: int
    width: int = 8
    dropout: float = 0.1
    depth: bool = False
    dtype: str = "float32"
    axis_name: str | None = None

    CLASSIFIERS = ("head",)
    SHAPE_FIELDS = ("width", "depth")

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, index: jax.Array | None = None) -> Outputs:
        encoder = Encoder(self.width, self.dropout, self.dtype, self.axis_name, name="backbone")
        levels = encoder(images.astype(self.dtype), train, index)
        features = Decoder(self.width, self.dtype, name="decoder")(levels)
        dropped = Dropout(self.dropout)(features, train, index)
        main = Conv(self.num_classes, 1, use_bias=True, dtype=self.dtype, name="head")(dropped)
        depth = Conv(1, 1, use_bias=True, dtype=self.dtype, name="depth_head")(dropped) if self.depth else None
        return Outputs(main, features, depth=depth, levels=levels).widened()

    def classifier(self, num_classes: int) -> nn.Module:
        return Conv(num_classes, 1, use_bias=True, dtype=self.dtype, parent=None)

    def parameter_group(self, path: tuple[str, ...]) -> str:
        if path[0] != "backbone":
            return "head"
        return "norm" if path[1].startswith("bn") else "block"

    def describe(self) -> str:
        return f"encoder and decoder, width {self.width}"


def make(fields: Mapping[str, Any], num_classes: int) -> EncoderDecoder:
    """The network of `config.model`."""
    return EncoderDecoder(num_classes, **fields)
