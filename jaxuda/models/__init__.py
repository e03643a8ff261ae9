"""One file per network family, with the layers and heads that they share; found by its name in `config.model.name`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxuda import plugins

PyTree = Any


def make_model(fields: Mapping[str, Any], num_classes: int, *, imported: bool = False) -> nn.Module:
    """The network that `config.model` describes; see `plugins.load` for `imported`."""
    fields = dict(fields)
    family = plugins.load(__name__, "make", fields.pop("name", "deeplab"), "model.name", imported=imported)
    return family.make(fields, num_classes)


def abstract_variables(model: nn.Module, size: tuple[int, int]) -> PyTree:
    """Shapes and types of the variables of `model` for images of `size` (width, height), without computing them."""
    images = jax.ShapeDtypeStruct((1, size[1], size[0], 3), jnp.float32)
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)


def output_shapes(model: nn.Module, size: tuple[int, int]) -> Any:
    """The `Outputs` of one image of `size` (height, width) as shapes and types, without computing them."""
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(model.init_with_output, jax.random.key(0), image)[0]
