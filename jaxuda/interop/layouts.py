"""How torch files name the variables of a network, and how their entries differ from the variables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

# The torch names of the arrays of a layer.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class Layout(NamedTuple):
    """How the torch files of one kind name the variables of a network.

    name: path of a variable ("params", "backbone", "conv1", "kernel") -> its torch name; None if these files lack it.
    anchor: the torch name that identifies such a file; "": none.
    parts: first words of the names; a .pth file has a dict for each. (): one dict for all.
    order: for each class of the file, our index of it; (): the classes have our order.
    reads_maps: the network reads maps instead of images, as many as the layer called `anchor` has inputs.
    joins: last words of the name of a layer -> those of the layers in the file, whose outputs are the layer's in turn.
    change: (path, array in our order of axes) -> array; from the file's array to ours, and from ours to the file's.
    unneeded: first words of names of entries that these files have but no computation needs.
    copies: name of an entry -> the one that it repeats; written, but not needed in a file that is read.
    """

    name: Callable[[tuple[str, ...]], str | None]
    anchor: str
    parts: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    reads_maps: bool = False
    joins: Mapping[str, tuple[str, ...]] = {}
    change: Callable[[tuple[str, ...], np.ndarray], np.ndarray] = lambda path, array: array
    unneeded: tuple[str, ...] = ()
    copies: Mapping[str, str] = {}


Rules = tuple[tuple[str, str | Callable[[re.Match], str]], ...]


def named(rules: Rules, path: tuple[str, ...]) -> str:
    """The torch name of one variable: its path with torch's names of arrays, and every rule applied in turn."""
    name = ".".join((*path[1:-1], LEAVES.get(path[-1], path[-1])))
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def joined(state: Mapping[str, Any], joins: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The entries of a file, those of `joins` joined.

    Layers of which an entry is missing, or of which the shapes differ, stay as they are.
    """
    state = dict(state)
    for whole, parts in joins.items():
        for name in [name for name in state if f".{parts[0]}." in f".{name}"]:
            names = [_with(name, parts[0], part) for part in parts]
            arrays = [state.get(each) for each in names]
            if all(isinstance(array, np.ndarray) for array in arrays) and len({a.shape for a in arrays}) == 1:
                state[_with(name, parts[0], whole)] = np.concatenate(arrays)
                for each in names:
                    del state[each]
    return state


def separated(state: Mapping[str, np.ndarray], joins: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """The inverse of `joined`."""
    found = {}
    for name, array in state.items():
        whole = next((each for each in joins if f".{each}." in f".{name}"), None)
        if whole is None:
            found[name] = array
        else:
            parts = joins[whole]
            found |= {_with(name, whole, p): a for p, a in zip(parts, np.split(array, len(parts)), strict=True)}
    return found


def _with(name: str, old: str, new: str) -> str:
    """A name with other words in the place of the last occurrence of `old`."""
    start, _, end = f".{name}".rpartition(f".{old}.")
    return f"{start}.{new}.{end}"[1:]
