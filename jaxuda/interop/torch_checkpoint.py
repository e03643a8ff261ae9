"""Converts weights of published torch networks to variables of our networks, and back.

A `Layout` maps each variable of a network to its name in a torch state dict; both directions of the conversion follow
from it. The networks define their layouts (`torch_layouts`, see `jaxuda.models`).
"""

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
from jaxuda.interop.layouts import LEAVES, Layout, joined, separated
from jaxuda.interop.parts import choose, clean, common_start, is_beside, prefixes_of
from jaxuda.interop.pickle_names import Unread
from jaxuda.interop.pickles import shown
from jaxuda.interop.tensor_files import pth_bytes, read_entries, safetensors_bytes

State = Mapping[str, np.ndarray | Unread]


class Match(NamedTuple):
    """The entries of a state dict, compared with the variables of a network.

    leaves: path in our tree -> array in our layout, a view.
    missing: torch names that the network needs and the file lacks.
    unused: names in the file that the network does not have, without counters of batches.
    misshapen: one line for each entry of another shape.
    invalid: one line for each entry whose numbers are no weights.
    deeper: those of `unused` that lie inside of the network's backbone: the file has another one.
    prefix: the names of the network's entries begin with it.
    others: the prefixes of other networks in the file.
    kind: the file's backbone in words, if it is known and is not that of the network; else "".
    """

    leaves: dict[tuple[str, ...], np.ndarray]
    missing: list[str]
    unused: list[str]
    misshapen: list[str]
    invalid: list[str]
    deeper: list[str]
    prefix: str
    others: list[str]
    kind: str


def load_torch(source: Mapping[str, Any] | str | os.PathLike, model: nn.Module, part: str = "") -> dict[str, Any]:
    """Variables of `model` from a torch checkpoint.

    Args:
      source: a .pth or .safetensors file, which is read without running anything in it, or a state dict: torch
        name -> array, or, as in SDCA's files, part ("feature_extractor", "classifier") -> such a dict.
        Convolutions are (out, in, kh, kw). Names may begin with "module.", and may have another common prefix.
      model: a network or an `FCDiscriminator`. Classes stay in the order of the file (see `Layout.order`).
      part: which of several networks in the source ("student"); see `parts.choose`.

    Returns:
      {"params", "batch_stats"} of float32 arrays (without "batch_stats" if the model has none).

    Raises:
      UserError: the file cannot be read; it holds several such networks, and `part` is none of them; or an entry is
        missing, unused, of another shape or not finite: the message lists them. Only what lies outside of the
        network's prefix is skipped, with counters of batches (`num_batches_tracked`), which no computation needs, the
        state of optimizers, and single numbers such as the epoch.
    """
    where = "" if isinstance(source, Mapping) else f"{os.fspath(source)}: "
    state = clean(source if isinstance(source, Mapping) else read_entries(source))
    match, _ = match_network(state, model, part, where)
    inside = [name for name in match.unused if name.startswith(match.prefix)]
    inside = [name for name in inside if not name.startswith(tuple(match.others))]
    unused = [name for name in inside if not is_beside(name.removeprefix(match.prefix), state.get(name))]
    raise_problems(match._replace(unused=unused), model, where)
    return as_variables(match.leaves)


def torch_layouts(model: nn.Module) -> dict[str, Layout]:
    """The layouts of a network; by default its torch names are the paths of its variables."""
    if hasattr(model, "torch_layouts"):
        return model.torch_layouts()
    return {"paths": Layout(lambda path: ".".join((*path[1:-1], LEAVES.get(path[-1], path[-1]))), "")}


def match_network(state: State, model: nn.Module, part: str = "", where: str = "") -> tuple[Match, str]:
    """All of a network's variables, and the name of the layout that the file has.

    Args:
      state: as returned by `clean`.
      model, part: as for `load_torch`.
      where: begins messages.

    Raises:
      UserError: the file has none of the network's layouts, it has several such networks and `part` is none of them,
        or its classifier is of other layers.
    """
    layouts = torch_layouts(model)
    state = _joined(state, layouts)
    layout, prefixes, shapes = _find(state, model, layouts, f"{type(model).__name__} that is known", part, where)
    if hasattr(model, "other_head"):
        names = [name.removeprefix(prefixes[0]) for name in state if name.startswith(prefixes[0])]
        if problem := model.other_head(layout, names):
            raise UserError(f"{where}{problem}")
    match = _match(state, model, layouts[layout], prefixes, shapes)
    homeless = [".".join(path[1:]) for path in shapes if layouts[layout].name(path) is None]
    return match._replace(missing=[*match.missing, *homeless]), layout


def match_backbone(state: State, model: nn.Module, part: str = "", where: str = "") -> Match:
    """The variables of a network's backbone alone, from an image classifier or any network for segmentation.

    Layers that the files of image classifiers lack are left out. Arguments are those of `match_network`.

    Raises:
      UserError: it has no backbone of this kind, or several and `part` is none of them.
    """
    layouts = model.backbone_layouts()
    state = _joined(state, layouts)
    what = f"backbone of the kind {model.describe()}"
    layout, prefixes, shapes = _find(state, model, layouts, what, part, where, only="backbone")
    return _match(state, model, layouts[layout], prefixes, shapes)


def _find(
    state: State, model: nn.Module, layouts: Mapping[str, Layout], what: str, part: str, where: str, only: str = ""
) -> tuple[str, list[str], dict[tuple[str, ...], tuple]]:
    """The first layout that fits a file; the prefix of its names, then those of others; path -> shape of the variables.

    only: the one part of the variables that is wanted ("backbone"); "": all.
    """
    anchors, fitting, shapes, by_channels = {}, {}, {}, {}
    for name, layout in layouts.items():
        anchors[name] = layout.anchor or next(filter(None, map(layout.name, _shapes(model))))
        for prefix in prefixes_of(state, anchors[name]):
            if prefix not in fitting:
                channels = 3
                if layout.reads_maps:
                    channels = (*getattr(state[prefix + anchors[name]], "shape", ()), 3, 3)[1]
                fitting[prefix] = name
                if channels not in by_channels:
                    found = _shapes(model, channels).items()
                    by_channels[channels] = {path: shape for path, shape in found if only in ("", path[1])}
                shapes[prefix] = by_channels[channels]
    if not fitting:
        if not all(layout.anchor for layout in layouts.values()):
            return next(iter(layouts)), [""], _shapes(model)
        raise UserError(
            f"{where}the torch checkpoint has no {what} (looked for {', '.join(anchors.values())}); its first entries "
            f"are {[shown(name) for name in list(state)[:3]]}"
        )
    needed = {
        prefix: {
            torch_name: to_torch(np.empty(shape, bool)).shape
            for path, shape in shapes[prefix].items()
            if path[0] == "params" and (torch_name := layouts[name].name(path)) is not None
        }
        for prefix, name in fitting.items()
    }
    prefix = choose(state, needed, part, where)
    return fitting[prefix], [prefix, *(fitting.keys() - {prefix})], shapes[prefix]


def _joined(state: State, layouts: Mapping[str, Layout]) -> State:
    return joined(state, {whole: parts for layout in layouts.values() for whole, parts in layout.joins.items()})


def _shapes(model: nn.Module, channels: int = 3) -> dict[tuple[str, ...], tuple]:
    """Path -> shape of every variable, found without computing anything."""
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(variables).items()}


def _match(
    state: State, model: nn.Module, layout: Layout, prefixes: list[str], shapes: dict[tuple[str, ...], tuple]
) -> Match:
    prefix, *others = prefixes
    names = {path: prefix + name for path in shapes if (name := layout.name(path)) is not None}
    leaves, misshapen, invalid = {}, [], []
    for path, name in names.items():
        if name not in state:
            continue
        if isinstance(state[name], Unread):
            invalid.append(f"{shown(name)} {state[name]}")
            continue
        array = from_torch(state[name])
        if array.shape != shapes[path]:
            expected = to_torch(np.empty(shapes[path], bool)).shape
            misshapen.append(f"shape of {name}: {state[name].shape} in the checkpoint, {expected} in the network")
        elif problem := unusable(array, path[-1]):
            invalid.append(f"{name} {problem}")
        else:
            array = layout.change(path, array)
        leaves[path] = array
    known, unneeded = set(names.values()), tuple(prefix + words for words in (*layout.unneeded, *layout.copies))
    unused = [name for name in state if name not in known and not (unneeded and name.startswith(unneeded))]
    deeper = _inside([name for path, name in names.items() if path[1] == "backbone"], unused)
    kind = ""
    if hasattr(model, "other_backbone"):
        arrays = {name: entry for name, entry in state.items() if isinstance(entry, np.ndarray)}
        kind = model.other_backbone(
            {name.removeprefix(prefix): array.shape for name, array in arrays.items() if name.startswith(prefix)}
        )
    missing = [name for name in names.values() if name not in state]
    unused, deeper = list(map(shown, unused)), list(map(shown, deeper))
    return Match(leaves, missing, unused, misshapen, invalid, deeper, prefix, others, kind)


def _inside(backbone: list[str], names: list[str]) -> list[str]:
    """Those of `names` that lie in a module of the backbone, or beside its numbered layers."""
    if not backbone:
        return []
    count = common_start([name.split(".")[:-1] for name in backbone])

    def module(name: str) -> tuple[str, ...]:
        """The first words of a name, down to the module that tells layers apart; a number counts as any number."""
        *place, last = (*name.split("."), *[""] * count)[: count + 1]
        return (*place, re.sub(r"^\d+$", "#", last))

    known = {module(name) for name in backbone}
    return [name for name in names if module(name) in known]


def unusable(array: np.ndarray, leaf: str) -> str:
    """Why an array cannot be weights or statistics, as the end of a sentence; "" if it can.

    Args:
      array: any numbers.
      leaf: the name of the variable in our trees; "var" may not be negative.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"has the type {array.dtype}, but weights are floating-point numbers: in torch, save tensor.float()"
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if bad := array.size - np.count_nonzero(np.isfinite(numbers)):
        return f"has {bad} of {array.size} numbers that are not finite (NaN or infinite)"
    if leaf == "var" and (bad := np.count_nonzero(numbers < 0)):
        return f"has {bad} of {array.size} numbers that are negative, but is a variance"
    return ""


def raise_problems(match: Match, model: nn.Module, where: str = "", hint: str = "") -> None:
    """Raises a UserError if an entry is missing, unused, of another shape, or no weights.

    Args:
      match, model: the file's entries and the network.
      where: begins the message.
      hint: what to compare the file with; "": the classes and the fields of config.model.
    """
    problems = [f"missing: {name}" for name in match.missing]
    problems += [f"not part of the network: {name}" for name in match.unused]
    problems += match.misshapen
    if problems:
        fields = ", ".join(getattr(model, "SHAPE_FIELDS", ("width",)))
        hint = hint or f"compare it with the classes and the fields of config.model ({fields})"
        kind = f" (its backbone is {match.kind})" if match.kind else ""
        raise UserError(
            f"{where}the torch checkpoint does not fit {type(model).__name__}{kind}; {hint}:{listed(problems)}"
        )
    if match.invalid:
        raise UserError(f"{where}the torch checkpoint cannot be used:{listed(match.invalid)}")


def listed(problems: list[str]) -> str:
    """Problems as the end of a message, one a line; only the first twelve."""
    return "\n  " + "\n  ".join(problems[:12] + ([f"... and {len(problems) - 12} more"] if len(problems) > 12 else []))


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
    name, change = layouts[layout].name, layouts[layout].change
    arrays = {name(leaf): to_torch(change(leaf, np.asarray(value))) for leaf, value in flat.items()}
    arrays |= {copy: arrays[original] for copy, original in layouts[layout].copies.items()}
    arrays = separated(arrays, layouts[layout].joins) | (more or {})
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
