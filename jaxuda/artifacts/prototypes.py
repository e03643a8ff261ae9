"""Prototype memories of both domains, and the file in which a sweep passes them to CFContra's training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxuda.artifacts.arrays import REMEDY, read_arrays, write_arrays
from jaxuda.errors import UserError
from jaxuda.models.heads import ProjectionHead

PyTree = Any
FILE = "prototypes.npz"


class Memories(NamedTuple):
    """One prototype per class and domain, in the space of the projected features.

    source, target: (C, A) float, rows of unit length; zero for a class that has not appeared yet.
    """

    source: jax.Array
    target: jax.Array


def init_projection(key: jax.Array, kind: str, channels: int) -> PyTree:
    """Parameters of a projection head for features with `channels` channels; empty for kind "none"."""
    return ProjectionHead(kind).init(key, jnp.zeros((1, 1, 1, channels))).get("params", {})


def write_prototypes(
    folder: Path, memories: Memories, projection: PyTree, kind: str, model: nn.Module, classes: Sequence[str]
) -> None:
    """Writes `FILE` in `folder`: the memories, and the head whose output space they are in."""
    arrays = {name: np.asarray(value) for name, value in memories._asdict().items()}
    arrays |= {name: np.asarray(value) for name, value in _flat(projection).items()}
    write_arrays(folder / FILE, {**arrays, "kind": np.array(kind)}, classes, (model, memories.source.shape[1]))


def read_prototypes(
    folder: Path, kind: str, model: nn.Module, channels: int, classes: Sequence[str] | None = None
) -> tuple[Memories, PyTree]:
    """Reads what `write_prototypes` wrote, as float NumPy arrays: the memories, and the parameters of the head.

    Args:
      folder: the folder of `FILE`.
      kind: the kind of the projection head that will be used with them.
      model, channels: the network that will use them, and the number of channels of its features.
      classes: as in `arrays.read_arrays`.

    Raises:
      UserError: the file is missing or corrupt, or comes from another network, head or label space.
    """
    path = folder / FILE
    names = [*Memories._fields, "kind"]
    arrays = read_arrays(path, "prototypes", names, model.num_classes, classes, (model, channels))
    if arrays["kind"] != kind:
        raise UserError(
            f"{path} holds prototypes made with projection={str(arrays['kind'])!r}, but this stage has "
            f"projection={kind!r}: set the same value in both stages"
        )
    like = jax.eval_shape(lambda key: init_projection(key, kind, channels), jax.random.key(0))
    lost = [name for name in _flat(like) if name not in arrays]
    if lost:
        raise UserError(f"{path} is corrupt ({lost[0]} is missing): delete it, then {REMEDY}")
    memories = Memories(**{name: arrays[name] for name in Memories._fields})
    return memories, traverse_util.unflatten_dict({name: arrays[name] for name in _flat(like)}, sep=".")


def _flat(projection: PyTree) -> dict[str, Any]:
    return traverse_util.flatten_dict(projection, sep=".")
