"""Mix Transformers (Xie et al., SegFormer, NeurIPS 2021) under the heads of SegFormer and DAFormer.

The backbone has four stages with strides 4, 8, 16 and 32. Each begins with a convolution, goes on with blocks of
attention (whose keys and values are taken from a smaller map) and a feed-forward network with a depthwise convolution,
and ends with a normalisation. There is no position embedding: the zeros around the convolutions carry the position.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxuda.errors import UserError
from jaxuda.interop.layouts import Layout
from jaxuda.models import Outputs, Pretrained, check_choices, mix_transformer_files
from jaxuda.models.decoders import DAFormerDecoder, SegFormerDecoder
from jaxuda.models.layers import Conv, Dropout, DropPath, head_init
from jaxuda.models.transformer_layers import Depthwise, LayerNorm, Linear, attend, linear_of_gelu

# variant -> (channels of the first stage, blocks per stage)
VARIANTS = {
    "b0": (32, (2, 2, 2, 2)),
    "b1": (64, (2, 2, 2, 2)),
    "b2": (64, (3, 4, 6, 3)),
    "b3": (64, (3, 4, 18, 3)),
    "b4": (64, (3, 8, 27, 3)),
    "b5": (64, (3, 6, 40, 3)),
}
# Of each stage: attention heads, which are also the channels in units of the first stage's, and how many times smaller
# the map of keys and values is along each axis.
HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)
depthwise_init = nn.initializers.normal((2 / 9) ** 0.5)  # of the fan-out of one channel
SMALLEST = 29  # side of an image in pixels: the first stage needs one cell of 8 x 8 positions at stride 4
DECODERS = {"daformer": DAFormerDecoder, "segformer": SegFormerDecoder}


class Attention(nn.Module):
    """Multi-head attention from all positions of a map to a map that is `reduction` times smaller along each axis."""

    heads: int
    reduction: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, h, w, A) -> (N, h, w, A)."""
        height, width, channels = x.shape[1:]
        linear = functools.partial(Linear, dtype=self.dtype)
        queries, small = linear(channels, name="q")(x), x
        if self.reduction > 1:
            # Positions after the last whole cell are dropped.
            conv = functools.partial(Conv, padding=0, use_bias=True, dtype=self.dtype)
            small = conv(channels, self.reduction, stride=self.reduction, name="sr")(x)
            small = LayerNorm(1e-5, self.dtype, name="norm")(small)
        keys, values = jnp.split(linear(2 * channels, name="kv")(small), 2, axis=-1)
        split = lambda y: y.reshape(-1, y.shape[1] * y.shape[2], self.heads, channels // self.heads)  # noqa: E731
        found = attend(split(queries), split(keys), split(values))
        return linear(channels, name="proj")(found.reshape(-1, height, width, channels))


class FeedForward(nn.Module):
    """Linear to four times the channels, depthwise 3x3 convolution, GELU, linear."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, h, w, A) -> (N, h, w, A)."""
        hidden = Linear(4 * x.shape[-1], self.dtype, name="fc1")(x)
        conv = Depthwise(use_bias=True, dtype=self.dtype, kernel_init=depthwise_init, name="dwconv")
        hidden = conv(hidden)
        return linear_of_gelu(Linear(x.shape[-1], self.dtype, name="fc2"), hidden)


class Block(nn.Module):
    """x + attention, then x + feed-forward network, each of the normalised map and dropped in training at a rate."""

    heads: int
    reduction: int
    drop_path: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, index: jax.Array | None) -> jax.Array:
        normed = LayerNorm(dtype=self.dtype, name="norm1")(x)
        branch = Attention(self.heads, self.reduction, self.dtype, name="attn")(normed)
        x = x + DropPath(self.drop_path)(branch, train, index)
        branch = FeedForward(self.dtype, name="mlp")(LayerNorm(dtype=self.dtype, name="norm2")(x))
        return x + DropPath(self.drop_path)(branch, train, index)


class PatchEmbed(nn.Module):
    """A convolution with stride, and a normalisation."""

    features: int
    size: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Conv(self.features, self.size, self.stride, use_bias=True, dtype=self.dtype, name="proj")(x)
        return LayerNorm(1e-5, self.dtype, name="norm")(x)


class Encoder(nn.Module):
    """The backbone; returns the normalised maps of its four stages, with width * HEADS channels.

    drop_path: rate of the last block; it grows linearly from 0 in the first one.
    remat: keep only the input of each block for the gradient, and compute the rest again.
    """

    width: int
    blocks: tuple[int, ...]
    drop_path: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, index: jax.Array | None) -> tuple[jax.Array, ...]:
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block  # `train`, counting from self
        last, number, maps = max(sum(self.blocks) - 1, 1), 0, []
        for stage, count in enumerate(self.blocks):
            size, stride = (3, 2) if stage else (7, 4)
            embed = PatchEmbed(self.width * HEADS[stage], size, stride, self.dtype, name=f"patch_embed{stage + 1}")
            x = embed(x)
            for place in range(count):
                rate, name = self.drop_path * number / last, f"block{stage + 1}_{place}"
                x = block(HEADS[stage], REDUCTIONS[stage], rate, self.dtype, name=name)(x, train, index)
                number += 1
            x = LayerNorm(dtype=self.dtype, name=f"norm{stage + 1}")(x)
            maps.append(x)
        return tuple(maps)


class MixTransformer(nn.Module):
    """A Mix Transformer under a head for segmentation, logits at stride 4; the fields are those of `config.model`.

    num_classes: C.
    variant: "b0" to "b5".
    head: "daformer" (Hoyer et al., CVPR 2022) or "segformer".
    width: channels of the first stage, if they differ from the variant's (32 in B0, 64 in the others); the other stages
        have 2, 5 and 8 times as many.
    blocks: blocks per stage, if they differ from the variant's: four numbers.
    head_width: channels of the head; default: as published, 768 for "segformer" on B2 to B5, else 256.
    drop_path: rate at which the last block's branches are dropped in training; it grows linearly from the first block.
    dropout: rate at which channels of the features are dropped before the classifier in training.
    dtype: compute dtype; parameters, statistics, softmax and outputs stay float32 with "bfloat16".
    remat: save most of the memory of training by computing the backbone's blocks twice.
    axis_name: device axis over which the head's batch normalisation reduces in training.

    Variables: params["backbone" | "decoder" | "head"] and batch_stats["decoder"].
    Raises UserError on an unknown value of a field, and if an image has a side below 29 pixels.
    """

    num_classes: int
    variant: str = "b5"
    head: str = "daformer"
    width: int | None = None
    blocks: tuple[int, ...] | None = None
    head_width: int | None = None
    drop_path: float = 0.1
    dropout: float = 0.1
    dtype: str = "float32"
    remat: bool = False
    axis_name: str | None = None

    CLASSIFIERS = ("head",)
    SHAPE_FIELDS = ("name", "variant", "head", "width", "blocks", "head_width")
    LICENCE = (
        "MiT weights of NVIDIA's SegFormer, and what is trained from them, are under the NVIDIA Source Code License: "
        "non-commercial use (research or evaluation) only"
    )

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, index: jax.Array | None = None) -> Outputs:
        """Maps normalised images (N, H, W, 3) to `Outputs`; training updates batch_stats and draws at random."""
        width, blocks = self._sizes()
        if min(images.shape[1:3]) < SMALLEST:
            raise UserError(
                f"an image of {images.shape[2]}x{images.shape[1]} is too small for a Mix Transformer: its sides must "
                f"have at least {SMALLEST} pixels (see resize and crop of the domains, and evaluation.size)"
            )
        levels = Encoder(width, blocks, self.drop_path, self.remat, self.dtype, name="backbone")(images, train, index)
        decoder = DECODERS[self.head](self._head_width(), self.dtype, self.axis_name, name="decoder")
        features = decoder(levels, train)
        dropped = Dropout(self.dropout, channels=True)(features, train, index)
        main = self.classifier(self.num_classes).clone(name="head", parent=self)(dropped)
        return Outputs(main, features, levels=levels).widened()

    def classifier(self, num_classes: int) -> nn.Module:
        """A head like the network's own, which maps `Outputs.features` to logits of `num_classes` classes."""
        return Conv(num_classes, 1, use_bias=True, dtype=self.dtype, kernel_init=head_init, parent=None)

    def parameter_group(self, path: tuple[str, ...]) -> str:
        """The optimizer group of a parameter, from its path in the network's parameters; see `jaxuda.optimizers`."""
        if path[0] != "backbone":
            return "head"
        if path[-2].startswith("norm"):
            return "norm"
        return "stem" if path[1] == "patch_embed1" else "block"

    def describe(self) -> str:
        """The fields that decide the features, as one line of text."""
        width, blocks = self._sizes()
        kind = self.variant.upper() if (width, blocks) == VARIANTS[self.variant] else f"of {'-'.join(map(str, blocks))}"
        return f"MiT {kind} blocks, width {width}, head {self.head} of width {self._head_width()}"

    def torch_layouts(self) -> dict[str, Layout]:
        """How published files name the variables; see `mix_transformer_files`."""
        return mix_transformer_files.head_layouts(self.head)

    def published_layout(self) -> str:
        """The layout of DAFormer's authors, whose code trains both heads."""
        return "daformer"

    def backbone_layouts(self) -> dict[str, Layout]:
        """The names in the files of image classifiers."""
        return mix_transformer_files.backbone_layouts()

    def other_backbone(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The backbone in a torch file, in words, from the shapes of its entries; "" if it is ours or not known."""
        kind = mix_transformer_files.backbone_kind(shapes, VARIANTS)
        return "" if self._sizes() == VARIANTS[self.variant] and kind == f"a MiT-{self.variant.upper()}" else kind

    def _sizes(self) -> tuple[int, tuple[int, ...]]:
        """Channels of the first stage, and blocks per stage."""
        check_choices(self, variant=tuple(VARIANTS), head=tuple(DECODERS))
        if self.blocks and len(self.blocks) != len(HEADS):
            raise UserError(f"model.blocks = {tuple(self.blocks)}: a Mix Transformer needs 4 numbers, one per stage")
        width, blocks = VARIANTS[self.variant]
        return self.width or width, tuple(self.blocks or blocks)

    def _head_width(self) -> int:
        return self.head_width or (768 if self.head == "segformer" and self.variant not in ("b0", "b1") else 256)


def make(fields: Mapping[str, Any], num_classes: int) -> MixTransformer:
    """The network of `config.model`; its fields are those of `MixTransformer`."""
    return MixTransformer(num_classes=num_classes, **fields)


# Published weights ------------------------------------------------------------------------------------------

IMAGENET = {
    f"mit-{variant}": Pretrained(
        {"name": "mix_transformer", "variant": variant},
        f"mit_{variant}.pth",
        "the authors of SegFormer (NVlabs)",
        preprocess="imagenet",
    )
    for variant in VARIANTS
}


def imagenet_name(fields: Mapping[str, Any], preprocess: str) -> str:
    """The weights of `IMAGENET` that a network with these fields starts from."""
    return f"mit-{fields['variant']}"
