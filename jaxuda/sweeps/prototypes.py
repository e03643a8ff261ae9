"""Class prototypes of both domains under a trained network; CFContra's memories start from them.

Source: the mean over images of each class's mean projected feature, over the pixels that the network classifies
correctly. Target: the same over the pixels that have a pseudo-label: the class of the nearest source prototype, if it
is nearer than the second by a margin. Both are scaled to unit length. A limited number of images, drawn by the seed,
is enough. The network is in evaluation mode (the published code leaves batch normalisation in training mode).

The projection head is created here and saved with the prototypes, since they mean nothing with another head.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import data, files, parallel
from jaxuda.artifacts.arrays import read_npz
from jaxuda.artifacts.prototypes import Memories, init_projection, write_prototypes
from jaxuda.data.records import Domains, Records, Subset
from jaxuda.data.transforms import fitted_size, resize_nearest
from jaxuda.errors import UserError
from jaxuda.losses.contrastive import image_means, nearest_prototype_labels
from jaxuda.losses.segmentation import IGNORE
from jaxuda.models.heads import ProjectionHead
from jaxuda.models.layers import normalise, resize_labels
from jaxuda.sweeps.scores import image_masks
from jaxuda.training.logs import progress_bar

PyTree = Any
PROGRESS = "{}_progress.npz"
SAVE_EVERY = 50  # batches
SUMS = ("means", "used", "pixels")  # what `_sums` returns


def run(
    variables: PyTree,
    domains: Domains,
    folder: Path,
    *,
    model: nn.Module,
    method: Any,
    config: Any,
    devices: list[jax.Device],
    say: Callable[[str], None],
) -> None:
    """Writes both memories and the projection head to `folder` (see `jaxuda.artifacts.prototypes`).

    Progress is saved every `SAVE_EVERY` batches; an interrupted pass continues from there. Classes without pixels are
    reported: their prototypes are zero, and contrasts and pseudo-labels skip them until a training batch shows them.

    Args:
      config: it reads `projection` (kind of the head), `margin` and `normalise_for_labels` (for the pseudo-labels),
        `source_images` and `target_images` (maximum numbers), `seed`, `preprocess`, `evaluation.batch`, and for
        the size of the images `resize` or `fit` of the domain, or else `evaluation.size`.
    """
    names, memories = domains.label_space.classes, {}
    channels = _feature_channels(model, variables, config)
    projection = jax.device_get(init_projection(jax.random.key(config.seed), config.projection, channels))
    means = _make_means(model, config)
    variables = {"model": variables, "projection": projection}
    for name, records, limit, kept in (
        ("source", domains.source, config.source_images, "classified correctly"),
        ("target", domains.target.images_only(), config.target_images, "given a pseudo-label"),
    ):
        chosen = choose(records, limit, config.seed)
        memories[name], share = _walk(name, chosen, means[name], variables, folder, config, devices)
        variables["prototypes"] = memories[name]
        say(f"{name} prototypes from {len(chosen)} images of {records.name}: {share:.1%} of the pixels are {kept}")
        absent = [title for title, row in zip(names, memories[name], strict=True) if not row.any()]
        if absent:
            say(f"no such pixel of {', '.join(absent)}: these classes are skipped until a training batch shows them")
    write_prototypes(folder, Memories(**memories), projection, config.projection, model, names)
    for name in memories:
        (folder / PROGRESS.format(name)).unlink()


def _make_means(model: nn.Module, config: Any) -> dict[str, Callable]:
    """For each domain, the compiled function from variables and a batch to the result of `_sums`."""
    head = ProjectionHead(config.projection, model.dtype)

    def project(variables: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = model.apply(variables["model"], normalise(images, config.preprocess), train=False)
        return head.apply({"params": variables["projection"]}, outputs.features), outputs.main

    def source(variables: PyTree, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        projected, logits = project(variables, batch["image"])
        labels = resize_labels(batch["label"], logits.shape[1:3]).astype(jnp.int32)
        right = jnp.where(jnp.argmax(logits, axis=-1) == labels, labels, IGNORE)
        return _sums(projected, right, batch["shown"], model.num_classes)

    def target(variables: PyTree, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        projected, _ = project(variables, batch["image"])
        prototypes, margin = variables["prototypes"], config.margin
        pseudo = nearest_prototype_labels(projected, prototypes, margin, config.normalise_for_labels)
        return _sums(projected, pseudo, batch["shown"], model.num_classes)

    return {"source": jax.jit(source), "target": jax.jit(target)}


def choose(records: Records, limit: int, seed: int) -> Subset:
    """At most `limit` records, drawn by the seed, in the order of the dataset; raises UserError if `limit` < 1."""
    if limit < 1:
        raise UserError(
            f"prototypes of {records.name} cannot be made from {limit} images: set source_images and "
            "target_images of the stage to 1 or more"
        )
    ids = records.ids()
    drawn = np.random.default_rng(seed).permutation(len(ids))[:limit]
    return Subset(records, [ids[index] for index in sorted(drawn)])


def _walk(
    name: str,
    records: Subset,
    means: Callable,
    variables: PyTree,
    folder: Path,
    config: Any,
    devices: list[jax.Device],
) -> tuple[np.ndarray, float]:
    """Prototypes (C, A) of one domain, and the share of its pixels that they are made from; saves its progress."""
    path, batch_size = folder / PROGRESS.format(name), config.evaluation.batch
    done, total = _read_progress(path)
    fit = config[name].get("fit")
    size = tuple(fit or config[name].resize or config.evaluation.size)
    kind, interpolation = "fit" if fit else "resize", config[name].get("interpolation", "bicubic")
    transform = data.build_transform({kind: size, "interpolation": interpolation})
    variables = parallel.everywhere(variables, devices)
    remaining = Subset(records, records.ids()[done:])
    with progress_bar(len(records), f"{name} prototypes", "img", initial=done) as bar:
        for index, batch in enumerate(data.sweep_batches(remaining, transform, batch_size), 1):
            arrays = parallel.spread(_arrays(batch, size, bool(fit)), devices)
            total = [old + np.float64(new) for old, new in zip(total, means(variables, arrays), strict=True)]
            done += batch["count"]
            bar.update(batch["count"])
            if index % SAVE_EVERY == 0 or done == len(records):
                _write_progress(path, done, total)
    sums, used, pixels = total
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return (sums / np.where(lengths > 0, lengths, 1)).astype(np.float32), float(used / max(pixels, 1))


def _sums(
    features: jax.Array, labels: jax.Array, shown: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(C, A) sum over images of class means, and of the pixels that count: how many are labelled, how many there are.

    Args:
      features: (N, h, w, A).
      labels: (N, h, w) int32, 255 = ignore.
      shown: (N, H, W) bool, which pixels of the input count.
    """
    shown = resize_labels(shown.astype(jnp.int32), labels.shape[1:]) > 0
    labels = jnp.where(shown, labels, IGNORE)
    sums, _ = image_means(features, labels, num_classes)
    return sums, jnp.sum(labels != IGNORE), jnp.sum(shown)


def _arrays(batch: dict[str, Any], size: tuple[int, int], fit: bool) -> dict[str, np.ndarray]:
    """The arrays of a sweep's batch: images, labels (if any) at the size of the images, and which pixels count."""
    arrays = {"image": batch["image"], "shown": image_masks(batch, size, fit)}
    if batch["label"] is not None:
        arrays["label"] = np.full(batch["image"].shape[:3], IGNORE, np.uint8)
        for row, label in zip(arrays["label"], batch["label"], strict=False):
            across, down = fitted_size(label.shape[::-1], size) if fit else size
            row[:down, :across] = resize_nearest(label, (across, down))
    return arrays


def _feature_channels(model: nn.Module, variables: PyTree, config: Any) -> int:
    width, height = config.evaluation.size
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    return jax.eval_shape(model.apply, variables, images).features.shape[-1]


def _write_progress(path: Path, done: int, total: list[np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, done=done, **dict(zip(SUMS, total, strict=True)))
    files.write_bytes(path, buffer.getvalue())


def _read_progress(path: Path) -> tuple[int, list[np.ndarray]]:
    """The number of images that are done, and the sums over them."""
    try:
        saved = read_npz(path)
        return int(saved["done"]), [saved[name] for name in SUMS]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing or corrupt: start from the beginning
        return 0, [np.float64(0)] * len(SUMS)
