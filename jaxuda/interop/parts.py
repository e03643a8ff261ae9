"""Finds a network in a state dict: the prefix of its entries, beside wrappers, other networks and other values.

A *part* is one of several networks in a file ({"student": ..., "teacher": ...}); its name is the words of its prefix
that the other parts' prefixes lack.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxuda.errors import UserError
from jaxuda.interop.pickle_names import Unread
from jaxuda.interop.pickles import shown

# "module" of data parallel training, "Scale" of networks converted from Caffe, those of torch.compile and of FSDP.
_WRAPPERS = ("module", "Scale", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What training loops save beside the weights.
_BESIDE = re.compile(r"optim|scaler|sched")
# The names of these networks in files of mmsegmentation's DAFormer, MIC and SePiCo.
_ALIASES = {"student": "model", "teacher": "ema_model"}
# Words in the names of networks that are not the trained one: they are listed last.
_COPIES = re.compile(r"teacher|ema|imnet|imagenet|momentum|average|avg|swa|target|old|pretrained|frozen", re.IGNORECASE)


def clean(tensors: Mapping[str, Any]) -> dict[str, np.ndarray | Unread]:
    """Arrays by flat name, without the names of wrappers and without counters of batches.

    If two entries would get the same name, the wrappers are kept: they tell the entries apart.
    """
    flat = {name: entry for name, entry in _flattened(tensors).items() if not name.endswith("num_batches_tracked")}
    names = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in flat}
    if len(set(names.values())) < len(names):
        names = {name: name for name in flat}
    return {names[name]: e if isinstance(e, Unread) else np.asarray(e) for name, e in flat.items()}


def _flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": array for inner, array in _flattened(value).items()}
        else:
            flat[key] = value
    return flat


def prefixes_of(state: Mapping[str, Any], anchor: str) -> list[str]:
    """The prefixes ("" or ending in a dot) below which an entry of this name lies; not those of optimizers."""
    found = [name.removesuffix(anchor) for name in state if f".{name}".endswith(f".{anchor}")]
    return [prefix for prefix in found if not _BESIDE.search(prefix)] or found


def is_beside(name: str, entry: np.ndarray | Unread) -> bool:
    """Whether an entry is no part of a network: of an optimizer, or a single number such as the epoch."""
    first, _, rest = name.partition(".")
    return bool(_BESIDE.search(first)) or (not rest and getattr(entry, "size", 0) == 1)


def choose(
    state: Mapping[str, Any], found: Mapping[str, Mapping[str, tuple[int, ...]]], part: str, where: str = ""
) -> str:
    """The prefix of the network that is asked for, or of the only one.

    Args:
      state: name -> array.
      found: for each prefix, the names (without it) and the shapes of the parameters that the network needs.
      part: the name of a part, its prefix, or "student" or "teacher"; "": there is only one. Parts that lack some of
        the parameters do not count unless all do; parts that hold the same numbers are one.
      where: begins messages.

    Raises:
      UserError: there is no such part, or several and none is asked for; the message lists them.
    """
    labels = _labels(list(found))
    if part:
        asked = part.strip(".") or "."
        for words in filter(None, (asked, _ALIASES.get(asked))):
            for label, prefix in labels.items():
                if words in (label, prefix.rstrip(".")) or (len(labels) == 1 and words in prefix.split(".")):
                    return prefix
        others = f"its parts are: {_listed(labels)}" if len(labels) > 1 else "it holds one network: leave out --part"
        raise UserError(f"{where}the torch checkpoint has no part '{part}' with this network; {others}")
    fitting = [prefix for prefix, needed in found.items() if _fits(state, prefix, needed)] or list(found)
    distinct: list[str] = []
    for prefix in fitting:
        if not any(_same(state, prefix, other, found[prefix]) for other in distinct):
            distinct.append(prefix)
    if len(distinct) > 1:
        names = {label: prefix for label, prefix in labels.items() if prefix in distinct}
        raise UserError(
            f"{where}the torch checkpoint holds {len(distinct)} networks, in the parts {_listed(names)}: choose one, "
            f"for example --part={shown(next(iter(names)))}"
        )
    return distinct[0]


def _fits(state: Mapping[str, Any], prefix: str, needed: Mapping[str, tuple[int, ...]]) -> bool:
    return all(getattr(state.get(prefix + name), "shape", shape) == shape for name, shape in needed.items()) and all(
        prefix + name in state for name in needed
    )


def _same(state: Mapping[str, Any], prefix: str, other: str, needed: Mapping[str, Any]) -> bool:
    modules = {name.rpartition(".")[0] for name in needed}  # also their statistics, which are no parameters
    names = {name.removeprefix(start) for start in (prefix, other) for name in state if name.startswith(start)}
    names = {name for name in names if name.rpartition(".")[0] in modules}
    pairs = ((state.get(prefix + name), state.get(other + name)) for name in names)
    return all(isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.array_equal(a, b) for a, b in pairs)


def _labels(found: Sequence[str]) -> dict[str, str]:
    """Name of each part -> its prefix; the trained network first. "." is a part without words of its own."""
    words = [prefix.split(".")[:-1] for prefix in found]
    lead = common_start(words)
    rest = [each[lead:] for each in words]
    tail = common_start([each[::-1] for each in rest])
    labels = {".".join(each[: len(each) - tail]) or ".": prefix for each, prefix in zip(rest, found, strict=True)}
    return dict(sorted(labels.items(), key=lambda item: (bool(_COPIES.search(item[0])), item[0] != ".")))


def common_start(lists: Sequence[Sequence[str]]) -> int:
    """The number of first words that all lists (at least one) share."""
    count = 0
    while all(len(each) > count for each in lists) and len({each[count] for each in lists}) == 1:
        count += 1
    return count


def _listed(labels: Mapping[str, str]) -> str:
    return ", ".join(f"'{shown(label)}'" for label in labels)
