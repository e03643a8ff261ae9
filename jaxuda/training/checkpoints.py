"""Verified Orbax checkpoints: the checksum of every file is written beside them and compared on restore.

Orbax saves atomically but restores a flipped byte without an error. A checkpoint is valid only once its manifest of
checksums is written: one without a manifest comes from a killed save, one that differs from its manifest is corrupt.
Orbax's manager reads every folder that it finds, so invalid checkpoints are removed before it is made. Leaves are
stored under their path in the state ("params.model.backbone.conv1.kernel"), as host arrays, so that a restore does not
depend on the number of devices. If there are several processes, only the first one saves and restores.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from jaxuda import files
from jaxuda.errors import UserError
from jaxuda.interop.torch_checkpoint import unusable

PyTree = Any
MANIFEST, NETWORKS = "manifest.json", "networks.json"
LAST, BEST = "last", "best"
STUDENT = "student"  # the network that is trained; a method may have others, such as its EMA teacher
# Its place in checkpoints that list no networks: converted weights, and those of releases with only one network.
_STUDENT = {"params": "params.model", "batch_stats": "batch_stats"}
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that Orbax is still writing
# The endings of files of weights, which are no checkpoints of ours.
_WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".tar")
# Without this, Orbax waits for all processes of the run.
_ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


def _names(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    """Dotted paths, leaves and structure of a pytree."""
    entries, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in entries]
    return names, [leaf for _, leaf in entries], structure


class Checkpoints:
    """The checkpoints of one training stage: the latest two, and the best if there are metrics.

    Args:
      folder: their folder; created if missing, unless `read_only`.
      report: called with a line of text when a corrupt or half-written checkpoint is skipped.
      read_only: do not change the folder. Otherwise invalid checkpoints are removed: their steps run again.
      keep_every: also keep the checkpoint of every `keep_every` steps; 0: no others.
    """

    def __init__(
        self, folder: Path, report: Callable[[str], None] = print, read_only: bool = False, keep_every: int = 0
    ):
        self._folder, self._report = Path(folder).absolute(), report
        # Orbax warns about its own defaults, which does not help a user, and logs errors that it also raises.
        logging.set_verbosity(logging.FATAL)
        self._reader = ocp.Checkpointer(_handler(), multiprocessing_options=_ALONE)
        self._manager = None if read_only else self._make_manager(keep_every)

    def _make_manager(self, keep_every: int) -> ocp.CheckpointManager:
        for step in kept_steps(self._folder):
            if complaint := self._complaint(step):
                self._leave_out(step, complaint)
                shutil.rmtree(self._folder / str(step))
        policies = checkpoint_managers
        kept = [
            policies.LatestN(2),
            policies.BestN(get_metric_fn=_miou, n=1, keep_checkpoints_without_metrics=False),
        ]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        keep = policies.AnyPreservationPolicy(kept)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=_miou,
            enable_async_checkpointing=False,
            create=False,
            multiprocessing_options=_ALONE,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self._folder.glob(f"*{_UNFINISHED}*"):  # a killed run's; no other run writes to this folder
            shutil.rmtree(unfinished, ignore_errors=True)
        return ocp.CheckpointManager(self._folder, options=options, item_handlers=_handler())

    def save(
        self,
        step: int,
        state: PyTree,
        metrics: dict[str, float] | None = None,
        networks: Mapping[str, PyTree] = MappingProxyType({}),
    ) -> None:
        """Writes `state` (host arrays) as the checkpoint of `step`, with the mIoU in `metrics` if it was evaluated.

        Args:
          step, state, metrics: see above.
          networks: the networks in the state by name, each a tree of leaves of the state; only their paths are saved.

        Raises:
          UserError: the disk is full; earlier checkpoints are unchanged.
        """
        names, leaves, _ = _names(state)
        arrays = {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}
        needed = 1.1 * sum(array.nbytes for array in arrays.values())
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise self._full(step, f"{needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free")
        if step in self._manager.all_steps():
            self._manager.delete(step)
        try:
            self._manager.save(step, args=ocp.args.StandardSave(arrays), metrics=metrics, force=True)
            files.write_json(self._folder / str(step) / NETWORKS, _places(state, networks))
            self._write_manifest(self._folder / str(step))
        except Exception as error:
            # Orbax and TensorStore wrap the system's error in their own types; only its text remains.
            if "No space left" in str(error) or "ENOSPC" in str(error):
                raise self._full(step, "the disk is full") from error
            raise

    def _full(self, step: int, why: str) -> UserError:
        return UserError(
            f"cannot save the checkpoint of step {step} in {self._folder}: {why}. Earlier checkpoints are not lost: "
            "free some space, then run the same command again, and it continues from the last checkpoint"
        )

    def _write_manifest(self, folder: Path) -> None:
        (folder / MANIFEST).unlink(missing_ok=True)
        files.write_json(folder / MANIFEST, files.checksums(folder))

    def _complaint(self, step: int) -> str | None:
        """What is wrong with a checkpoint, or None."""
        folder = self._folder / str(step)
        try:
            sums = files.read_json(folder / MANIFEST)
        except UserError:
            return "its manifest is corrupt"
        if not folder.is_dir():
            return "it does not exist"
        if sums is None:
            return "it was not saved completely"
        if not isinstance(sums, dict) or not sums:
            return "its manifest is corrupt"
        for name, expected in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if files.sha256(folder / name) != expected:
                return f"the content of {name} has changed since it was written"
        return None

    def newest(self) -> int | None:
        """The newest step with a valid checkpoint, or None; newer ones that are not valid are reported."""
        for step in reversed(kept_steps(self._folder)):
            complaint = self._complaint(step)
            if complaint is None:
                return step
            self._leave_out(step, complaint)
        return None

    def _leave_out(self, step: int, complaint: str) -> None:
        self._report(f"checkpoint {self._folder / str(step)} is skipped: {complaint}")

    def best(self) -> int | None:
        """The step with the highest mIoU on the target's labels (the last of equals); None without evaluations."""
        scores = {step: score for step in kept_steps(self._folder) if (score := self._score(step)) is not None}
        return max(scores, key=lambda step: (scores[step], step), default=None)

    def _score(self, step: int) -> float | None:
        """The mIoU that was saved with a checkpoint; None if it has none or is corrupt."""
        file = self._folder / str(step) / "metrics" / "metrics"
        if not file.exists() or self._complaint(step):
            return None
        return _miou(json.loads(file.read_text()))

    def read(self, step: int) -> dict[str, np.ndarray]:
        """All arrays of a checkpoint by their dotted path.

        Raises:
          UserError: the checkpoint is corrupt or missing.
        """
        if complaint := self._complaint(step):
            raise UserError(f"checkpoint {self._folder / str(step)} cannot be used: {complaint}")
        item = self._folder / str(step) / "default"
        described = self._reader.metadata(item).item_metadata
        template = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in described.items()}
        return self._reader.restore(item, args=ocp.args.StandardRestore(template))

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The state saved at `step`, with the structure of `like`; raises UserError as `read` does."""
        return unflatten(self.read(step), like, str(self._folder / str(step)), self._report)

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._reader.close()
        if self._manager is not None:
            self._manager.close()


def _handler() -> ocp.StandardCheckpointHandler:
    return ocp.StandardCheckpointHandler(multiprocessing_options=_ALONE)


def _miou(metrics: dict[str, float]) -> float:
    return metrics["miou"]


def unflatten(arrays: Mapping[str, np.ndarray], like: PyTree, where: str, say: Callable[[str], None] = print) -> PyTree:
    """Arrays by dotted path as a pytree with the structure and the types of floating-point numbers of `like`.

    Args:
      arrays, like: see above.
      where: names the place of the arrays in messages.
      say: called with a line of text if arrays had another type.

    Raises:
      UserError: an array is missing or has another shape; the message names it, and `where` the arrays come from.
    """
    names, leaves, structure = _names(like)
    for name, leaf in zip(names, leaves, strict=True):
        if name not in arrays:
            raise UserError(f"{where} has no '{name}': it belongs to another network or method")
        if arrays[name].shape != np.shape(leaf):
            raise UserError(f"{where}: '{name}' has shape {arrays[name].shape}, this network needs {np.shape(leaf)}")
    fitting, note = cast(arrays, dict(zip(names, leaves, strict=True)))
    if note:
        say(f"{where}: {note}")
    return jax.tree.unflatten(structure, [fitting[name] for name in names])


def cast(arrays: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str]:
    """Arrays with the types of those in `like` where both are floating-point numbers, and which were cast; "" if none.

    A checkpoint of float16 must not make a step compute its update in float16.
    """
    found, types = dict(arrays), []
    for name in arrays.keys() & like.keys():
        old, new = np.dtype(arrays[name].dtype), np.dtype(like[name].dtype)
        if old != new and jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating):
            found[name] = arrays[name].astype(new)
            types.append(f"{old} to {new}")
    kinds = [f"{types.count(kind)} arrays from {kind}" for kind in sorted(set(types))]
    return found, f"cast {' and '.join(kinds)}" if kinds else ""


def not_a_stage(folder: Path) -> str:
    """What is wrong with a path that should be the folder of a training stage, and which was perhaps meant."""
    wrong = f"{folder} is not the folder of a training stage"
    if folder.suffix in _WEIGHTS or (folder.is_file() and folder.suffix != ".json"):
        return (
            f"{wrong}: convert a torch file with python -m jaxuda.convert {folder} --config FILE, then give the folder "
            "that this writes"
        )
    if folder.is_file():  # one of our own, such as stage.json or results.json
        stage = stage_settings(folder.parent)
        return f"{wrong}: it is a file; give {folder.parent if stage else 'the folder of a stage'}"
    if not folder.is_dir():
        return f"{wrong}: there is no such folder"
    if outer := next(filter(stage_settings, folder.absolute().parents[:2]), None):
        return f"{wrong}: it lies in one, {outer}{f':{folder.name}' if folder.name.isdigit() else ''}"
    stages = sorted(
        filter(stage_settings, folder.glob("*")), key=lambda stage: (stage / "stage.json").stat().st_mtime_ns
    )
    if stages:
        # The last one that adapts is the result of a recipe; the last one that trains is its oracle.
        adapting = [stage for stage in stages if len(stage_settings(stage).get("domains", ())) == 2]
        names = ", ".join(stage.name for stage in stages)
        return f"{wrong}: it is a work folder; give one of its stages ({names}), such as {(adapting or stages)[-1]}"
    return f"{wrong} (it has no stage.json of one)"


def stage_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of a training stage, from its folder; None for other folders."""
    record = files.read_json(folder / "stage.json")
    identity = record.get("identity", {}) if isinstance(record, dict) else {}
    return identity if "train" in identity else None


def kept_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a stage's `checkpoints` folder, valid or not, in rising order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def read_variables(folder: Path, which: str = LAST, network: str = STUDENT) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of a network by dotted path ("params. ...", "batch_stats. ..."), and the step of their checkpoint.

    Args:
      folder: a stage's `checkpoints` folder.
      which: "last", "best" (chosen with target labels), or a step.
      network: its name, where the stage's method has several.

    Raises:
      UserError: there is no valid checkpoint, the last checkpoint of a finished stage is missing, or the checkpoint has
        no such network or one whose numbers are not finite.
    """
    saved, step = _open(folder, which)
    arrays = saved.read(step)
    saved.close()
    networks = _networks(folder, step)
    if network not in networks:
        raise UserError(f"{folder / str(step)} has no network '{network}' (it has: {', '.join(networks)})")
    found = {}
    for place, origin in networks[network].items():
        # `origin` is either one array, or a prefix of several.
        found |= {
            place + name.removeprefix(origin): array
            for name, array in arrays.items()
            if name == origin or name.startswith(f"{origin}.")
        }
    for name, array in found.items():
        if jnp.issubdtype(array.dtype, jnp.floating) and (problem := unusable(array, name.split(".")[-1])):
            raise UserError(f"{folder / str(step)} cannot be used: {name} {problem}; train or convert it again")
    return found, step


def network_names(folder: Path, which: str = LAST) -> list[str]:
    """The names of the networks in the checkpoint that `read_variables` reads; raises UserError as it does."""
    saved, step = _open(folder, which)
    saved.close()
    return list(_networks(folder, step))


def _networks(folder: Path, step: int) -> dict[str, dict[str, str]]:
    return files.read_json(folder / str(step) / NETWORKS) or {STUDENT: _STUDENT}


def _places(state: PyTree, networks: Mapping[str, PyTree]) -> dict[str, dict[str, str]]:
    """For each network, the place of each of its parts in the state: {"params": "params.model", ...}.

    Raises:
      UserError: a network has an array that is not in the state.
    """
    names, leaves, _ = _names(state)
    origins = {id(leaf): name for name, leaf in zip(names, leaves, strict=True)}
    found = {}
    for network, variables in networks.items():
        trees: dict[tuple[str, str], dict[str, str]] = {}
        for place, leaf in zip(*_names(variables)[:2], strict=True):
            if id(leaf) not in origins:
                raise UserError(
                    f"the network '{network}' that the method's function 'evaluated' returns has {place}, which is not "
                    "an array of the state: compute it in 'after_update', and keep it in `extra`"
                )
            origin = origins[id(leaf)]
            trees.setdefault(_without_common_end(place, origin), {})[place] = origin
        found[network] = {}
        for (root, origin), leaves in trees.items():
            alone = [other for other, _ in trees].count(root) == 1
            whole = sum(name.startswith(f"{origin}.") for name in names) == len(leaves)
            found[network] |= {root: origin} if alone and whole else leaves
    return found


def _without_common_end(place: str, origin: str) -> tuple[str, str]:
    """Two dotted paths without their common last parts; each keeps at least one part."""
    ours, theirs = place.split("."), origin.split(".")
    while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
        ours, theirs = ours[:-1], theirs[:-1]
    return ".".join(ours), ".".join(theirs)


def manifest_hash(folder: Path, which: str = LAST) -> str:
    """A checksum of the checkpoint that `read_variables` reads; raises UserError as it does."""
    saved, step = _open(folder, which)
    saved.close()
    return files.sha256(folder / str(step) / MANIFEST)


def damage(folder: Path) -> str | None:
    """What is corrupt in the last checkpoint of a finished stage; None if nothing is, or if its folder is missing."""
    step = (files.read_json(folder.parent / "results.json") or {}).get("step")
    if step is None or not folder.is_dir():
        return None
    saved = Checkpoints(folder, read_only=True)
    complaint = saved._complaint(step)
    saved.close()
    return complaint and f"checkpoint {folder / str(step)}: {complaint}"


def _open(folder: Path, which: str) -> tuple[Checkpoints, int]:
    """The checkpoints in a folder, and the step of the last or the best one, or a given one."""
    results = files.read_json(folder.parent / "results.json") or {}  # empty unless the stage has finished
    again = f"run its stage again with --from_stage {folder.parent.name}"
    if not folder.is_dir():
        raise UserError(f"there are no checkpoints in {folder}: {again if results else 'its stage has not run'}")
    saved = Checkpoints(folder, read_only=True)
    step = int(which) if which.isdigit() else saved.best() if which == BEST else saved.newest()
    if step is None:
        raise UserError(f"there is no valid checkpoint in {folder}: {again}")
    # An unfinished stage can continue from an older checkpoint; the result of a finished stage is its last one.
    best = results.get("best_on_val_using_target_labels")
    lost = which == LAST and step != results.get("step", step)
    lost = lost or (which == BEST and best is not None and saved._score(step) != best["miou"])
    if lost:
        raise UserError(
            f"the {which} checkpoint in {folder} is corrupt or missing (found that of step {step} instead): {again}"
        )
    return saved, step
