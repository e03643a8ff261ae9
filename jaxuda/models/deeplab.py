"""DeepLab-v2 (Chen et al., TPAMI 2018) as the adaptation literature uses it: one class for every method."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxuda.errors import UserError
from jaxuda.models.layers import BatchNorm, Conv, conv2d_sum, head_init
from jaxuda.models.resnet import DEPTHS, VARIANTS, ResNet
from jaxuda.models.vgg import VGG

BACKBONES = (*DEPTHS, "vgg16")
HEAD_DILATIONS = (6, 12, 18, 24)


class Outputs(NamedTuple):
    """Everything a method may need, at network resolution (h, w), about an eighth of the image; never
    bfloat16.

    main: (N, h, w, C) logits.
    aux: (N, h, w, C) logits of the level on the third stage, or None.
    features: (N, h, w, A), the input of the main head's convolutions; with the depth branch the fused ones.
    depth: (N, h, w, 1) predicted inverse depth, or None.
    """

    main: jax.Array
    aux: jax.Array | None
    features: jax.Array
    depth: jax.Array | None


class Head(nn.Module):
    """Sum of four dilated 3x3 convolutions from features to class logits."""

    num_classes: int
    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.num_classes)
        kernels = [self.param(f"kernel{i}", head_init, shape) for i in range(len(HEAD_DILATIONS))]
        y = conv2d_sum(x.astype(self.dtype), [k.astype(self.dtype) for k in kernels], HEAD_DILATIONS)
        if self.use_bias:
            zeros = nn.initializers.zeros
            biases = [self.param(f"bias{i}", zeros, shape[-1:]) for i in range(len(HEAD_DILATIONS))]
            y = y + sum(biases).astype(self.dtype)
        return y


class DepthBranch(nn.Module):
    """DADA's privileged task (Vu et al., ICCV 2019, figure 2): depth, and features multiplied by what
    predicts it.

    With A channels of features (2048 in the paper) its layers have A/4, A/4, A/16 and A channels. The paper's start,
    N(0, 0.01), is widened with sqrt(2048 / A): through four layers a narrow network's product would else start so
    close to zero that its head learns nothing for hundreds of steps.
    """

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        channels = x.shape[-1]
        start = nn.initializers.normal(0.01 * (2048 / channels) ** 0.5)
        conv = functools.partial(Conv, use_bias=True, kernel_init=start, dtype=self.dtype)
        encoded = nn.relu(conv(channels // 4, 1, name="enc1")(x))
        encoded = nn.relu(conv(channels // 4, 3, name="enc2")(encoded))
        encoded = conv(channels // 16, 1, name="enc3")(encoded)
        decoded = nn.relu(conv(channels, 1, name="dec")(encoded))
        return jnp.mean(encoded, axis=-1, keepdims=True), x * decoded


class DeepLabV2(nn.Module):
    """DeepLab-v2 with output stride 8; the fields are those of `config.model`.

    num_classes: C.
    backbone: "resnet18", "resnet50", "resnet101" or "vgg16".
    variant: "caffe" or "torchvision" (see `resnet.py`); VGG-16 has only one kind and does not look at it.
    width: channels of the stem; every other layer of the backbone scales with it (64 in the literature).
    blocks: residual blocks (VGG: convolutions) per stage, where they differ from the published network.
    aux: a second head on the third stage of a ResNet (the 1024-channel stage of ResNet-101).
    head_bias: whether the head's convolutions have a bias.
    dilated: whether stages 3 and 4 of a ResNet are dilated; they keep stride 1 either way.
    depth: DADA's depth branch.
    norm: "batch" (statistics of the global batch in training) or "frozen" (running ones always).
    norm_eps: 1e-5; SDCA's frozen layers use 0.
    dtype: compute dtype; parameters, statistics and outputs stay float32 with "bfloat16".
    remat: trade a second forward pass of a ResNet's blocks for most of the memory of training.
    axis_name: device axis over which norm="batch" reduces while training.

    Variables: params["backbone" | "head" | "aux_head" | "depth"] and batch_stats["backbone"].
    Raises UserError on a field that no network has.
    """

    num_classes: int
    backbone: str = "resnet101"
    variant: str = "caffe"
    width: int = 64
    blocks: tuple[int, ...] | None = None
    aux: bool = False
    head_bias: bool = True
    dilated: bool = True
    depth: bool = False
    norm: str = "batch"
    norm_eps: float = 1e-5
    dtype: str = "float32"
    remat: bool = False
    axis_name: str | None = None

    # The parts of the parameters that end in classes: "head" of `Outputs.main`, "aux_head" of `Outputs.aux`.
    CLASSIFIERS = ("head", "aux_head")

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, index: jax.Array | None = None) -> Outputs:
        """Maps normalised images (N, H, W, 3) to `Outputs`; training with norm="batch" moves batch_stats.

        `index`, the examples' places in the global batch, is for networks that draw at random.
        """
        self._check_fields()
        conv = functools.partial(Conv, dtype=self.dtype)
        blocks = tuple(self.blocks) if self.blocks else None
        if self.backbone == "vgg16":
            middle, features = None, VGG(self.width, blocks, conv, name="backbone")(images)
        else:
            norm = functools.partial(
                BatchNorm, mode=self.norm, eps=self.norm_eps, axis_name=self.axis_name, dtype=self.dtype
            )
            middle, features = ResNet(
                self.backbone, self.variant, self.width, blocks, self.dilated, self.remat, conv, norm, name="backbone"
            )(images, train)

        depth = None
        if self.depth:
            depth, features = DepthBranch(self.dtype, name="depth")(features)
        head = functools.partial(Head, self.num_classes, self.head_bias, self.dtype)
        main = head(name="head")(features)
        aux = head(name="aux_head")(middle) if self.aux else None
        # Resizing, softmax and statistics downstream need more than bfloat16.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return jax.tree.map(lambda x: x.astype(wide), Outputs(main, aux, features, depth))

    def classifier(self, num_classes: int) -> Head:
        """A head like the network's own, which maps `Outputs.features` to logits of `num_classes` classes."""
        return Head(num_classes, self.head_bias, self.dtype, parent=None)

    def parameter_group(self, path: tuple[str, ...]) -> str:
        """The optimizer group of a parameter, from its path in the network's parameters; see `jaxuda.optimizers`."""
        if path[0] != "backbone":
            return "head"
        layer = path[-2]
        if layer.startswith("bn") or layer.endswith("_bn"):
            return "norm"
        if layer.startswith("downsample"):
            return "shortcut"
        return "block" if path[1].startswith("layer") else "stem"

    def _check_fields(self) -> None:
        for field, value, known in (
            ("backbone", self.backbone, BACKBONES),
            ("variant", self.variant, VARIANTS),
            ("norm", self.norm, ("batch", "frozen")),
        ):
            if value not in known:
                raise UserError(f"model.{field} = {value!r} is unknown; choose one of: {', '.join(known)}")
        if self.aux and self.backbone == "vgg16":
            raise UserError("model.aux = True needs a ResNet: there is no second level for vgg16")
        if self.remat and self.backbone == "vgg16":
            raise UserError(
                "model.remat = True needs a ResNet: it would save nothing in vgg16, whose first layers need most"
            )


def make(fields: Mapping[str, Any], num_classes: int) -> DeepLabV2:
    """The network of `config.model`, whose fields are those of `DeepLabV2`."""
    blocks = fields.get("blocks")
    return DeepLabV2(num_classes=num_classes, **{**fields, "blocks": None if blocks is None else tuple(blocks)})
