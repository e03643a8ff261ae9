"""Weights from outside of a run that a stage may start from: ImageNet's (`init="imagenet"`), or another checkpoint.

`jaxuda.convert` makes them from torch's files: folders like those of finished stages, with `stage.json` and
`checkpoints/`. ImageNet's lie in `DATA_DIR/weights/NETWORK`, beside the prepared datasets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import numpy as np

from jaxuda import files
from jaxuda.data.records import root
from jaxuda.errors import UserError
from jaxuda.models.vgg import NEW_LAYERS
from jaxuda.training import checkpoints

PyTree = Any


class Network(NamedTuple):
    """A backbone that ImageNet weights are published for, and the public file.

    backbone, variant: as in config.model.
    file, publisher: what to get, and from whom.
    """

    backbone: str
    variant: str
    file: str
    publisher: str


IMAGENET = {
    "resnet18": Network("resnet18", "torchvision", "resnet18-f37072fd.pth", "torchvision"),
    "resnet50-torchvision": Network("resnet50", "torchvision", "resnet50-0676ba61.pth", "torchvision"),
    "resnet101-torchvision": Network("resnet101", "torchvision", "resnet101-63fe2227.pth", "torchvision"),
    "resnet101-caffe": Network(
        "resnet101", "caffe", "DeepLab_resnet_pretrained_imagenet.pth", "the ADVENT repository's releases"
    ),
    "vgg16-caffe": Network("vgg16", "caffe", "vgg16-00b39a1b.pth", "jcjohnson/pytorch-vgg"),
    "vgg16-torchvision": Network("vgg16", "torchvision", "vgg16-397923af.pth", "torchvision"),
}


def network_name(config: Any) -> str:
    """Which of `IMAGENET` a stage with this config starts from.

    Args:
      config: has `model` and `preprocess`.

    Raises:
      UserError: there are none for its network.
    """
    backbone, variant = config.model.backbone, config.model.variant
    if backbone == "resnet18":
        return backbone  # published in one kind only; the LFASS experiments use it in a network of the caffe kind
    if backbone == "vgg16":
        variant = "torchvision" if config.preprocess == "imagenet" else "caffe"
    if f"{backbone}-{variant}" not in IMAGENET:
        raise UserError(
            f"no ImageNet weights are known for config.model.backbone={backbone} of the variant {variant} (known: "
            f"{', '.join(IMAGENET)}): choose one of those, or init=scratch"
        )
    return f"{backbone}-{variant}"


def imagenet_folder(network: str, data_dir: str) -> Path:
    """Where the converted weights of one of `IMAGENET` lie; `data_dir` as in a config."""
    return root(data_dir) / "weights" / network


def convert_command(network: str, data_dir: str) -> str:
    """What makes them, with the public file in the current folder."""
    where = f" --data_dir {data_dir}" if data_dir else ""
    return f"python -m jaxuda.convert {IMAGENET[network].file} --imagenet {network}{where}"


def missing(network: str, data_dir: str) -> str:
    """What to do if the weights of a network are not there; empty if they are."""
    folder = imagenet_folder(network, data_dir)
    if (folder / "stage.json").exists():
        return ""
    return (
        f"the ImageNet weights {network} are not in {folder}; get {IMAGENET[network].file} from "
        f"{IMAGENET[network].publisher}, then run\n  {convert_command(network, data_dir)}"
    )


def identity(folder: Path, which: str) -> str:
    """A checksum that changes with the weights in a stage's folder.

    Raises:
      UserError: there is no checkpoint.
    """
    record = files.read_json(folder / "stage.json") if folder.is_dir() else None
    if record is None:
        raise UserError(
            f"there is no checkpoint in {folder}: it is not the folder of a stage (torch's files are converted to one "
            "by jaxuda.convert)"
        )
    return record.get("weights") or checkpoints.manifest_hash(folder / "checkpoints", which)


def fit(arrays: Mapping[str, np.ndarray], variables: PyTree, model: Any, where: str) -> tuple[PyTree, list[str]]:
    """The variables of a network with as much as possible from a checkpoint.

    The backbone must be there, whole and of the same shape, but for layers that classifiers of images have not. A
    head of other classes, or that the checkpoint has not, stays as it is in `variables`.

    Args:
      arrays: by dotted path, as `checkpoints.read_variables` gives them.
      variables: of a new network, {"params", "batch_stats"}.
      model: that network.
      where: names the checkpoint in messages.

    Returns:
      The variables, and a line for each part that starts anew or is not used.

    Raises:
      UserError: the backbone is another.
    """
    flat = flax.traverse_util.flatten_dict(variables, sep=".")
    unlike, anew = [], {}
    for name, leaf in flat.items():
        part, layer = name.split(".")[1:3]
        shape = arrays[name].shape if name in arrays else None
        if shape == leaf.shape:
            continue
        if part != "backbone":
            anew[part] = name
        elif shape is None and layer in NEW_LAYERS:
            anew[f"backbone.{layer}"] = name
        else:
            unlike.append(f"{name}: {shape or 'missing'} in the checkpoint, {leaf.shape} in the network")
    extra = sorted(arrays.keys() - flat.keys())
    for name in extra:
        if name.split(".")[1] == "backbone" and name.split(".")[2] not in NEW_LAYERS:
            unlike.append(f"{name}: {arrays[name].shape} in the checkpoint, missing in the network")
    if unlike:
        more = [f"... and {len(unlike) - 8} more"] if len(unlike) > 8 else []
        listed = "\n  ".join(unlike[:8] + more)
        raise UserError(
            f"{where} does not fit the network; compare the fields of config.model (backbone, variant, width, blocks) "
            f"with it:\n  {listed}"
        )
    taken = {name: arrays[name] for name in flat if not any(name.split(".", 1)[1].startswith(f"{p}.") for p in anew)}
    notes = [_why_anew(part, arrays, flat) for part in anew]
    unused = sorted({name.split(".")[1] for name in extra})
    notes += [f"{part} of the checkpoint is not used" for part in unused]
    return flax.traverse_util.unflatten_dict(flat | taken, sep="."), notes


def _why_anew(part: str, arrays: Mapping[str, np.ndarray], flat: Mapping[str, Any]) -> str:
    kernel = f"params.{part}.kernel0"
    if kernel in arrays and kernel in flat and arrays[kernel].shape[-1] != flat[kernel].shape[-1]:
        old, new = arrays[kernel].shape[-1], flat[kernel].shape[-1]
        return f"{part} starts anew: the checkpoint's is for {old} classes, this network has {new}"
    return f"{part} starts anew: the checkpoint has none that fits"
