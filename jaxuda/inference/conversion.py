"""Converts networks between torch files and folders like those of finished stages. Nothing in a file is run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from jaxuda import files
from jaxuda.errors import UserError
from jaxuda.inference.restore import evaluated_network, stage_config
from jaxuda.interop import save_torch
from jaxuda.interop.parts import clean
from jaxuda.interop.pickle_names import Unread
from jaxuda.interop.projection import match_projection, projection_state
from jaxuda.interop.tensor_files import read_entries
from jaxuda.interop.torch_checkpoint import (
    Match,
    State,
    as_variables,
    match_backbone,
    match_network,
    published_layout,
    raise_problems,
    torch_layouts,
)
from jaxuda.models import abstract_variables, load_family, make_model, make_saved_model, output_shapes
from jaxuda.training import checkpoints, weights
from jaxuda.training.classes import reordered

PyTree = Any
Say = Callable[[str], None]
# Where SePiCo keeps the running statistics of its student's projection head in `extra`.
_STATISTICS = "projection_stats"


def import_imagenet(
    path: Path, network: str, data_dir: str = "", model: nn.Module | None = None, say: Say = print, part: str = ""
) -> Path:
    """Converts ImageNet weights, and writes them where `init="imagenet"` finds them.

    Args:
      path: a .pth or .safetensors file with the backbone of `network`; a classifier in it is left out.
      network: one of `weights.IMAGENET`.
      data_dir: as in a config.
      model: the network, if it is a reduced one.
      say: called with lines of text: what the file holds, and what was used of it.
      part: which of several networks in the file; see `parts.choose`.

    Returns:
      The folder written.

    Raises:
      UserError: the file is refused or corrupt, is of another network, or holds several and `part` is none of them; a
        weight is not finite; or the folder holds other weights.
    """
    public = weights.published(network)
    fields = {"name": public.family, **public.fields}
    model = model or make_model(fields, 1)
    folder = weights.imagenet_folder(network, data_dir)
    source, state = _read(path, say)
    match = match_backbone(state, model, part, f"{path}: ")
    find_problem = getattr(load_family(fields), "imagenet_problem", lambda *_: "")
    if problem := find_problem(network, source["sha256"], source["names"], match.leaves):
        raise UserError(f"{path} {problem}")
    hint = f"{network} is {public.file} from {public.publisher}"
    raise_problems(match._replace(unused=match.deeper), model, f"{path}: ", hint)
    _account(match, model, say)
    identity = json.loads(json.dumps({"imagenet": network, "model": dict(public.fields)}))  # as it is read back
    _write(folder, as_variables(match.leaves), identity, source, say)
    say(f'configs with init="imagenet" and this network find it there ({network})')
    return folder


def import_checkpoint(
    path: Path,
    stage: ConfigDict,
    num_classes: int,
    folder: Path,
    say: Say = print,
    classes: dict[str, Any] | None = None,
    part: str = "",
) -> None:
    """Converts a published checkpoint of a whole network to a folder like that of a finished stage.

    Args:
      path: a .pth or .safetensors file.
      stage: the resolved settings of a training stage that could have trained the checkpoint.
      num_classes: the number of classes of its label space.
      folder: the folder to write.
      classes: their names, as `jaxuda.training.classes.describe` gives them, to be recorded there.
      say: called with lines of text: what the file holds, and what was used of it.
      part: as for `import_imagenet`.

    Raises:
      UserError: as for `import_imagenet`.
    """
    model = make_model(stage.model, num_classes)
    source, state = _read(path, say)
    match, layout = match_network(state, model, part, f"{path}: ")
    raise_problems(match._replace(unused=match.deeper), model, f"{path}: ")
    variables, projection = as_variables(match.leaves), {}
    if kind := _projection_kind(stage):
        outputs = output_shapes(model, stage.evaluation.size[::-1])
        maps = (outputs.features,) if kind == "mlp" else outputs.levels or (outputs.features,)
        inputs = sum(each.shape[-1] for each in maps)
        channels = (inputs, stage.get("channels", inputs))
        projection, taken = match_projection(state, kind, channels, match.prefix, f"{path}: ")
        match = match._replace(unused=[name for name in match.unused if name not in taken])
        say(f"{'with' if taken else 'without'} a projection head")
    _account(match, model, say, more=len(projection))
    if order := torch_layouts(model)[layout].order:
        flat = flax.traverse_util.flatten_dict(variables, sep=".")
        variables = flax.traverse_util.unflatten_dict(reordered(flat, model, np.argsort(order)), sep=".")
        say(f"its classes were reordered: from the order of '{layout}' to ours")
    identity = json.loads(stage.to_json())
    identity["evaluation"]["network"] = checkpoints.STUDENT  # the file holds one network, also for methods with several
    _write(folder, variables, identity, source, say, projection, classes)


def export(folder: Path, path: Path, layout: str = "", say: Say = print) -> None:
    """Writes the last checkpoint of a stage as a torch file: the network that was evaluated.

    Args:
      folder: the folder of a training stage, or one that `import_checkpoint` wrote.
      path: FILE.pth or FILE.safetensors.
      layout: one of the network's layouts; "": that of the most similar published network.
      say: called with a line of text: what was written.

    Raises:
      UserError: there is no such stage, the file cannot be written, or as for `restore`.
    """
    config = stage_config(str(folder))
    arrays, step = checkpoints.read_variables(folder / "checkpoints", network=evaluated_network(config))
    model = make_saved_model(config.model, arrays, str(folder))
    layout = layout or published_layout(model)
    if layout in torch_layouts(model) and (order := torch_layouts(model)[layout].order):
        arrays = reordered(arrays, model, order)
        say(f"its classes were reordered: to the order of '{layout}'")
    variables = checkpoints.unflatten(arrays, abstract_variables(model, config.evaluation.size), str(folder), say)
    head = _projection(folder / "checkpoints", config, step, say)
    save_torch(variables, model, path, layout, head)
    load = "torch.load(FILE, weights_only=True)" if path.suffix == ".pth" else "safetensors.torch.load_file(FILE)"
    say(f"{path}: step {step} of {folder}, named as in the layout '{layout}'; {load} reads it")


def _read(path: Path, say: Say) -> tuple[dict[str, Any], State]:
    """The file's name, checksum and entries; and its tensors, by name without prefixes (see `clean`)."""
    entries = read_entries(path)
    source = {"file": path.name, "sha256": files.sha256(path), "names": list(entries)}
    size = sum(entry.nbytes for entry in entries.values() if not isinstance(entry, Unread)) / 2**20
    say(f"{path}: {len(entries)} tensors, {size:.1f} MiB, SHA-256 {source['sha256'][:16]}...")
    return source, clean(entries)


def _account(match: Match, model: nn.Module, say: Say, more: int = 0) -> None:
    """Reports which entries were used, and the licence of weights of the network, if it is special.

    more: the number of used entries outside of the network.
    """
    say(f"taken:    {len(match.leaves) + more} tensors" + (f", below {match.prefix!r}" if match.prefix else ""))
    if match.unused:
        last = [f"... and {len(match.unused) - 20} more"] if len(match.unused) > 20 else []
        say(f"not used: {len(match.unused)}: {', '.join(match.unused[:20] + last)}")
    say("missing:  none")
    if licence := getattr(model, "LICENCE", ""):
        say(f"licence:  {licence}")


def _write(
    folder: Path,
    variables: PyTree,
    identity: dict[str, Any],
    source: dict[str, Any],
    say: Say,
    projection: Mapping[str, np.ndarray] | None = None,
    classes: dict[str, Any] | None = None,
) -> None:
    """Writes, atomically, a folder like that of a finished stage; with the variables of a projection head, if any."""
    head = flax.traverse_util.unflatten_dict(projection or {}, sep=".")
    players = {"projection": head["params"]} if head else {}
    extra = {_STATISTICS: head["batch_stats"]} if "batch_stats" in head else {}
    flat = flax.traverse_util.flatten_dict(jax.device_get({**variables, **players, **extra}), sep=".")
    checksum = _checksum(flat)
    if (record := files.read_json(folder / "stage.json")) is not None:
        same_classes = None in (classes, record.get("classes")) or classes == record["classes"]
        if record.get("weights") == checksum and record["identity"] == identity and same_classes:
            say(f"already converted: {folder}")
            return
        raise UserError(f"{folder} holds other weights ({record['name']}): remove it, or choose another place")
    aside = folder.with_name(f".{folder.name}.converting")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        saved = checkpoints.Checkpoints(aside / "checkpoints")
        params = {"model": variables["params"], **players}
        state = {"params": params, "batch_stats": variables.get("batch_stats", {}), "extra": extra}
        saved.save(0, jax.device_get(state))
        saved.close()
        origin = {"file": source["file"], "sha256": source["sha256"]}
        record = {"name": source["file"], "status": "done", "fingerprint": checksum, "weights": checksum}
        files.write_json(aside / "stage.json", record | {"origin": origin, "identity": identity, "classes": classes})
        os.replace(aside, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(f"written:  {folder}")


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """A checksum of names, shapes and numbers; it does not depend on where or when a file is converted."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.data)
    return total.hexdigest()


def _projection_kind(config: Mapping[str, Any]) -> str:
    """The kind of a method's projection head that is published; "": none."""
    if config.get("projection", "none") == "mlp":
        return "mlp"
    return "normed" if "contrast_start" in config else ""


def _projection(folder: Path, config: Mapping[str, Any], step: int, say: Say) -> dict[str, np.ndarray]:
    """The student's projection head in a checkpoint, by torch name; empty if there is none, or none as published."""
    if config.get("projection", "none") == "none" and not _projection_kind(config):
        return {}
    if evaluated_network(config) != checkpoints.STUDENT:
        say(f"the projection head is left out: it is the {checkpoints.STUDENT}'s")
        return {}
    saved = checkpoints.Checkpoints(folder, read_only=True)
    state, arrays = saved.read(step), {}
    saved.close()
    for place, collection in (("params.projection", "params"), (f"extra.{_STATISTICS}", "batch_stats")):
        inside = [name for name in state if name.startswith(f"{place}.")]
        arrays |= {collection + name.removeprefix(place): state[name] for name in inside}
    head = projection_state(arrays) if arrays else {}
    if head is None:
        say("its projection head is left out: no published file has one of its kind")
    return head or {}
