"""Pictures for a report: a few images with their labels, and the predictions of each stage.

Predictions need a forward pass, so they are kept as PNG in the work folder (`pictures/`), under names that change with
the stage, its checkpoint and the data.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from jaxuda import data, files
from jaxuda.data import encoding
from jaxuda.data.labels import LabelSpace
from jaxuda.data.transforms import resize_nearest
from jaxuda.errors import UserError
from jaxuda.inference import predictor
from jaxuda.losses.entropy import entropy_map
from jaxuda.report.runs import Run, StageRun, label_space, open_split

FOLDER = "pictures"
WIDEST = 512  # pixels; wider images are scaled down


class Picture(NamedTuple):
    """One image. All maps have its height and width.

    id: that of the record.
    image: (H, W, 3) uint8 RGB.
    truth: (H, W) uint8 train ids, None without labels.
    labels: stage -> (H, W) uint8 train ids that its evaluated network predicts; "STAGE (NETWORK)" -> those of another.
    entropy: as `labels` -> (H, W) uint8, entropy of the prediction, 0..255 for 0..1.
    """

    id: str
    image: np.ndarray
    truth: np.ndarray | None
    labels: dict[str, np.ndarray]
    entropy: dict[str, np.ndarray]


class Gallery(NamedTuple):
    """Pictures of one split. data: its fingerprint. space: its classes and their colours."""

    name: str
    data: str
    space: LabelSpace
    pictures: list[Picture]


def make_gallery(run: Run, count: int, stages: Sequence[StageRun] | None = None) -> Gallery:
    """Images spread evenly over the validation split, or over the training images if there is none.

    They are those of the target; of the source where the run has no target.

    Args:
      run: the work folder.
      count: how many images.
      stages: the stages that predict; default: all trainings that have a checkpoint.

    Raises:
      UserError: the data are missing, no stage has a checkpoint, or a checkpoint is corrupt.
    """
    has_target = run.config.get("target", {}).get("name") or not run.config.get("source", {}).get("name")
    records, space = open_domain(run, "target" if has_target else "source")
    chosen = [stage for stage in (run.trainings if stages is None else stages) if _newest(run.folder / stage.name)]
    if not chosen:
        raise UserError(f"no stage in {run.folder} has a checkpoint yet")
    indices = np.unique(np.linspace(0, len(records) - 1, count).astype(int)).tolist()
    rows = [records[index] for index in indices]
    images = [_shrink(row["image"]) for row in rows]
    truths = [
        resize_nearest(row["label"], image.shape[1::-1]) if "label" in row else None
        for row, image in zip(rows, images, strict=True)
    ]
    maps = {
        f"{stage.name} ({network})" if network else stage.name: _maps(
            run, stage, network, records.fingerprint, indices, rows
        )
        for stage in chosen
        for network in ("", *list(stage.networks)[1:])
    }
    pictures = [
        Picture(
            row["id"],
            images[place],
            truths[place],
            {stage: found[place][0] for stage, found in maps.items()},
            {stage: found[place][1] for stage, found in maps.items()},
        )
        for place, row in enumerate(rows)
    ]
    return Gallery(records.name, records.fingerprint, space, pictures)


def open_domain(run: Run, domain: str) -> tuple[data.Records, LabelSpace]:
    """The images of the "source" or the "target", and the classes of the run; raises UserError if they are missing."""
    space = label_space(run.config) or open_split(run.config, "source").label_space
    try:
        return open_split(run.config, domain, run.config.get("evaluation", {}).get("split")), space
    except UserError:
        return open_split(run.config, domain), space


def _shrink(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    if width <= WIDEST:
        return image
    return cv2.resize(image, (WIDEST, round(height * WIDEST / width)), interpolation=cv2.INTER_AREA)


def _newest(stage: Path) -> int:
    """The step of a stage's newest checkpoint, 0 if it has none."""
    return max((int(path.name) for path in stage.glob("checkpoints/*") if path.name.isdigit()), default=0)


def _maps(
    run: Run, stage: StageRun, network: str, fingerprint: str, indices: Sequence[int], rows: Sequence[dict]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train ids and entropy of each row, predicted by one stage or read from the files of an earlier call.

    network: "" for the one that the stage is evaluated with.
    """
    folder, who = run.folder / FOLDER, f"{stage.name}.{network}" if network else stage.name
    step = _newest(run.folder / stage.name)
    key = hashlib.sha256(f"{stage.fingerprint} {step} {fingerprint} {WIDEST}".encode()).hexdigest()[:12]
    loaded, found = None, []
    for index, row in zip(indices, rows, strict=True):
        paths = [folder / f"{index}-{who}-{kind}-{key}.png" for kind in ("labels", "entropy")]
        try:
            maps = tuple(encoding.decode_label(path.read_bytes()) for path in paths)
        except (OSError, ValueError):
            loaded = loaded or predictor.load(str(run.folder / stage.name), network)
            maps = _predict(loaded, row["image"])
            with contextlib.suppress(OSError):  # a read-only work folder has a report too
                folder.mkdir(exist_ok=True)
                for old in folder.glob(f"{index}-{who}-*-*.png"):
                    old.unlink(missing_ok=True)
                for path, values in zip(paths, maps, strict=True):
                    files.write_bytes(path, encoding.encode_label(values))
        found.append(maps)
    return found


def _predict(network: predictor.Predictor, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = network.predict(image)
    height, width = _shrink(image).shape[:2]
    entropy = np.asarray(entropy_map(probabilities).sum(-1))
    entropy = cv2.resize(entropy, (width, height), interpolation=cv2.INTER_AREA)
    return resize_nearest(labels, (width, height)), np.round(255 * entropy.clip(0, 1)).astype(np.uint8)
