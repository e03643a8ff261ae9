"""Converts weights of published torch networks to variables of our networks, and back.

A `Layout` maps each variable of a network to its name in a torch state dict; both directions of the conversion follow
from it. The networks define their layouts (`torch_layouts`, see `jaxuda.models`).
"""

import os
from collections.abc import Callable, Mapping
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


class Layout(NamedTuple):
    """How the torch files of one kind name the variables of a network.

    name: path of a variable ("params", "backbone", "conv1", "kernel") -> its torch name; None if these files lack it.
    anchor: the torch name that identifies such a file; "": none.
    parts: first words of the names; a .pth file has a dict for each. (): one dict for all.
    order: for each class of the file, our index of it; (): the classes have our order.
    reads_maps: the network reads maps instead of images, as many as the layer called `anchor` has inputs.
    """

    name: Callable[[tuple[str, ...]], str | None]
    anchor: str
    parts: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    reads_maps: bool = False


_WRAPPERS = ("module", "Scale")
# The torch names of the arrays of a layer.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# CFContra's projection head: a Sequential of linear, ReLU, linear.
_PROJECTION = {
    f"{layer}.{leaf}": f"head.{place}.{LEAVES[leaf]}"
    for layer, place in (("linear0", 0), ("linear1", 2))
    for leaf in ("kernel", "bias")
}


class Match(NamedTuple):
    """The entries of a state dict, compared with the variables of a network.

    leaves: path in our tree -> array in our layout, a view.
    missing: torch names that the network needs and the file lacks.
    unused: names in the file that the network does not have, without counters of batches.
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
        Convolutions are (out, in, kh, kw). Names may begin with "module.", and may have another common prefix.
      model: a network or an `FCDiscriminator`. Classes stay in the order of the file (see `Layout.order`).

    Returns:
      {"params", "batch_stats"} of float32 arrays (without "batch_stats" if the model has none).

    Raises:
      UserError: the file cannot be read; or an entry is missing, unused or of another shape: the message lists
        them. Only counters of batches (`num_batches_tracked`), which no computation needs, and the state of
        optimizers are skipped.
    """
    state = clean(source if isinstance(source, Mapping) else read_tensors(source))
    match, _ = match_network(state, model)
    unused = [name for name in match.unused if not name.startswith("optim")]
    raise_problems(match._replace(unused=unused), model)
    return as_variables(match.leaves)


def torch_layouts(model: nn.Module) -> dict[str, Layout]:
    """The layouts of a network; by default its torch names are the paths of its variables."""
    if hasattr(model, "torch_layouts"):
        return model.torch_layouts()
    return {"paths": Layout(lambda path: ".".join((*path[1:-1], LEAVES.get(path[-1], path[-1]))), "")}


def match_network(state: Mapping[str, np.ndarray], model: nn.Module) -> tuple[Match, str]:
    """All of a network's variables, and the name of the layout that the file has.

    Raises:
      UserError: the file has none of the network's layouts.
    """
    layouts = torch_layouts(model)
    layout, prefix = _find_layout(state, layouts, f"{type(model).__name__} that is known")
    shapes = _shapes(model, layouts[layout], state)
    match = _match(state, layouts[layout], prefix, shapes)
    homeless = [".".join(path[1:]) for path in shapes if layouts[layout].name(path) is None]
    return match._replace(missing=[*match.missing, *homeless]), layout


def match_backbone(state: Mapping[str, np.ndarray], model: nn.Module) -> Match:
    """The variables of a network's backbone alone, from an image classifier or any network for segmentation.

    Layers that the files of image classifiers lack are left out.

    Raises:
      UserError: it has no backbone of this kind.
    """
    layouts = model.backbone_layouts()
    layout, prefix = _find_layout(state, layouts, f"backbone of the kind {model.describe()}")
    shapes = {path: shape for path, shape in _shapes(model, layouts[layout], state).items() if path[1] == "backbone"}
    return _match(state, layouts[layout], prefix, shapes)


def _find_layout(state: Mapping[str, np.ndarray], layouts: Mapping[str, Layout], what: str) -> tuple[str, str]:
    """The name of the first layout that fits a file, and the common prefix of its names ("" or one ending in a dot)."""
    for name, layout in layouts.items():
        found = [entry for entry in state if f".{entry}".endswith(f".{layout.anchor}")]
        if found or not layout.anchor:
            return name, min(found, key=len).removesuffix(layout.anchor) if layout.anchor else ""
    anchors = ", ".join(layout.anchor for layout in layouts.values())
    raise UserError(
        f"the torch checkpoint has no {what} (looked for {anchors}); its first entries are "
        f"{[shown(name) for name in list(state)[:3]]}"
    )


def _shapes(model: nn.Module, layout: Layout, state: Mapping[str, np.ndarray]) -> dict[tuple[str, ...], tuple]:
    """Path -> shape of every variable, found without computing anything."""
    channels = 3
    if layout.reads_maps:
        channels = next(array.shape[1] for name, array in state.items() if f".{name}".endswith(f".{layout.anchor}"))
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(variables).items()}


def _match(state: Mapping[str, np.ndarray], layout: Layout, prefix: str, shapes: dict[tuple[str, ...], tuple]) -> Match:
    names = {path: prefix + name for path in shapes if (name := layout.name(path)) is not None}
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
      Path of a parameter ("linear0.kernel", ...) -> array in our layout, and the names of its entries in the file; both
      are empty if the file has none.

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
    """The inverse of `match_projection`: torch name -> array; None if the head is not of the published kind."""
    if arrays.keys() != _PROJECTION.keys():
        return None
    return {_PROJECTION[path]: to_torch(np.asarray(array)) for path, array in arrays.items()}


def raise_problems(match: Match, model: nn.Module) -> None:
    """Raises a UserError if an entry is missing, unused or of another shape."""
    problems = [f"missing: {name}" for name in match.missing]
    problems += [f"not part of the network: {name}" for name in match.unused]
    problems += match.misshapen
    if problems:
        listed = "\n  ".join(problems[:12] + ([f"... and {len(problems) - 12} more"] if len(problems) > 12 else []))
        raise UserError(
            f"the torch checkpoint does not fit {type(model).__name__}; compare it with the classes and the fields of "
            f"config.model ({', '.join(getattr(model, 'SHAPE_FIELDS', ('width',)))}):\n  {listed}"
        )


def as_variables(leaves: dict[tuple[str, ...], np.ndarray]) -> dict[str, Any]:
    """Converts leaves by path to a tree of float32 arrays."""
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
      model: the network or `FCDiscriminator` that they belong to.
      path: ends in .pth (for `torch.load`, also with weights_only=True) or .safetensors.
      layout: one of the network's layouts; None: that of the published network that is most like `model`.
      more: torch name -> array, further entries of the file.

    Raises:
      UserError: the file's name has another ending, the file cannot be written, or the layout is unknown or lacks
        some of the variables.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{path}: the file's name gives the format and must end in .pth or .safetensors")
    layouts = torch_layouts(model)
    layout = layout or published_layout(model)
    if layout not in layouts:
        raise UserError(f"there is no layout '{layout}' of {type(model).__name__}: choose one of {', '.join(layouts)}")
    flat = flax.traverse_util.flatten_dict(dict(variables))
    if homeless := [leaf[1] for leaf in flat if layouts[layout].name(leaf) is None]:
        fitting = ", ".join(name for name, each in layouts.items() if None not in map(each.name, flat))
        raise UserError(f"the layout '{layout}' lacks the network's {homeless[0]}: use {fitting}")
    arrays = {layouts[layout].name(leaf): to_torch(np.asarray(value)) for leaf, value in flat.items()}
    arrays |= more or {}
    content = safetensors_bytes(arrays) if path.suffix == ".safetensors" else pth_bytes(_parts(arrays, layouts[layout]))
    try:
        files.write_bytes(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def published_layout(model: nn.Module) -> str:
    """The layout of the published network that is most like `model`."""
    return model.published_layout() if hasattr(model, "published_layout") else next(iter(torch_layouts(model)))


def _parts(arrays: dict[str, np.ndarray], layout: Layout) -> dict[str, Any]:
    """One dict for each part of the layout, or one dict for all."""
    if not layout.parts:
        return arrays
    parts: dict[str, Any] = {part: {} for part in layout.parts}
    for name, array in arrays.items():
        part, _, inner = name.partition(".")
        parts[part][inner] = array
    return parts


def from_torch(array: np.ndarray) -> np.ndarray:
    """(out, in, kh, kw) -> (kh, kw, in, out), (out, in) -> (in, out); vectors stay."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array


def to_torch(array: np.ndarray) -> np.ndarray:
    """(kh, kw, in, out) -> (out, in, kh, kw), (in, out) -> (out, in); vectors stay."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array


def clean(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by flat name, without the prefixes of wrappers ("module." of data parallel training, "Scale." of
    networks converted from Caffe), and without counters of batches."""
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
