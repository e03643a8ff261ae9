"""DeepLab-v2 (Chen et al., TPAMI 2018) as the adaptation literature uses it: one class for every method."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda.errors import UserError
from jaxuda.interop.layouts import Layout
from jaxuda.models import Outputs, Pretrained, check_choices
from jaxuda.models.deeplab_files import PLACES, Places, backbone_kind, other_head, plca_order, resnet_kind, torch_name
from jaxuda.models.heads import DILATIONS, DilatedHead
from jaxuda.models.layers import NORMS, BatchNorm, Conv
from jaxuda.models.resnet import DEPTHS, VARIANTS, ResNet
from jaxuda.models.vgg import NEW_LAYERS, VGG

BACKBONES = (*DEPTHS, "vgg16")


class DepthBranch(nn.Module):
    """DADA's privileged task (Vu et al., ICCV 2019, figure 2): predicts depth, and multiplies the features by the
    layer that predicts it.

    With A channels of features (2048 in the paper) its layers have A/4, A/4, A/16 and A channels. The paper's
    initialisation N(0, 0.01) is widened by sqrt(2048 / A): otherwise the product of four layers of a narrow network
    starts so close to zero that its head learns nothing for hundreds of steps.
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
    variant: "caffe", "torchvision" or "v1c" (see `resnet.py`); VGG-16 has only one kind and ignores it.
    width: channels of the stem; every other layer of the backbone scales with it (64 in the literature).
    blocks: residual blocks (VGG: convolutions) per stage, if they differ from the published network.
    aux: a second head on the third stage of a ResNet (the 1024-channel stage of ResNet-101).
    head_bias: whether the head's convolutions have a bias.
    head_dilations: the dilations of the head's convolutions; (6, 12) in DACS, DAFormer and MIC.
    dilated: whether stages 3 and 4 of a ResNet are dilated; they keep stride 1 either way.
    depth: DADA's depth branch.
    norm: "batch" (statistics of the global batch in training) or "frozen" (always the running statistics).
    norm_eps: 1e-5; SDCA's frozen layers use 0.
    dtype: compute dtype; parameters, statistics and outputs stay float32 with "bfloat16".
    remat: save most of the memory of training by computing a ResNet's blocks twice.
    axis_name: device axis over which norm="batch" reduces in training.

    Variables: params["backbone" | "head" | "aux_head" | "depth"] and batch_stats["backbone"].
    Raises UserError on an unknown value of a field.
    """

    num_classes: int
    backbone: str = "resnet101"
    variant: str = "caffe"
    width: int = 64
    blocks: tuple[int, ...] | None = None
    aux: bool = False
    head_bias: bool = True
    head_dilations: tuple[int, ...] = DILATIONS
    dilated: bool = True
    depth: bool = False
    norm: str = "batch"
    norm_eps: float = 1e-5
    dtype: str = "float32"
    remat: bool = False
    axis_name: str | None = None

    CLASSIFIERS = ("head", "aux_head")
    NEW_LAYERS = NEW_LAYERS
    SHAPE_FIELDS = ("backbone", "variant", "width", "blocks", "aux", "depth", "head_bias", "head_dilations")

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, index: jax.Array | None = None) -> Outputs:
        """Maps normalised images (N, H, W, 3) to `Outputs`; training with norm="batch" updates batch_stats.

        `index` is not used, since nothing is drawn at random.
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
        head = functools.partial(DilatedHead, self.num_classes, self.head_bias, self.dtype, self.head_dilations)
        main = head(name="head")(features)
        aux = head(name="aux_head")(middle) if self.aux else None
        return Outputs(main, features, aux, depth).widened()

    def classifier(self, num_classes: int) -> DilatedHead:
        """A head like the network's own, which maps `Outputs.features` to logits of `num_classes` classes."""
        return DilatedHead(num_classes, self.head_bias, self.dtype, self.head_dilations, parent=None)

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

    def describe(self) -> str:
        """The fields that decide the features, as one line of text."""
        kind = "" if self.backbone == "vgg16" else f" {self.variant}"
        blocks = "" if self.blocks is None else f", blocks {'-'.join(map(str, self.blocks))}"
        return f"{self.backbone}{kind}, width {self.width}{blocks}"

    def torch_layouts(self) -> dict[str, Layout]:
        """How published files name the variables; `Layout.order` is set for the numbers of classes of PLCA's files."""
        return {
            name: Layout(
                functools.partial(torch_name, self, places),
                f"{places.head.format(0)}.weight",
                parts=("feature_extractor", "classifier") if name == "split" else (),
                order=plca_order(self.num_classes) if name == "plca" else (),
            )
            for name, places in PLACES.items()
        }

    def published_layout(self) -> str:
        """The layout of the published network that is most like this one."""
        if self.aux or self.depth:
            return "two_level"
        if self.variant == "v1c" and self.backbone != "vgg16":
            return "mmseg"
        if not self.head_bias:
            return "plca"
        if self.backbone == "vgg16" or self.variant == "torchvision":
            return "split"
        return "one_level" if self.backbone == "resnet18" else "two_level"

    def backbone_layouts(self) -> dict[str, Layout]:
        """How files of image classifiers, and of segmentation networks, name the backbone."""
        if self.backbone != "vgg16":
            name = functools.partial(torch_name, self, Places("", ""))
            return {"resnet": Layout(name, "layer1.0.conv1.weight")}
        # torchvision's VGG has its convolutions and all of its pools below "features".
        return {
            name: Layout(functools.partial(torch_name, self, Places(f"{name}.", "", pools=pools)), f"{name}.0.weight")
            for name, pools in (("features", 4), ("backbone", 3))
        }

    def other_backbone(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The backbone in a torch file, in words, from the shapes of its entries; "" if it is ours or not known."""
        kind = backbone_kind(shapes)
        if self.backbone == "vgg16":
            return "" if kind == "a VGG-16" and self.blocks is None else kind
        bottleneck, blocks = DEPTHS[self.backbone]
        ours = resnet_kind(bottleneck, tuple(self.blocks or blocks), deep=self.variant == "v1c")
        return "" if kind == ours else kind

    def other_head(self, layout: str, names: Sequence[str]) -> str:
        """Why the head in a torch file of this layout is another one, and what to set; "" if it is not."""
        return other_head(PLACES[layout], self.head_dilations, names)

    def _check_fields(self) -> None:
        check_choices(self, backbone=BACKBONES, variant=VARIANTS, norm=NORMS)
        if self.aux and self.backbone == "vgg16":
            raise UserError("model.aux = True needs a ResNet: there is no second level for vgg16")
        if not self.head_dilations or not all(isinstance(each, int) and each > 0 for each in self.head_dilations):
            raise UserError(
                f"model.head_dilations = {self.head_dilations} must be positive integers, one for each convolution of "
                f"the head, such as (6, 12) or {DILATIONS}"
            )
        if self.remat and self.backbone == "vgg16":
            raise UserError(
                "model.remat = True needs a ResNet: it would not save memory in vgg16 (its first layers need most)"
            )


def make(fields: Mapping[str, Any], num_classes: int) -> DeepLabV2:
    """The network of `config.model`; its fields are those of `DeepLabV2`."""
    return DeepLabV2(num_classes=num_classes, **fields)


# Published weights ------------------------------------------------------------------------------------------


_RESNET18 = {"backbone": "resnet18", "variant": "torchvision"}
_RESNET50 = {"backbone": "resnet50", "variant": "torchvision"}
_RESNET101 = {"backbone": "resnet101", "variant": "torchvision"}
IMAGENET = {
    "resnet18": Pretrained(_RESNET18, "resnet18-f37072fd.pth", "torchvision"),
    "resnet50-torchvision": Pretrained(_RESNET50, "resnet50-0676ba61.pth", "torchvision"),
    "resnet101-torchvision": Pretrained(_RESNET101, "resnet101-63fe2227.pth", "torchvision"),
    "resnet101-caffe": Pretrained(
        _RESNET101 | {"variant": "caffe"},
        "DeepLab_resnet_pretrained_imagenet.pth",
        "the ADVENT repository's releases",
    ),
    "resnet101-v1c": Pretrained(
        _RESNET101 | {"variant": "v1c"},
        "resnet101_v1c-e67eebb6.pth",
        "OpenMMLab (https://download.openmmlab.com/pretrain/third_party/)",
    ),
    "vgg16-caffe": Pretrained({"backbone": "vgg16", "variant": "caffe"}, "vgg16-00b39a1b.pth", "jcjohnson/pytorch-vgg"),
    "vgg16-torchvision": Pretrained(
        {"backbone": "vgg16", "variant": "torchvision"}, "vgg16-397923af.pth", "torchvision"
    ),
}
# First digits of the SHA-256 of torchvision's ImageNet weights, as in the names of the files. They expect RGB in 0..1
# and bottlenecks that stride in their 3x3: in a caffe network they would train badly without any error.
_TORCHVISION = {
    *("5d3b4d8f", "63fe2227", "cd907fc2", "19c8e357", "0676ba61", "11ad3fa6"),
    "397923af",
}
# Between the standard deviations of normalised images, about 1, and of images in 0..255, about 60; see
# `_input_deviation`, whose first factor is small for filters of edges and large for those of colours.
_DEVIATION = 12.0


def imagenet_name(fields: Mapping[str, Any], preprocess: str) -> str:
    """The weights of `IMAGENET` that a network with these fields and this normalisation of images starts from.

    Raises:
      UserError: there are none for this network.
    """
    backbone, variant = fields["backbone"], fields["variant"]
    if backbone == "resnet18" and variant != "v1c":
        return backbone  # the LFASS experiments use torchvision's file in a caffe network
    if backbone == "vgg16":
        variant = "torchvision" if preprocess == "imagenet" else "caffe"
    if f"{backbone}-{variant}" not in IMAGENET:
        raise UserError(
            f"no ImageNet weights are known for config.model.backbone={backbone} of the variant {variant} (known: "
            f"{', '.join(IMAGENET)}): choose one of those, or init=scratch"
        )
    return f"{backbone}-{variant}"


def imagenet_problem(
    name: str, sha256: str, entries: Sequence[str], leaves: Mapping[tuple[str, ...], np.ndarray]
) -> str:
    """Why a file is not the one of `IMAGENET`; "" if it may be.

    Args:
      name: a key of `IMAGENET`.
      sha256: the file's checksum.
      entries: the names of its tensors.
      leaves: path of a variable -> array, as in `torch_checkpoint.Match`.
    """
    published, caffe = IMAGENET[name], name.endswith("-caffe")
    named_by_caffe, deviation = any("Scale" in entry.split(".") for entry in entries), _input_deviation(leaves)
    if caffe and (sha256[:8] in _TORCHVISION or (not named_by_caffe and deviation < _DEVIATION)):
        return (
            f"is like torchvision's {published.fields['backbone']}, of normalised images, not {name}, which is another "
            f"network, of images in 0..255: get {published.file} from {published.publisher}, or set the config's "
            "model.variant and preprocess for it"
        )
    if not caffe and (named_by_caffe or deviation > _DEVIATION):
        return (
            f"comes from Caffe (a network of images in 0..255), and {name} is another network, of normalised images: "
            f"get {published.file} from {published.publisher}"
        )
    return ""


def _input_deviation(leaves: Mapping[tuple[str, ...], np.ndarray]) -> float:
    """An estimate of the standard deviation of the images that a ResNet was trained on; NaN if it is not known.

    A convolution of images of variance v, whose pixels were independent, has the variance v * (sum of its squared
    weights), and bn1 has kept the variance of the first convolution's outputs. The pixels of photos depend on each
    other, so that this is right only up to a small factor; normalised images and images in 0..255 differ by 60.
    """
    kernel = leaves.get(("params", "backbone", "conv1", "kernel"))
    variance = leaves.get(("batch_stats", "backbone", "bn1", "var"))
    if kernel is None or variance is None:
        return math.nan
    squares = float(np.sum(np.square(kernel, dtype=np.float64)))
    total = float(np.sum(variance, dtype=np.float64))
    return math.sqrt(total / squares) if squares > 0 and total >= 0 else math.nan
