"""Weights between torch's files and jaxuda. Nothing in a file is run, and torch is not needed.

python -m jaxuda.convert FILE --imagenet NETWORK
    ImageNet weights, which configs with init="imagenet" start from; kept beside the datasets.
python -m jaxuda.convert FILE --config configs/advent.py:gta5 [--stage adapt] [--out DIR]
    a published checkpoint of a whole network, for --mode eval, --mode predict, or as another run's init.
python -m jaxuda.convert STAGE --export FILE
    back again: a stage's folder (its last checkpoint) as FILE.pth or FILE.safetensors for torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxuda import data, files
from jaxuda.cli import MISTAKE, parse
from jaxuda.errors import UserError
from jaxuda.interop import read_tensors, save_torch
from jaxuda.interop.torch_checkpoint import (
    LAYOUTS,
    PLCA_ORDER,
    Match,
    as_variables,
    clean,
    match_backbone,
    match_network,
    match_projection,
    projection_state,
    published_layout,
    raise_problems,
)
from jaxuda.models import abstract_variables, make_model
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.pipeline import domains, stages
from jaxuda.training import checkpoints, weights

PyTree = Any
Say = Callable[[str], None]

# First digits of the SHA-256 of torchvision's ImageNet weights, as in their files' names. They expect RGB in 0..1,
# and bottlenecks that stride in their 3x3: in a network of the caffe kind they would train badly without a word.
_TORCHVISION = {
    *("5d3b4d8f", "63fe2227", "cd907fc2", "19c8e357", "0676ba61", "11ad3fa6"),
    "397923af",
}


def import_imagenet(
    path: Path, network: str, data_dir: str = "", model: DeepLabV2 | None = None, say: Say = print
) -> Path:
    """Converts ImageNet weights to where `init="imagenet"` looks for them.

    Args:
      path: a .pth or .safetensors file with the backbone of `network`; a classifier in it is left out.
      network: one of `weights.IMAGENET`.
      data_dir: as in a config.
      model: the network, where it is a reduced one.
      say: told what is in the file, and what was taken from it.

    Returns:
      The folder written.

    Raises:
      UserError: the file is refused or damaged, is of another network, or the folder is taken.
    """
    if network not in weights.IMAGENET:
        raise UserError(f"no ImageNet weights are known for '{network}' (known: {', '.join(weights.IMAGENET)})")
    published = weights.IMAGENET[network]
    model = model or DeepLabV2(1, backbone=published.backbone, variant=published.variant)
    folder = weights.imagenet_folder(network, data_dir)
    source, state = _read(path, say)
    wrapped = any("Scale" in name.split(".") for name in source["names"])
    if network.endswith("-caffe") and source["sha256"][:8] in _TORCHVISION:
        raise UserError(
            f"{path} is torchvision's {published.backbone}, not {network}, which is another network: get "
            f"{published.file} from {published.publisher}, or set the config's model.variant and preprocess for it"
        )
    if network.endswith("-torchvision") and wrapped:
        raise UserError(f"{path} comes from Caffe, and {network} is another network: get {published.file}")
    match = match_backbone(state, model)
    raise_problems(match._replace(unused=[]), model)
    _account(match, say)
    identity = {"imagenet": network, "model": {"backbone": model.backbone, "variant": model.variant}}
    _write(folder, as_variables(match.leaves), identity, source, say)
    say(f'configs with init="imagenet" and this network find it there ({network})')
    return folder


def import_checkpoint(path: Path, config: ConfigDict, stage: str, folder: Path, say: Say = print) -> Path:
    """Converts a published checkpoint of a whole network to a folder like that of a finished stage.

    Args:
      path: a .pth or .safetensors file.
      config: a recipe with the network that the checkpoint is of.
      stage: the training stage whose settings (model, preprocess, method) are meant; "" for the adapted one.
      folder: where to.
      say: told what is in the file, and what was taken from it.

    Raises:
      UserError: the file is refused or damaged, is of another network, or the folder is taken.
    """
    name = stage or _adapted_stage(config)
    if name not in config.pipeline or "train" not in config[name]:
        known = ", ".join(n for n in config.pipeline if "train" in config[n])
        raise UserError(f"--stage {name}: this recipe's training stages are {known}")
    resolved = stages.resolve(name, config)
    model = make_model(resolved.model, _num_classes(config))
    source, state = _read(path, say)
    match, layout = match_network(state, model)
    raise_problems(match._replace(unused=[]), model)
    variables, projection = as_variables(match.leaves), {}
    if resolved.get("projection", "none") == "mlp":
        projection, taken = match_projection(state, _feature_channels(model, variables))
        match = match._replace(unused=[name for name in match.unused if name not in taken])
        say(f"{'with' if taken else 'without'} a projection head")
    _account(match, say, more=len(projection))
    if layout == "plca":
        variables = _reordered(variables, np.argsort(_plca_order(model.num_classes)))
        say("its classes were brought from PLCA's order to ours")
    _write(folder, variables, json.loads(resolved.to_json()), source, say, projection)
    where = f"--config configs/{config.name}.py:{config.benchmark} --checkpoint {folder}"
    say(f"score it:      python -m jaxuda.main {where} --mode eval")
    say(f"label images:  python -m jaxuda.main {where} --mode predict --images 'GLOB'")
    return folder


def export(folder: Path, path: Path, layout: str = "", say: Say = print) -> None:
    """Writes the last checkpoint of a stage as a torch file.

    Args:
      folder: of a training stage, or what `import_checkpoint` wrote.
      path: FILE.pth or FILE.safetensors.
      layout: one of `LAYOUTS`; "" for that of the published network that is most like it.
      say: told what was written.

    Raises:
      UserError: there is no such stage, or the file cannot be written.
    """
    record = files.read_json(folder / "stage.json") if folder.is_dir() else None
    if record is None or "train" not in record["identity"]:
        raise UserError(f"{folder} is not the folder of a training stage, which is what can be exported")
    config = FrozenConfigDict(record["identity"])
    arrays, step = checkpoints.read_variables(folder / "checkpoints")
    model = make_model(config.model, arrays["params.head.kernel0"].shape[-1])
    variables = checkpoints.unflatten(arrays, abstract_variables(model, config.evaluation.size), str(folder))
    layout = layout or published_layout(model)
    if layout == "plca" and model.num_classes in (16, 19):
        variables = _reordered(variables, _plca_order(model.num_classes))
        say("its classes were brought to PLCA's order")
    save_torch(variables, model, path, layout, _projection(arrays, say))
    say(f"{path}: step {step} of {folder}, named as in the layout '{layout}'; torch.load(..., weights_only=True)")


def _read(path: Path, say: Say) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the file is, and its tensors by clean names."""
    tensors = read_tensors(path)
    source = {"file": path.name, "sha256": files.sha256(path), "names": list(tensors)}
    size = sum(array.nbytes for array in tensors.values()) / 2**20
    say(f"{path}: {len(tensors)} tensors, {size:.1f} MiB, SHA-256 {source['sha256'][:16]}...")
    return source, clean(tensors)


def _account(match: Match, say: Say, more: int = 0) -> None:
    """Tells where every entry went; `more` are taken beside those of the network."""
    say(f"taken:    {len(match.leaves) + more} tensors")
    if match.unused:
        say(f"not used: {len(match.unused)}: {', '.join(match.unused)}")
    say("missing:  none")


def _write(
    folder: Path,
    variables: PyTree,
    identity: dict[str, Any],
    source: dict[str, Any],
    say: Say,
    projection: Mapping[str, np.ndarray] | None = None,
) -> None:
    """A folder like that of a finished stage, whole or not there; with the parameters of a projection head, if any."""
    players = {"projection": flax.traverse_util.unflatten_dict(projection, sep=".")} if projection else {}
    flat = flax.traverse_util.flatten_dict(jax.device_get({**variables, **players}), sep=".")
    checksum = _checksum(flat)
    if (record := files.read_json(folder / "stage.json")) is not None:
        if record.get("weights") == checksum and record["identity"] == identity:
            say(f"already converted: {folder}")
            return
        raise UserError(f"{folder} holds other weights ({record['name']}): remove it, or choose another place")
    aside = folder.with_name(f".{folder.name}.converting")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        saved = checkpoints.Checkpoints(aside / "checkpoints")
        params = {"model": variables["params"], **players}
        state = {"params": params, "batch_stats": variables.get("batch_stats", {})}
        saved.save(0, jax.device_get(state))
        saved.close()
        origin = {"file": source["file"], "sha256": source["sha256"]}
        record = {"name": source["file"], "status": "done", "fingerprint": checksum, "weights": checksum}
        files.write_json(aside / "stage.json", record | {"origin": origin, "identity": identity})
        os.replace(aside, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(f"written:  {folder}")


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Of names, shapes and numbers; the same wherever and whenever a file is converted."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.data)
    return total.hexdigest()


def _feature_channels(model: DeepLabV2, variables: PyTree) -> int:
    """Of what the main head reads."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    return jax.eval_shape(model.apply, variables, image).features.shape[-1]


def _projection(arrays: Mapping[str, np.ndarray], say: Say) -> dict[str, np.ndarray]:
    """The projection head of a checkpoint by its torch names; empty if it has none, or one that no file has."""
    prefix = "params.projection."
    head = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    state = projection_state(head) if head else {}
    if state is None:
        say("its projection head is left out: only the kind 'mlp' was ever published")
    return state or {}


def _adapted_stage(config: ConfigDict) -> str:
    """The last stage that trains without the target's labels: what a published checkpoint usually is of."""
    trained = [name for name in config.pipeline if "train" in config[name]]
    return [n for n in trained if config[n].domains[0] != "target" or config[n].labels][-1]


def _num_classes(config: ConfigDict) -> int:
    if config.label_space:
        return data.labels.label_space(config.label_space).num_classes
    return domains.open_records(config, "source", config.source.split).label_space.num_classes


def _plca_order(num_classes: int) -> np.ndarray:
    """For each of PLCA's classes, our index of it."""
    if num_classes not in (16, 19):
        raise UserError(f"published PLCA networks have 19 or 16 classes, not {num_classes}")
    ids = np.array(PLCA_ORDER[:num_classes])
    return np.argsort(np.argsort(ids))  # of 16: train ids without those of terrain, truck and train


def _reordered(variables: PyTree, order: np.ndarray) -> PyTree:
    """Class i of the new head is class order[i] of the old one."""
    head = {name: np.asarray(array)[..., order] for name, array in variables["params"]["head"].items()}
    return {**variables, "params": {**variables["params"], "head": head}}


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code as jaxuda.main does."""
    parser = argparse.ArgumentParser(
        "python -m jaxuda.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="a .pth or .safetensors file; to export, a stage's folder")
    parser.add_argument("--imagenet", metavar="NETWORK", help=f"one of {', '.join(weights.IMAGENET)}")
    parser.add_argument("--data_dir", default="", help="where datasets and weights are (default: as in a config)")
    parser.add_argument("--config", help="the recipe whose network FILE is of; --config.FIELD=VALUE works too")
    parser.add_argument("--stage", default="", help="of that recipe (default: the last one that adapts)")
    parser.add_argument("--out", type=Path, help="where to write (default: DATA_DIR/weights/NAME_OF_FILE)")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write this torch file")
    parser.add_argument("--layout", default="", choices=LAYOUTS, help="its names (default: by network)")
    args, overrides = parser.parse_known_args(argv)
    try:
        if [bool(args.imagenet), bool(args.config), bool(args.export)].count(True) != 1:
            raise UserError("say one of --imagenet NETWORK, --config FILE and --export FILE (--help tells which)")
        if overrides and not args.config:
            raise UserError(f"not understood: {' '.join(overrides)}")
        if args.export:
            export(args.file, args.export, args.layout)
        elif args.imagenet:
            import_imagenet(args.file, args.imagenet, args.data_dir)
        else:
            config = parse(["jaxuda.convert", f"--config={args.config}", *overrides]).config
            place = args.out or weights.imagenet_folder(args.file.stem, args.data_dir or config.data_dir)
            import_checkpoint(args.file, config, args.stage, place)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
