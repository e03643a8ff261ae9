"""Orbax checkpoints that are verified: every file's checksum is written beside them and tested on restore.

Orbax makes a save atomic but restores a flipped byte silently. A checkpoint counts only once its manifest of
checksums is written; one without is what a killed save left, one that disagrees is damaged. Leaves are stored
under their path in the state ("params.model.backbone.conv1.kernel"), as host arrays, so that a restore does
not depend on the number of devices.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from jaxuda import files
from jaxuda.errors import UserError

PyTree = Any
MANIFEST = "manifest.json"


def _names(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    """Dotted paths, leaves and structure of a pytree."""
    entries, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in entries]
    return names, [leaf for _, leaf in entries], structure


class Checkpoints:
    """The checkpoints of one training stage: the latest two, and the best where there are metrics.

    Args:
      folder: where they lie; made if missing, unless `read_only`.
      report: called with a line of text when a damaged or half-written checkpoint is passed over.
      read_only: nothing in the folder is touched.
      keep_every: those of every so many steps are kept too; 0: no others.
    """

    def __init__(
        self, folder: Path, report: Callable[[str], None] = print, read_only: bool = False, keep_every: int = 0
    ):
        self._folder, self._report = Path(folder).absolute(), report
        # Orbax warns of its own defaults, which tells a user nothing.
        logging.set_verbosity(logging.ERROR)
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
            read_only=read_only,
            create=not read_only,
        )
        handler = ocp.StandardCheckpointHandler()
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handler)

    def save(self, step: int, state: PyTree, metrics: dict[str, float] | None = None) -> None:
        """Writes `state` (host arrays) as of `step`, with the mIoU in `metrics` if it was evaluated.

        Raises:
          UserError: no room on the disk; what was saved before is untouched.
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
            self._write_manifest(self._folder / str(step))
        except Exception as error:
            # Orbax and TensorStore wrap the system's error in types of their own; the text is all that stays.
            if "No space left" in str(error) or "ENOSPC" in str(error):
                raise self._full(step, "the disk is full") from error
            raise

    def _full(self, step: int, why: str) -> UserError:
        return UserError(
            f"cannot save the checkpoint of step {step} in {self._folder}: {why}. Nothing saved before is lost: "
            "make room, then run the same command again, and it continues from the last checkpoint"
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
            return "its manifest is damaged"
        if sums is None:
            return "its saving was interrupted"
        for name, expected in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if files.sha256(folder / name) != expected:
                return f"the content of {name} has changed since it was written"
        return None

    def newest(self) -> int | None:
        """The newest step whose checkpoint is whole; newer ones that are not are reported."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            complaint = self._complaint(step)
            if complaint is None:
                return step
            self._report(f"checkpoint {self._folder / str(step)} is left out: {complaint}")
        return None

    def best(self) -> int | None:
        """The step with the highest mIoU on the target's labels, or None if nothing was evaluated."""
        return self._manager.best_step()

    def read(self, step: int) -> dict[str, np.ndarray]:
        """All arrays of a checkpoint by their dotted path.

        Raises:
          UserError: it is damaged or not there.
        """
        complaint = self._complaint(step) if (self._folder / str(step)).is_dir() else "it is not there"
        if complaint:
            raise UserError(f"checkpoint {self._folder / str(step)} cannot be used: {complaint}")
        described = self._manager.item_metadata(step)
        template = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in described.items()}
        return self._manager.restore(step, args=ocp.args.StandardRestore(template))

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The state saved at `step`, shaped like `like`; raises UserError as `read` does."""
        return unflatten(self.read(step), like, str(self._folder / str(step)))

    def close(self) -> None:
        """Lets go of Orbax's threads."""
        self._manager.close()


def _miou(metrics: dict[str, float]) -> float:
    return metrics["miou"]


def unflatten(arrays: dict[str, np.ndarray], like: PyTree, where: str) -> PyTree:
    """Arrays by dotted path as a pytree like `like`.

    Raises:
      UserError: an array is missing or has another shape, named with `where` it came from.
    """
    names, leaves, structure = _names(like)
    for name, leaf in zip(names, leaves, strict=True):
        if name not in arrays:
            raise UserError(f"{where} holds no '{name}': it is of another network or method")
        if arrays[name].shape != np.shape(leaf):
            raise UserError(f"{where}: '{name}' has shape {arrays[name].shape}, this network needs {np.shape(leaf)}")
    return jax.tree.unflatten(structure, [arrays[name] for name in names])


def kept_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a stage's `checkpoints` folder, whole or not, rising."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def read_variables(folder: Path, which: str = "last") -> tuple[dict[str, np.ndarray], int]:
    """The model's arrays in a stage's checkpoints, by dotted path from "params." and "batch_stats.".

    Args:
      folder: a stage's `checkpoints` folder.
      which: "last", "best" (chosen with target labels), or a step.

    Raises:
      UserError: there is no whole checkpoint.
    """
    with _opened(folder, which) as (checkpoints, step):
        arrays = checkpoints.read(step)
    model = {name.replace("params.model.", "params.", 1): array for name, array in arrays.items()}
    return {name: array for name, array in model.items() if name.startswith(("params.", "batch_stats."))}, step


def manifest_hash(folder: Path, which: str = "last") -> str:
    """A checksum of the checkpoint that `read_variables` would read; raises UserError as it does."""
    with _opened(folder, which) as (_, step):
        return files.sha256(folder / str(step) / MANIFEST)


@contextlib.contextmanager
def _opened(folder: Path, which: str) -> Iterator[tuple[Checkpoints, int]]:
    """The checkpoints in a folder, and the step of the last or the best one."""
    if not folder.is_dir():
        raise UserError(f"there are no checkpoints in {folder}: its stage has not run")
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        step = int(which) if which.isdigit() else checkpoints.best() if which == "best" else checkpoints.newest()
        if step is None:
            raise UserError(f"there is no whole checkpoint in {folder}: run its stage again with --from_stage")
        yield checkpoints, step
    finally:
        checkpoints.close()
