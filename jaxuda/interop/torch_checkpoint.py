"""Weights of published torch networks as variables of ours.

One function, `torch_name`, says what a leaf of our tree is called in a torch state dict; everything else
follows from it in both directions. Published networks differ only in where they put the backbone and the
heads (`LAYOUTS`).
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import files
from jaxuda.errors import UserError
from jaxuda.interop.pickles import shown
from jaxuda.interop.tensor_files import pth_bytes, read_tensors, safetensors_bytes
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.discriminator import FCDiscriminator
from jaxuda.models.vgg import BLOCKS, NEW_LAYERS


class Layout(NamedTuple):
    """Where a torch network keeps its parts; `{}` stands for the index of the head's convolution."""

    backbone: str
    head: str
    aux_head: str = ""
    pools: int = 3  # of a VGG: those that still take a place in its list of layers


# Tried in this order: the first whose main head is in the state dict is used.
LAYOUTS = {
    "two_level": Layout("", "layer6.conv2d_list.{}", "layer5.conv2d_list.{}"),  # MinEnt, AdvEnt, DADA and kin
    "one_level": Layout("", "layer5.conv2d_list.{}"),  # LFASS
    "split": Layout("feature_extractor.backbone.", "classifier.conv2d_list.{}"),  # SDCA
    "plca": Layout("backbone.", "classifier.0.convs.{}.0"),
}
# Published PLCA networks order the classes in their own way: Cityscapes train id of each of their classes. Those for
# SYNTHIA have the first 16.
PLCA_ORDER = (10, 2, 0, 1, 4, 8, 5, 13, 7, 11, 18, 17, 6, 12, 15, 3, 9, 14, 16)
_WRAPPERS = ("module", "Scale")
_FIRST_OF_RESNET = "layer1.0.conv1.weight"
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# CFContra's projection head, a Sequential of linear, ReLU, linear.
_PROJECTION = {
    f"{layer}.{leaf}": f"head.{place}.{_LEAVES[leaf]}"
    for layer, place in (("linear0", 0), ("linear1", 2))
    for leaf in ("kernel", "bias")
}
_DEPTH = {"enc1": "enc4_1", "enc2": "enc4_2", "enc3": "enc4_3", "dec": "dec4"}


class Match(NamedTuple):
    """The entries of a state dict beside the variables of a network.

    leaves: path in our tree -> array as we keep it, a view.
    missing: torch names that the network needs and the file has not.
    unused: names in the file that the network has no place for; counters of batches are not told.
    misshapen: one line for each entry of another shape.
    """

    leaves: dict[tuple[str, ...], np.ndarray]
    missing: list[str]
    unused: list[str]
    misshapen: list[str]


def load_torch(source: Mapping[str, Any] | str | os.PathLike, model: nn.Module) -> dict[str, Any]:
    """Variables of `model` from a torch checkpoint.

    Args:
      source: a .pth or .safetensors file, which is read without running anything in it, or a state dict: torch
        name -> array, or, as in SDCA's files, part ("feature_extractor", "classifier") -> such a dict.
        Convolutions are (out, in, kh, kw). Names may begin with "module.", and lie below a name of their own.
      model: a `DeepLabV2` or an `FCDiscriminator`. Classes stay in the order of the file (see `PLCA_ORDER`).

    Returns:
      {"params", "batch_stats"} of float32 arrays (without "batch_stats" where the model has none).

    Raises:
      UserError: the file cannot be read; or an entry is missing, left over or of another shape: the text lists
        them. Only counters of batches (`num_batches_tracked`), which no computation needs, and the state of
        optimizers are passed over.
    """
    state = clean(source if isinstance(source, Mapping) else read_tensors(source))
    match, _ = match_network(state, model)
    unused = [name for name in match.unused if not name.startswith("optim")]
    raise_problems(match._replace(unused=unused), model)
    return as_variables(match.leaves)


def match_network(state: Mapping[str, np.ndarray], model: nn.Module) -> tuple[Match, str]:
    """All of a network's variables, and the name of the layout that the file has.

    Raises:
      UserError: it has no pixel classifier that is known.
    """
    layout, prefix = _find_layout(state, model)
    shapes = _shapes(model, state)
    names = {path: prefix + torch_name(path, model, LAYOUTS.get(layout, Layout("", ""))) for path in shapes}
    return _match(state, names, shapes), layout


def match_backbone(state: Mapping[str, np.ndarray], model: DeepLabV2) -> Match:
    """The variables of a network's backbone alone, from a classifier of images or any network for segmentation.

    Of torchvision's VGG-16 they are those without fc6 and fc7, which are new layers.

    Raises:
      UserError: it has no backbone of this kind.
    """
    vgg = model.backbone == "vgg16"
    # torchvision's VGG has its convolutions below "features", SDCA's below "backbone".
    firsts = {"features.0.weight": "features.", "backbone.0.weight": "backbone."} if vgg else {_FIRST_OF_RESNET: ""}
    found = [(name, first) for first in firsts for name in state if name == first or name.endswith(f".{first}")]
    if not found:
        raise UserError(
            f"the checkpoint has no backbone of the kind {model.backbone} (looked for {', '.join(firsts)}); "
            f"its first entries are {[shown(name) for name in list(state)[:3]]}"
        )
    name, first = min(found, key=lambda pair: len(pair[0]))
    classifier = first.startswith("features")
    layout = Layout(name.removesuffix(first) + firsts[first], "", pools=4 if classifier else 3)
    shapes = {path: shape for path, shape in _shapes(model, state).items() if path[1] == "backbone"}
    if classifier:
        shapes = {path: shape for path, shape in shapes.items() if path[2] not in NEW_LAYERS}
    return _match(state, {path: torch_name(path, model, layout) for path in shapes}, shapes)


def _match(
    state: Mapping[str, np.ndarray], names: dict[tuple[str, ...], str], shapes: dict[tuple[str, ...], tuple[int, ...]]
) -> Match:
    leaves, misshapen = {}, []
    for path, name in names.items():
        if name not in state:
            continue
        array = from_torch(state[name])
        if array.shape != shapes[path]:
            expected = to_torch(np.empty(shapes[path], bool)).shape
            misshapen.append(f"shape of {name}: {state[name].shape} in the checkpoint, {expected} in the network")
        leaves[path] = array
    known = set(names.values())
    missing = [name for name in names.values() if name not in state]
    return Match(leaves, missing, [shown(name) for name in state if name not in known], misshapen)


def match_projection(state: Mapping[str, np.ndarray], channels: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """CFContra's projection head for features of that many channels, if the file has one.

    Returns:
      Path of a parameter ("linear0.kernel", ...) -> array as we keep it, and the names of its entries in the file; both
      empty where it has none.

    Raises:
      UserError: an entry is missing or of another shape.
    """
    last = _PROJECTION["linear0.kernel"]
    found = [name for name in state if name == last or name.endswith(f".{last}")]
    if not found:
        return {}, []
    prefix, arrays, problems = min(found, key=len).removesuffix(last), {}, []
    for path, name in _PROJECTION.items():
        array, shape = state.get(prefix + name), (channels, channels, 1, 1) if path.endswith("kernel") else (channels,)
        if array is None:
            problems.append(f"missing: {prefix}{name}")
        elif array.size != np.prod(shape) or array.shape != shape[: array.ndim]:  # linear layers have two axes
            problems.append(f"shape of {prefix}{name}: {array.shape} in the checkpoint, {shape} in the network")
        else:
            arrays[path] = from_torch(array.reshape(shape)).astype(np.float32)
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"the projection head of the torch checkpoint does not fit:\n  {listed}")
    return arrays, [prefix + name for name in _PROJECTION.values()]


def projection_state(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The inverse of `match_projection`: torch name -> array; None for a head of another kind than the published."""
    if arrays.keys() != _PROJECTION.keys():
        return None
    return {_PROJECTION[path]: to_torch(np.asarray(array)) for path, array in arrays.items()}


def raise_problems(match: Match, model: nn.Module) -> None:
    """UserError if anything is missing, left over or of another shape."""
    problems = [f"missing: {name}" for name in match.missing]
    problems += [f"not part of the network: {name}" for name in match.unused]
    problems += match.misshapen
    if problems:
        listed = "\n  ".join(problems[:12] + ([f"... and {len(problems) - 12} more"] if len(problems) > 12 else []))
        raise UserError(
            f"the torch checkpoint does not fit {type(model).__name__}; compare the fields of config.model"
            f" (backbone, variant, num_classes, aux, depth, head_bias) with it:\n  {listed}"
        )


def as_variables(leaves: dict[tuple[str, ...], np.ndarray]) -> dict[str, Any]:
    """Leaves by path as a tree of float32 arrays."""
    return flax.traverse_util.unflatten_dict({path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves.items()})


def save_torch(
    variables: Mapping[str, Any],
    model: nn.Module,
    path: str | os.PathLike,
    layout: str | None = None,
    more: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes the variables of `model` as its published counterpart names them; `load_torch` reads them back.

    Args:
      variables: {"params", "batch_stats"}.
      model: the `DeepLabV2` or `FCDiscriminator` that they belong to.
      path: ends in .pth (for `torch.load`, with weights_only=True too) or .safetensors.
      layout: one of `LAYOUTS`; None for that of the published network that is most like `model`.
      more: torch name -> array of what else belongs into the file.

    Raises:
      UserError: the file's name ends otherwise, it cannot be written, or the layout has no place for a head.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{path}: say the format by the file's name, which must end in .pth or .safetensors")
    place = Layout("", "") if isinstance(model, FCDiscriminator) else LAYOUTS[layout or published_layout(model)]
    if getattr(model, "aux", False) and not place.aux_head:
        raise UserError(f"the layout '{layout}' has no second head, as model.aux=True has: use 'two_level'")
    flat = flax.traverse_util.flatten_dict(dict(variables))
    arrays = {torch_name(leaf, model, place): to_torch(np.asarray(value)) for leaf, value in flat.items()}
    arrays |= more or {}
    content = safetensors_bytes(arrays) if path.suffix == ".safetensors" else pth_bytes(_parts(arrays, place))
    try:
        files.write_bytes(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def published_layout(model: DeepLabV2) -> str:
    """The layout of the published network that is most like `model`."""
    if model.aux or model.depth:
        return "two_level"
    if not model.head_bias:
        return "plca"
    if model.backbone == "vgg16" or model.variant == "torchvision":
        return "split"
    return "one_level" if model.backbone == "resnet18" else "two_level"


def _parts(arrays: dict[str, np.ndarray], layout: Layout) -> dict[str, Any]:
    """SDCA's files hold one dict for each part, the others one for all."""
    if layout != LAYOUTS["split"]:
        return arrays
    parts: dict[str, Any] = {"feature_extractor": {}, "classifier": {}}
    for name, array in arrays.items():
        part, _, inner = name.partition(".")
        parts[part][inner] = array
    return parts


def torch_name(path: tuple[str, ...], model: nn.Module, layout: Layout) -> str:
    """Torch name of one leaf of our variables.

    Args:
      path: keys from the root, for instance ("params", "backbone", "layer1_0", "conv1", "kernel").
      model: the network the leaf belongs to.
      layout: where the torch network keeps its parts (not used for a discriminator).
    """
    part, *inner, leaf = path[1:]
    if isinstance(model, FCDiscriminator):
        return f"{2 * int(part.removeprefix('conv'))}.{_LEAVES[leaf]}"  # activations take the odd places
    if part in ("head", "aux_head"):
        kind, index = leaf[:-1], leaf[-1]
        return f"{getattr(layout, part).format(index)}.{_LEAVES[kind]}"
    if part == "depth":
        return f"{_DEPTH[inner[0]]}.{_LEAVES[leaf]}"
    if model.backbone == "vgg16":
        inner = [str(_vgg_places(tuple(model.blocks or BLOCKS), layout.pools)[inner[0]])]
    else:
        inner = [_torch_module(name) for name in inner]
    return f"{layout.backbone}{'.'.join(inner)}.{_LEAVES[leaf]}"


def from_torch(array: np.ndarray) -> np.ndarray:
    """(out, in, kh, kw) -> (kh, kw, in, out); vectors stay."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def to_torch(array: np.ndarray) -> np.ndarray:
    """(kh, kw, in, out) -> (out, in, kh, kw); vectors stay."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array


def _torch_module(name: str) -> str:
    name = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}.get(name, name)
    return re.sub(r"^(layer\d)_(\d+)$", r"\1.\2", name)


@functools.cache
def _vgg_places(blocks: tuple[int, ...], pools: int) -> dict[str, int]:
    """Index of each convolution in torch's flat list of convolutions, activations and the first pools."""
    places, place = {}, 0
    for stage, count in enumerate(blocks):
        for index in range(count):
            places[f"conv{stage + 1}_{index + 1}"] = place
            place += 2
        place += stage < pools
    return places | {"fc6": place, "fc7": place + 2}


def clean(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Flat names without what wrappers put before them ("module." of data parallel training, "Scale." of the
    networks that came from Caffe), and without counters of batches."""
    state = {}
    for name, array in _flattened(tensors).items():
        name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if not name.endswith("num_batches_tracked"):
            state[name] = np.asarray(array)
    return state


def _flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": array for inner, array in _flattened(value).items()}
        else:
            flat[key] = value
    return flat


def _find_layout(state: Mapping[str, np.ndarray], model: nn.Module) -> tuple[str, str]:
    """Name of the layout, and the name that everything lies below ("" or one that ends in a dot)."""
    if isinstance(model, FCDiscriminator):
        return "", ""
    for name, layout in LAYOUTS.items():
        head = f"{layout.head.format(0)}.weight"
        if found := [entry for entry in state if entry == head or entry.endswith(f".{head}")]:
            return name, min(found, key=len).removesuffix(head)
    heads = ", ".join(layout.head.format(0) for layout in LAYOUTS.values())
    raise UserError(
        f"the torch checkpoint has no pixel classifier that is known (looked for {heads}); "
        f"its first entries are {[shown(name) for name in list(state)[:3]]}"
    )


def _shapes(model: nn.Module, state: Mapping[str, np.ndarray]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every variable, found without computing anything."""
    channels = 3
    if isinstance(model, FCDiscriminator):
        channels = state["0.weight"].shape[1] if "0.weight" in state else 1
    elif not isinstance(model, DeepLabV2):
        raise UserError(f"torch weights can be read for DeepLabV2 and FCDiscriminator, not {type(model).__name__}")
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(variables).items()}
