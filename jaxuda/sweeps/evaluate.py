"""Evaluation: one pass over a dataset for the confusion matrix and for figures that need no labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import data, parallel
from jaxuda.data.joined import parts_of
from jaxuda.metrics import confusion_matrix, iou, mean_iou, pixel_accuracy
from jaxuda.sweeps.ensemble import Ensemble, Member, Passes
from jaxuda.sweeps.scores import probabilities, shown_pixels
from jaxuda.training.logs import progress_bar

PyTree = Any


class Evaluation(NamedTuple):
    """The scores of one network on one dataset.

    confusion: (C, C) int64, row = label, or None without labels. figures: label-free, see `_label_free`. parts: if
    several datasets are joined, the scores on each, whose confusion matrices add up to `confusion`.
    """

    confusion: np.ndarray | None
    figures: dict[str, float]
    parts: Mapping[str, Evaluation] = MappingProxyType({})

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON: mIoU, pixel accuracy and per-class IoU in 0..1, the figures, the confusion matrix."""
        if self.confusion is None:
            return dict(self.figures)
        per_class = [None if np.isnan(value) else float(value) for value in iou(self.confusion)]
        scores = {"miou": mean_iou(self.confusion), "pixel_accuracy": pixel_accuracy(self.confusion)}
        return {**scores, **self.figures, "iou": per_class, "confusion": self.confusion.tolist()}


def make_evaluator(
    model: nn.Module, method: ModuleType, config: Any, devices: list[jax.Device]
) -> Callable[[PyTree, data.Records], Evaluation]:
    """`evaluate(variables, records) -> Evaluation`, compiled once for all its calls.

    Images are resized to `config.evaluation.size` for the network; its scores are resized bilinearly to each
    label's own size, then argmax, as the published evaluations do. `sweep` and `resize_matrices` have the options.
    """
    evaluate = make_ensemble_evaluator(Ensemble([Member(model, method, config)]), devices)
    return lambda variables, records: evaluate([variables], records)


def make_ensemble_evaluator(
    ensemble: Ensemble, devices: list[jax.Device]
) -> Callable[[Sequence[PyTree], data.Records], Evaluation]:
    """`evaluate(variables of each member, records) -> Evaluation`, compiled once for all its calls.

    Label-free figures are computed only if one network sees every image, and only once.
    """
    first = ensemble.members[0]

    @jax.jit
    def evaluate_batch(variables: list[PyTree], batch: dict[str, jax.Array], passes: Passes) -> dict[str, jax.Array]:
        coarse, sums = ensemble.coarse(variables, passes), {}
        if ensemble.single:
            sums = _label_free(probabilities(coarse[0][0], first.method), batch["shown"])
        if "label" in batch:
            predictions = jnp.argmax(ensemble.average(coarse, passes), -1)
            sums["confusion"] = confusion_matrix(batch["label"], predictions, first.model.num_classes)
        return sums

    def sums(variables: Sequence[PyTree], share: _Share, grid: tuple[int, int], bar: Any) -> dict[str, np.ndarray]:
        total: dict[str, np.ndarray] = {}
        for batch, passes in ensemble.batches(share, variables, of_labels=True):
            arrays = {**_labels(batch, passes), "shown": shown_pixels(batch, first.config, grid)}
            arrays = parallel.spread((arrays, passes), devices)
            found = jax.device_get(evaluate_batch(variables, *arrays)).items()
            total = _added(total, {name: value.astype(_WIDE.get(name, np.float64)) for name, value in found})
            bar.update(batch["count"])
        # Over all processes; some of them may have had no record.
        shares = parallel.exchange({name: value.tolist() for name, value in total.items()})
        return functools.reduce(_added, shares, {})

    def evaluate(variables: Sequence[PyTree], records: data.Records) -> Evaluation:
        variables = [parallel.everywhere(each, devices) for each in variables]
        parts, grid = parts_of(records), ensemble.grid(variables)
        shares = [_Share(part) for part in parts]
        with progress_bar(sum(map(len, shares)), "evaluate", "img") as bar:
            found = [sums(variables, share, grid, bar) for share in shares]
        whole = _finish(functools.reduce(_added, found, {}))
        if len(parts) == 1:
            return whole
        return whole._replace(parts={part.name: _finish(each) for part, each in zip(parts, found, strict=True)})

    return evaluate


_WIDE = {"confusion": np.int64}  # the type that a figure is summed in, where it is not float64


def _added(total: Mapping[str, np.ndarray], more: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The sums of two sets of figures; one of them may lack some."""
    return {**total, **{name: total.get(name, 0) + np.asarray(value) for name, value in more.items()}}


class _Share(Sequence):
    """The records of this process: every n-th one if there are n processes."""

    def __init__(self, records: data.Records):
        self._records, self._rows = records, range(jax.process_index(), len(records), jax.process_count())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[self._rows[index]]


def _labels(batch: dict[str, Any], passes: Passes) -> dict[str, np.ndarray]:
    """A sweep's labels, if there are any, padded with 255 to the common size of `passes`."""
    if batch["label"] is None:
        return {}
    full = (len(batch["image"]), passes[0]["rows"].shape[1], passes[0]["columns"].shape[1])
    labels = np.full(full, 255, np.uint8)
    for padded, label in zip(labels, batch["label"], strict=False):
        padded[: label.shape[0], : label.shape[1]] = label
    return {"label": labels}


def _label_free(probs: jax.Array, shown: jax.Array) -> dict[str, jax.Array]:
    """Sums over the images of a batch, from which `_finish` computes figures for model selection without labels.

    Positions of `probs` (N, h, w, C) count where `shown` (N, h, w) is True, and images that have such positions.

    entropy: that of the predictions, 0..1. diversity: entropy of the mean prediction, 0..1 (low = collapsed).
    snd: soft neighbourhood density (Saito et al., Tune it the Right Way, ICCV 2021), the entropy of the softmax
    over similarities between predictions of one image, temperature 0.05; higher = denser neighbourhoods.
    """
    n, height, width, classes = probs.shape
    flat, counts = probs.reshape(n, height * width, classes), shown.reshape(n, height * width)
    weight = _shares(counts)  # of each position in the mean over its image
    entropy = -jnp.sum(flat * jnp.log(flat + 1e-30), -1) / jnp.log(classes)

    step = max(1, height * width // 256)
    some, seen = flat[:, ::step], counts[:, ::step]
    some = some / jnp.linalg.norm(some, axis=-1, keepdims=True)
    similar = jnp.einsum("nic,njc->nij", some, some) / 0.05
    others = seen[:, None, :] & ~jnp.eye(some.shape[1], dtype=bool)
    near = jax.nn.log_softmax(similar, where=others)
    density = -jnp.sum(jnp.where(jnp.isfinite(near), jnp.exp(near) * near, 0), -1)
    return {
        "images": jnp.sum(jnp.any(shown, (1, 2))),
        "entropy": jnp.sum(weight * entropy),
        "prediction": jnp.einsum("np,npc->c", weight, flat),
        "snd": jnp.sum(_shares(seen) * density),
    }


def _shares(counts: jax.Array) -> jax.Array:
    """(N, P) bool -> 1 / n at the n True positions of each row, 0 elsewhere."""
    return counts / jnp.maximum(jnp.sum(counts, -1, keepdims=True), 1)


def _finish(total: dict[str, np.ndarray]) -> Evaluation:
    if "images" not in total:
        return Evaluation(total.get("confusion"), {})
    images, prediction = total["images"], total["prediction"] / total["images"]
    diversity = -np.sum(prediction * np.log(prediction + 1e-30)) / np.log(len(prediction))
    figures = {"entropy": total["entropy"] / images, "diversity": diversity, "snd": total["snd"] / images}
    return Evaluation(total.get("confusion"), {name: float(value) for name, value in figures.items()})
