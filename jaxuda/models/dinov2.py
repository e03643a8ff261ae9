"""DINOv2's vision transformers (Oquab et al., TMLR 2024; registers: Darcet et al., ICLR 2024) under two heads.

The heads are VFM-UDA's decoder (Englert et al., CVPR 2024 workshop) and, as a baseline, one linear layer. As with
VFM-UDA, images are enlarged by a tenth, down to whole patches: 1024 pixels become 1120, which are 80 patches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxuda.errors import UserError
from jaxuda.interop.layouts import Layout
from jaxuda.models import Outputs, Pretrained, check_choices, dinov2_files
from jaxuda.models.layers import Conv, drawn, head_init, resize_bilinear
from jaxuda.models.transformer_layers import Enlarge, LayerNorm, Linear, attend, gelu, linear_init, linear_of_gelu
from jaxuda.models.windows import averaged, cut_out, windows

PATCH = 14
REGISTERS = 4
HEAD_WIDTH = 64  # channels of an attention head
# variant -> (channels, blocks)
VARIANTS = {"vits14": (384, 12), "vitb14": (768, 12), "vitl14": (1024, 24)}
HEADS = ("vfmuda", "linear")
torch_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # +-1 / sqrt(fan-in)


# Positions --------------------------------------------------------------------------------------------------


def positions(table: jax.Array, size: tuple[int, int], registers: bool) -> jax.Array:
    """The position embeddings for a map of patches, resampled as the released code does.

    Args:
      table: (1, 1 + side^2, A): the class token's entry, then those of a square map of patches, row by row.
      size: (height, width) of the map, in patches.
      registers: the network has registers; these networks resample in another way.

    Returns:
      (1, 1 + height * width, A), at least float32.
    """
    table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    side = math.isqrt(table.shape[1] - 1)
    if size == (side, side):
        return table
    matrix = antialiased_cubic_matrix if registers else offset_cubic_matrix
    rows, columns = (jnp.asarray(matrix(side, length), table.dtype) for length in size)
    patches = table[0, 1:].reshape(side, side, -1)
    resampled = jnp.einsum("Hh,Ww,hwa->HWa", rows, columns, patches, precision=lax.Precision.HIGHEST)
    return jnp.concatenate([table[:, :1], resampled.reshape(1, size[0] * size[1], -1)], axis=1)


def _cubic(t: np.ndarray, a: float) -> np.ndarray:
    """Keys's kernel of cubic convolution."""
    t = np.abs(t)
    inner = (a + 2) * t**3 - (a + 3) * t**2 + 1
    outer = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, inner, np.where(t < 2, outer, 0.0))


@functools.lru_cache(maxsize=64)
def offset_cubic_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float64: torch's bicubic `interpolate` with the scale (target + 0.1) / source.

    The released networks without registers have that 0.1; Hugging Face's implementation of them lacks it.
    """
    centres = (np.arange(target) + 0.5) * source / (target + 0.1) - 0.5
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        places = np.floor(centres).astype(int) + tap
        np.add.at(matrix, (np.arange(target), np.clip(places, 0, source - 1)), _cubic(centres - places, -0.75))
    return matrix


@functools.lru_cache(maxsize=64)
def antialiased_cubic_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float64: torch's bicubic `interpolate` to a size, with antialiasing."""
    ratio = source / target
    width = max(ratio, 1.0)
    matrix = np.zeros((target, source))
    for place in range(target):
        centre = (place + 0.5) * ratio
        first, last = max(int(centre - 2 * width + 0.5), 0), min(int(centre + 2 * width + 0.5), source)
        weights = _cubic((np.arange(first, last) - centre + 0.5) / width, -0.5)
        matrix[place, first:last] = weights / weights.sum()
    return matrix


# The backbone -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention of all tokens to all tokens."""

    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, A) -> (N, T, A)."""
        count, channels = x.shape[1:]
        x = Linear(3 * channels, self.dtype, name="qkv")(x)
        x = x.reshape(-1, count, 3, self.heads, channels // self.heads)
        found = attend(x[:, :, 0], x[:, :, 1], x[:, :, 2])
        return Linear(channels, self.dtype, name="proj")(found.reshape(-1, count, channels))


class FeedForward(nn.Module):
    """Linear to four times the channels, GELU, linear."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = Linear(4 * x.shape[-1], self.dtype, name="fc1")(x)
        return linear_of_gelu(Linear(x.shape[-1], self.dtype, name="fc2"), hidden)


class LayerScale(nn.Module):
    """A factor per channel."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("gamma", nn.initializers.constant(1e-5), (x.shape[-1],)).astype(self.dtype)


class Block(nn.Module):
    """x + scaled attention, then x + scaled feed-forward network, each of the normalised tokens."""

    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branch = Attention(self.heads, self.dtype, name="attn")(LayerNorm(dtype=self.dtype, name="norm1")(x))
        x = x + LayerScale(self.dtype, name="ls1")(branch)
        branch = FeedForward(self.dtype, name="mlp")(LayerNorm(dtype=self.dtype, name="norm2")(x))
        return x + LayerScale(self.dtype, name="ls2")(branch)


class Encoder(nn.Module):
    """The backbone; the fields are those of `DINOv2`, with all sizes given."""

    width: int
    blocks: int
    heads: int
    grid: int
    registers: bool
    mask_ratio: float
    remat: bool
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, train: bool, index: jax.Array | None) -> jax.Array:
        """(N, H, W, 3), sides in whole patches -> the normalised tokens of all patches, (N, H / 14, W / 14, A)."""
        if any(side % PATCH for side in images.shape[1:3]):
            raise UserError(f"DINOv2 needs images of whole patches of {PATCH} pixels, not {images.shape[1:3]}")
        table = self.param("pos_embed", linear_init, (1, 1 + self.grid**2, self.width))
        first = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width))
        hidden = self.param("mask_token", nn.initializers.zeros, (self.width, 1))[:, 0]  # a column, as torch's row
        conv = functools.partial(Conv, padding=0, use_bias=True, dtype=self.dtype, kernel_init=torch_init)
        x = conv(self.width, PATCH, PATCH, name="patch_embed")(images)
        size = x.shape[1:3]
        x = x.reshape(-1, size[0] * size[1], self.width)
        if train and self.mask_ratio and self.has_rng("dropout"):
            masked = drawn(self, self.mask_ratio, index, (x.shape[1], 1))
            x = jnp.where(masked, hidden.astype(x.dtype), x)
        whole = lambda tokens: jnp.broadcast_to(tokens, (images.shape[0], *tokens.shape[1:]))  # noqa: E731
        added = positions(table, size, self.registers)
        tokens = [whole(first + added[:, :1]), x + added[:, 1:]]
        if self.registers:
            register = self.param("register_tokens", nn.initializers.normal(1e-6), (1, REGISTERS, self.width))
            tokens.insert(1, whole(register))
        x = jnp.concatenate([part.astype(self.dtype) for part in tokens], axis=1)
        block = nn.remat(Block) if self.remat else Block
        for place in range(self.blocks):
            x = block(self.heads, self.dtype, name=f"block{place}")(x)
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        return x[:, x.shape[1] - size[0] * size[1] :].reshape(-1, *size, self.width)


# The network ------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """VFM-UDA's decoder without its classifier: twice twice as large, with half as many channels each time."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, h, w, A) -> (N, 4 h, 4 w, A / 4)."""
        channels = x.shape[-1]
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        x = Enlarge(channels // 2, self.dtype, torch_init, name="up1")(x)
        x = gelu(norm(name="norm1")(x))
        x = norm(name="norm2")(Enlarge(channels // 4, self.dtype, torch_init, name="up2")(x))
        x = Conv(channels // 4, 3, dtype=self.dtype, kernel_init=torch_init, name="conv")(x)
        return norm(name="norm3")(x)


class DINOv2(nn.Module):
    """A vision transformer of DINOv2 under a head for segmentation; the fields are those of `config.model`.

    num_classes: C.
    variant: "vits14", "vitb14" or "vitl14".
    registers: the network has four registers: tokens that belong to no patch. Such weights are files of their own.
    head: "vfmuda" (logits at four times the map of patches) or "linear" (at that map).
    width: channels, if they differ from the variant's.
    blocks: numbers of blocks, which add up, if they differ from the variant's.
    heads: attention heads; default: one for 64 channels.
    grid: the table of positions has grid x grid entries; the released networks have 37, for images of 518 pixels.
    window: (width, height) of the parts of larger images that inference computes, overlapping by half; probabilities
        are then averaged at the resolution of the image. None: images are computed as a whole.
    mask_ratio: in training the share of patches that are replaced by the learned mask token; methods set it with
        `clone` for a pass.
    dtype: compute dtype; parameters, softmax, statistics, positions and outputs stay float32 with "bfloat16".
    remat: save most of the memory of training by computing the blocks twice.
    axis_name: not used; there are no batch statistics.

    Variables: params["backbone" | "decoder" | "head"]; "decoder" for "vfmuda" only.
    Raises UserError on an unknown value of a field, and if an image has a side below 13 pixels.
    """

    num_classes: int
    variant: str = "vitb14"
    registers: bool = False
    head: str = "vfmuda"
    width: int | None = None
    blocks: tuple[int, ...] | None = None
    heads: int | None = None
    grid: int = 37
    window: tuple[int, int] | None = None
    mask_ratio: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    axis_name: str | None = None

    CLASSIFIERS = ("head",)
    SHAPE_FIELDS = ("name", "variant", "registers", "head", "width", "blocks", "heads", "grid")

    def __call__(self, images: jax.Array, train: bool = False, index: jax.Array | None = None) -> Outputs:
        """Maps normalised images (N, H, W, 3) to `Outputs`; in training tokens are masked at random."""
        size, window = images.shape[1:3], (self.window or images.shape[2:0:-1])[::-1]
        if train or (size[0] <= window[0] and size[1] <= window[1]):
            return self._computed(images, train, index)
        boxes = windows(size, tuple(map(min, size, window)))
        outputs = self._computed(cut_out(images, boxes), train, index)
        main, features = (resize_bilinear(x, boxes.part, align_corners=False) for x in (outputs.main, outputs.features))
        return Outputs(jnp.log(averaged(jax.nn.softmax(main), boxes)), averaged(features, boxes))

    @nn.compact
    def _computed(self, images: jax.Array, train: bool, index: jax.Array | None) -> Outputs:
        images = resize_bilinear(images, enlarged(images.shape[1:3]), align_corners=False)
        encoder = Encoder(
            *self._sizes(), self.grid, self.registers, self.mask_ratio, self.remat, self.dtype, name="backbone"
        )
        x = encoder(images, train, index)
        features = Decoder(self.dtype, name="decoder")(x) if self.head == "vfmuda" else x
        main = self.classifier(self.num_classes).clone(name="head", parent=self)(features)
        return Outputs(main, features, levels=(x,)).widened()

    def classifier(self, num_classes: int) -> nn.Module:
        """A head like the network's own, which maps `Outputs.features` to logits of `num_classes` classes."""
        linear = self.head == "linear"
        init = head_init if linear else nn.initializers.normal(0.1)
        return Conv(num_classes, 1, use_bias=linear, dtype=self.dtype, kernel_init=init, parent=None)

    def parameter_group(self, path: tuple[str, ...]) -> str:
        """The optimizer group of a parameter, from its path in the network's parameters; see `jaxuda.optimizers`."""
        if path[0] != "backbone":
            return "head"
        if path[-2].startswith("norm"):
            return "norm"
        return "block" if path[1].startswith("block") else "stem"

    def describe(self) -> str:
        """The fields that decide the features, as one line of text."""
        sizes = self._sizes()
        kind = dinov2_files.kind(*sizes[:2], self.registers, VARIANTS)
        more = f" of {sizes[2]} heads" if self.heads else ""
        table = "" if self.grid == 37 else f", {self.grid}x{self.grid} positions"
        return f"{kind}{more}{table}, head {self.head}"

    def torch_layouts(self) -> dict[str, Layout]:
        """How published files name the variables; see `dinov2_files`."""
        return dinov2_files.head_layouts(self.head)

    def backbone_layouts(self) -> dict[str, Layout]:
        """The names in the files of DINOv2."""
        return dinov2_files.backbone_layouts()

    def other_backbone(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The backbone in a torch file, in words, from the shapes of its entries; "" if it is ours or not known."""
        found = dinov2_files.backbone_kind(shapes, VARIANTS)
        return "" if found == dinov2_files.kind(*self._sizes()[:2], self.registers, VARIANTS) else found

    def _sizes(self) -> tuple[int, int, int]:
        """Channels, number of blocks, attention heads."""
        check_choices(self, variant=tuple(VARIANTS), head=HEADS)
        width, blocks = VARIANTS[self.variant]
        width = self.width or width
        sizes = width, sum(self.blocks or (blocks,)), self.heads or max(width // HEAD_WIDTH, 1)
        if sizes[0] % sizes[2] or sizes[0] % 4:
            raise UserError(
                f"model.width={sizes[0]} must be a multiple of 4 and of the number of attention heads, {sizes[2]}"
            )
        return sizes


def enlarged(size: tuple[int, int]) -> tuple[int, int]:
    """The size (height, width) at which a network sees an image: a tenth larger, rounded down to whole patches.

    Raises:
      UserError: that is less than one patch.
    """
    height, width = (PATCH * (11 * side // (10 * PATCH)) for side in size)
    if not height or not width:
        raise UserError(
            f"an image of {size[1]}x{size[0]} is too small for DINOv2, whose patches have {PATCH} pixels: its sides "
            "must have at least 13 (see resize and crop of the domains, and evaluation.size)"
        )
    return height, width


def make(fields: Mapping[str, Any], num_classes: int) -> DINOv2:
    """The network of `config.model`; its fields are those of `DINOv2`."""
    return DINOv2(num_classes=num_classes, **fields)


# Published weights ------------------------------------------------------------------------------------------

IMAGENET = {
    f"dinov2-{variant}{'-reg4' if registers else ''}": Pretrained(
        {"variant": variant, "registers": registers},
        f"dinov2_{variant}{'_reg4' if registers else ''}_pretrain.pth",
        "the authors of DINOv2 (Meta)",
        preprocess="imagenet",
    )
    for registers in (False, True)
    for variant in VARIANTS
}


def imagenet_name(fields: Mapping[str, Any], preprocess: str) -> str:
    """The weights of `IMAGENET` that a network with these fields starts from."""
    return f"dinov2-{fields.get('variant', 'vitb14')}{'-reg4' if fields.get('registers') else ''}"
