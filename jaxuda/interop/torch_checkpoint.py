"""Weights of published torch networks as variables of ours.

One function, `torch_name`, says what a leaf of our tree is called in a torch state dict; everything else
follows from it in both directions. Published networks differ only in where they put the backbone and the
heads (`LAYOUTS`).
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda.errors import UserError
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.discriminator import FCDiscriminator
from jaxuda.models.vgg import BLOCKS


class Layout(NamedTuple):
    """Where a torch network keeps its parts; `{}` stands for the index of the head's convolution."""

    backbone: str
    head: str
    aux_head: str = ""


# Tried in this order: the first whose main head is in the state dict is used.
LAYOUTS = {
    "two_level": Layout("", "layer6.conv2d_list.{}", "layer5.conv2d_list.{}"),  # MinEnt, AdvEnt, DADA and kin
    "one_level": Layout("", "layer5.conv2d_list.{}"),  # LFASS
    "split": Layout("feature_extractor.backbone.", "classifier.conv2d_list.{}"),  # SDCA
    "plca": Layout("backbone.", "classifier.0.convs.{}.0"),
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_DEPTH = {"enc1": "enc4_1", "enc2": "enc4_2", "enc3": "enc4_3", "dec": "dec4"}


def load_torch(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Variables of `model` from a torch state dict.

    Args:
      state_dict: torch name -> array, or, as in SDCA's files, part ("feature_extractor", "classifier") ->
        such a dict. Convolutions are (out, in, kh, kw).
      model: a `DeepLabV2` or an `FCDiscriminator`.

    Returns:
      {"params", "batch_stats"} of float32 arrays (without "batch_stats" where the model has none).

    Raises:
      UserError: an entry is missing, left over or of another shape; the text lists them. Only counters of
        batches (`num_batches_tracked`), which no computation needs, are passed over.
    """
    state = {k: np.asarray(v) for k, v in _flattened(state_dict).items() if not k.endswith("num_batches_tracked")}
    layout = _find_layout(state, model)
    shapes = _shapes(model, state)
    names = {path: torch_name(path, model, layout) for path in shapes}

    known = set(names.values())
    problems = [f"missing: {name}" for name in names.values() if name not in state]
    problems += [f"not part of the network: {name}" for name in state if name not in known]
    leaves = {}
    for path, name in names.items():
        if name not in state:
            continue
        array = from_torch(state[name])
        if array.shape != shapes[path]:
            expected = to_torch(np.empty(shapes[path], bool)).shape
            problems.append(f"shape of {name}: {state[name].shape} in the checkpoint, {expected} in the network")
        leaves[path] = jnp.asarray(array, jnp.float32)
    if problems:
        listed = "\n  ".join(problems[:12] + ([f"... and {len(problems) - 12} more"] if len(problems) > 12 else []))
        raise UserError(
            f"the torch checkpoint does not fit {type(model).__name__}; compare the fields of config.model"
            f" (backbone, variant, num_classes, aux, depth, head_bias) with it:\n  {listed}"
        )
    return flax.traverse_util.unflatten_dict(leaves)


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
        inner = [str(_vgg_places(tuple(model.blocks or BLOCKS))[inner[0]])]
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
def _vgg_places(blocks: tuple[int, ...]) -> dict[str, int]:
    """Index of each convolution in torch's flat list of convolutions, activations and three pools."""
    places, place = {}, 0
    for stage, count in enumerate(blocks):
        for index in range(count):
            places[f"conv{stage + 1}_{index + 1}"] = place
            place += 2
        place += stage < 3
    return places | {"fc6": place, "fc7": place + 2}


def _flattened(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in state_dict.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": array for inner, array in value.items()}
        else:
            flat[key] = value
    return flat


def _find_layout(state: Mapping[str, np.ndarray], model: nn.Module) -> Layout:
    if isinstance(model, FCDiscriminator):
        return Layout("", "")
    for layout in LAYOUTS.values():
        if f"{layout.head.format(0)}.weight" in state:
            return layout
    heads = ", ".join(layout.head.format(0) for layout in LAYOUTS.values())
    raise UserError(
        f"the torch checkpoint has no pixel classifier that is known (looked for {heads}); "
        f"its first entries are {list(state)[:3]}"
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
