"""One file per network family, found by its name in `config.model.name`, with the layers and heads that they share.

A family is a module, in this package or (named by its dotted path) of the user, with the function

    make(fields, num_classes) -> a Flax module

fields: the section `config.model` without `name` and `hrda`, lists as tuples; it has the field `dtype`, the family
    defines the others.
num_classes: C.

The Flax module has

    num_classes, dtype, axis_name
        Fields. dtype: the compute dtype; parameters, statistics and outputs are at least float32. axis_name: the
        device axis over which batch statistics are reduced in training; the step sets it with `clone`.
    __call__(images, train=False, index=None) -> Outputs
        images: (N, H, W, 3) float, normalised. train: batch statistics are used and updated, and layers draw at random
            if the key "dropout" is given.
        index: (N,) int32, the place of each example in the global batch, for `layers.Dropout` and `layers.DropPath`.
        Variables are in the collections "params" and "batch_stats". Weights of image classifiers go into
        params["backbone"].
    CLASSIFIERS
        The parts of the parameters whose outputs are classes: that of `Outputs.main`, then that of `Outputs.aux` if it
        exists. The last axis of all their arrays is the classes.
    classifier(num_classes) -> a Flax module
        A head like the network's own, without a parent (`parent=None`): with the parameters of CLASSIFIERS[0] it maps
        `Outputs.features` to `Outputs.main`.
    parameter_group(path) -> str
        The optimizer's group of the parameter at a path ("backbone", "conv1", "kernel"); see `jaxuda.optimizers`.
    describe() -> str
        The fields that decide the features, as one line: artifacts are only used with the network that made them.
    SHAPE_FIELDS
        The fields of `config.model` that decide the shapes of the variables, for messages.

The section `config.model.hrda`, if there is one, makes any network one of two views; see `hrda.HRDA`.

Optional, for published weights:

    torch_layouts() -> {name: Layout} and published_layout() -> name
        How torch files name the variables: the layouts in the order in which a file is compared with them, and the
        one for writing; see `jaxuda.interop.layouts`. Default: the paths of the variables.
    backbone_layouts() -> {name: Layout}
        The same for params["backbone"] in the files of image classifiers. These files lack NEW_LAYERS, the layers of
        the backbone that start anew.
    LICENCE
        The terms of published weights, which are shown when weights are converted.
    other_backbone(shapes) -> str
        The backbone of a torch file in words, for messages, from torch name -> shape; "" if it is this network's or
        not known.
    other_head(layout, names) -> str
        Why the classifier of a torch file of this layout, with entries of these names, has other layers, with the field
        to set; "" if it has not. (A sum of two branches would otherwise take the first two of four.)
    IMAGENET = {name: Pretrained}, imagenet_name(fields, preprocess) -> name, imagenet_problem(name, sha256, entries,
    leaves)
        In the family's module, only for families of jaxuda: the public ImageNet weights; which of them a network
        starts from; and why a given file is not the expected one ("" if it may be), from its checksum, the names in
        it and the variables that it gives (may be missing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import plugins
from jaxuda.errors import UserError

PyTree = Any
# The attributes of every network; see above.
_CONTRACT = (
    *("num_classes", "dtype", "axis_name", "CLASSIFIERS", "SHAPE_FIELDS"),
    *("classifier", "parameter_group", "describe"),
)


class Detail(NamedTuple):
    """A further prediction, for the same part of all images; see `hrda.HRDA`.

    main: (N, h', w', C) logits, with as many pixels per cell as `Outputs.main` has.
    offset: (2,) int32, the row and the column of the image at which the part begins.
    weight: scalar, the weight of this prediction in a supervised loss; that of `Outputs.main` is 1 - weight.
    """

    main: jax.Array
    offset: jax.Array
    weight: jax.Array


class Outputs(NamedTuple):
    """Everything a method may need, at network resolution (h, w), never bfloat16.

    main: (N, h, w, C) logits.
    features: (N, h, w, A), the input of the main classifier.
    aux: (N, h, w, C) logits of a second level, or None.
    depth: (N, h, w, 1) predicted inverse depth, or None.
    levels: the maps (N, h_i, w_i, A_i) of all stages of the backbone, the finest first, or None.
    detail: in training, the prediction of a network of two views for a part of the images, or None.
    """

    main: jax.Array
    features: jax.Array
    aux: jax.Array | None = None
    depth: jax.Array | None = None
    levels: tuple[jax.Array, ...] | None = None
    detail: Detail | None = None

    def widened(self) -> Outputs:
        """The same with narrow types as float32: resizing, softmax and statistics need more than bfloat16."""
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), self)


class Pretrained(NamedTuple):
    """Public ImageNet weights of a backbone.

    fields: the fields of `config.model` of the network that they fit.
    file, publisher: the file to get, and who publishes it.
    family: the network family; set by `pretrained`.
    package, package_file, sha256: the pip package that brings the file ("NAME==VERSION"), the file's path below the
        folder of installed packages, and its checksum; "" if there is none.
    preprocess: the `config.preprocess` that they expect; "": the network's variant decides.
    """

    fields: Mapping[str, Any]
    file: str
    publisher: str
    family: str = ""
    package: str = ""
    package_file: str = ""
    sha256: str = ""
    preprocess: str = ""


def load_family(fields: Mapping[str, Any], *, imported: bool = False) -> ModuleType:
    """The module of the family that a section `config.model` names; see `plugins.load` for `imported`."""
    # The configs of earlier builds lack the name: their networks are all DeepLab.
    return plugins.load(__name__, "make", fields.get("name", "deeplab"), "model.name", imported=imported)


def make_model(fields: Mapping[str, Any], num_classes: int, *, imported: bool = False) -> nn.Module:
    """The network that `config.model` describes.

    Args:
      fields: the section `config.model`.
      num_classes: C.
      imported: see `plugins.load`.

    Raises:
      UserError: there is no such family, it does not have one of the fields, or its network breaks the contract.
    """
    family = load_family(fields, imported=imported)
    try:
        # A section that was read from a file has lists, and a Flax module with a list cannot be hashed.
        own = {name: _fixed(x) for name, x in fields.items() if name not in ("name", "hrda")}
        model = family.make(own, num_classes)
    except TypeError as error:
        raise UserError(f"config.model does not fit the network '{fields.get('name')}': {error}") from error
    if lacking := [name for name in _CONTRACT if not hasattr(model, name)]:
        raise UserError(f"the network model.name={fields.get('name')!r} lacks {', '.join(lacking)} (see jaxuda.models)")
    return _with_views(model, fields.get("hrda"))


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _with_views(model: nn.Module, fields: Mapping[str, Any] | None) -> nn.Module:
    """The network with the two views of a section `config.model.hrda`; itself without that section."""
    if not fields:
        return model
    from jaxuda.models import hrda  # here: it is built on what this module defines

    try:
        return hrda.wrap(model, {name: _fixed(value) for name, value in fields.items()})
    except TypeError as error:
        raise UserError(f"config.model.hrda has other fields than crop, window and their weights: {error}") from error


def make_saved_model(fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray], where: str) -> nn.Module:
    """The network of a checkpoint, for as many classes as its classifier has.

    Args:
      fields: the section `model` of the stage's config.
      arrays: by dotted path, as returned by `checkpoints.read_variables`.
      where: names the checkpoint in messages.

    Raises:
      UserError: as for `make_model`; or the checkpoint has no classifier of this network.
    """
    model = make_model(fields, 1, imported=True)
    classes = saved_classes(arrays, model.CLASSIFIERS[0])
    if classes is None:
        raise UserError(f"{where} has no '{model.CLASSIFIERS[0]}': it is of another network or method")
    return model.clone(num_classes=classes)


def check_choices(model: nn.Module, **known: Sequence[Any]) -> None:
    """Raises a UserError if a field of a network has none of its known values: `norm=("batch", "frozen")`."""
    for field, choices in known.items():
        if (value := getattr(model, field)) not in choices:
            raise UserError(f"model.{field} = {value!r} is unknown; choose one of: {', '.join(map(str, choices))}")


def saved_classes(arrays: Mapping[str, Any], part: str) -> int | None:
    """The number of classes of a classifier in arrays by dotted path; None if the classifier is missing."""
    return next((array.shape[-1] for name, array in arrays.items() if name.startswith(f"params.{part}.")), None)


def pretrained() -> dict[str, Pretrained]:
    """All public ImageNet weights that jaxuda knows, by name."""
    found = {}
    for name in plugins.names(__name__, "make"):
        known = getattr(plugins.load(__name__, "make", name, "model.name"), "IMAGENET", {})
        found |= {weights: entry._replace(family=name) for weights, entry in known.items()}
    return found


def abstract_variables(model: nn.Module, size: tuple[int, int]) -> PyTree:
    """Shapes and types of the variables of `model` for images of `size` (width, height), without computing them."""
    images = jax.ShapeDtypeStruct((1, size[1], size[0], 3), jnp.float32)
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)


def output_shapes(model: nn.Module, size: tuple[int, int]) -> Outputs:
    """Shapes and types of the `Outputs` of one image of `size` (height, width), without computing them."""
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(model.init_with_output, jax.random.key(0), image)[0]
