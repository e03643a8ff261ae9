"""How published torch files name the variables of DeepLab-v2, and which networks their names and shapes tell of."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import flax.linen as nn

from jaxuda.interop.layouts import LEAVES
from jaxuda.models.heads import DILATIONS
from jaxuda.models.vgg import BLOCKS, NEW_LAYERS


class Places(NamedTuple):
    """Prefixes of the parts in the published files of one kind; `{}` is the index of the head's convolution."""

    backbone: str
    head: str
    aux_head: str = ""
    pools: int = 3  # the pools that still take a place in a VGG's list of layers


# A file is compared with them in this order.
PLACES = {
    "two_level": Places("", "layer6.conv2d_list.{}", "layer5.conv2d_list.{}"),  # MinEnt, AdvEnt, DADA and kin
    "one_level": Places("", "layer5.conv2d_list.{}"),  # LFASS
    "split": Places("feature_extractor.backbone.", "classifier.conv2d_list.{}"),  # SDCA
    "plca": Places("backbone.", "classifier.0.convs.{}.0"),
    "mmseg": Places("backbone.", "decode_head.aspp_modules.{}.conv"),  # DACS, DAFormer, MIC, SePiCo
}
# Published PLCA networks have an order of classes of their own: the Cityscapes train id of each class. The networks
# for SYNTHIA have the first 16.
PLCA_ORDER = (10, 2, 0, 1, 4, 8, 5, 13, 7, 11, 18, 17, 6, 12, 15, 3, 9, 14, 16)
# The stem of v1c is a Sequential of convolution, normalisation and ReLU, three times.
_STEM = {
    f"{kind}{layer + 1}": f"stem.{3 * layer + place}" for layer in range(3) for place, kind in enumerate(("conv", "bn"))
}
_DEPTH = {"enc1": "enc4_1", "enc2": "enc4_2", "enc3": "enc4_3", "dec": "dec4"}


def torch_name(model: nn.Module, places: Places, path: tuple[str, ...]) -> str | None:
    """The torch name of one variable of a `DeepLabV2`; None if the files lack it."""
    part, *inner, leaf = path[1:]
    if part in model.CLASSIFIERS:
        place = getattr(places, part)
        return f"{place.format(leaf[-1])}.{LEAVES[leaf[:-1]]}" if place else None
    if part == "depth":
        return f"{_DEPTH[inner[0]]}.{LEAVES[leaf]}"
    if model.backbone == "vgg16":
        numbers = _vgg_numbers(tuple(model.blocks or BLOCKS), places.pools)
        return f"{places.backbone}{numbers[inner[0]]}.{LEAVES[leaf]}" if inner[0] in numbers else None
    if model.variant == "v1c" and inner[0] in _STEM:
        return f"{places.backbone}{_STEM[inner[0]]}.{LEAVES[leaf]}"
    modules = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}
    names = [re.sub(r"^(layer\d)_(\d+)$", r"\1.\2", modules.get(name, name)) for name in inner]
    return f"{places.backbone}{'.'.join(names)}.{LEAVES[leaf]}"


def other_head(places: Places, dilations: tuple[int, ...], names: Iterable[str]) -> str:
    """Why the head in a torch file with these names has other branches, and what to set; "" if it has not."""
    pattern = re.compile(re.escape(places.head).replace(r"\{\}", r"(\d+)") + r"\.weight")
    count = 1 + max((int(found[1]) for name in names if (found := pattern.fullmatch(name))), default=-1)
    if count in (0, len(dilations)):
        return ""
    published = DILATIONS[:count] if count <= len(DILATIONS) else f"its {count} dilations"
    return (
        f"the head in the torch checkpoint is a sum of {count} dilated convolutions, that of "
        f"config.model.head_dilations = {dilations} of {len(dilations)}: set it to {published} (the published "
        "recipes of DACS, DAFormer, MIC and SePiCo have this field)"
    )


@functools.cache
def _vgg_numbers(blocks: tuple[int, ...], pools: int) -> dict[str, int]:
    """Index of each convolution in torch's flat list of convolutions, activations and the first `pools` pools."""
    numbers, number = {}, 0
    for stage, count in enumerate(blocks):
        for index in range(count):
            numbers[f"conv{stage + 1}_{index + 1}"] = number
            number += 2
        number += stage < pools
    # An image classifier has four pools; other layers follow them.
    new = {} if pools > 3 else {name: number + 2 * index for index, name in enumerate(NEW_LAYERS)}
    return numbers | new


def plca_order(num_classes: int) -> tuple[int, ...]:
    """For each class of a published PLCA network, our index of it; () if no such network has so many classes."""
    if num_classes not in (16, 19):
        return ()
    ids = PLCA_ORDER[:num_classes]
    return tuple(sorted(ids).index(id_) for id_ in ids)  # the 16 classes lack terrain, truck and train


# (whether blocks are bottlenecks, blocks per stage) -> layers, and convolutions -> layers.
_RESNETS = {
    (False, (1, 1, 1, 1)): 10,
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
_VGGS = {8: 11, 10: 13, 13: 16, 16: 19}


def backbone_kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The image classifier whose convolutions a torch file has ("a ResNet-34"), in words; "" if it is not known.

    Args:
      shapes: torch name -> shape; names may have a prefix.
    """
    found = [(re.search(r"(?:^|\.)layer([1-4])\.(\d+)\.conv(\d)\.weight$", name), name) for name in shapes]
    places = {tuple(map(int, match.groups())): shapes[name] for match, name in found if match}
    if places:
        blocks = tuple(len({block for stage, block, _ in places if stage == each}) for each in (1, 2, 3, 4))
        grouped = len(shape := places.get((1, 0, 2), ())) == 4 and shape[1] < shape[0]
        deep = any(re.search(r"(?:^|\.)stem\.6\.weight$", name) for name in shapes)
        return resnet_kind(any(conv == 3 for *_, conv in places), blocks, grouped, deep)
    layers = [n for n, shape in shapes.items() if re.search(r"(?:^|\.)features\.\d+\.weight$", n) and len(shape) == 4]
    normed = " with batch normalisation" if any(re.search(r"features\.\d+\.running_mean$", n) for n in shapes) else ""
    return f"a VGG-{_VGGS[len(layers)]}{normed}" if len(layers) in _VGGS else ""


def resnet_kind(bottleneck: bool, blocks: tuple[int, ...], grouped: bool = False, deep: bool = False) -> str:
    """A ResNet in words; `grouped`: its 3x3 convolutions are (a ResNeXt); `deep`: it has the stem of "v1c"."""
    family, variant = "ResNeXt" if grouped else "ResNet", " with a deep stem (v1c)" if deep else ""
    if (bottleneck, blocks) in _RESNETS:
        return f"a {family}-{_RESNETS[bottleneck, blocks]}{variant}"
    return f"a {family} of {'-'.join(map(str, blocks))} {'bottleneck' if bottleneck else 'basic'} blocks{variant}"
