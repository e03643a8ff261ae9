"""Averages for evaluation and prediction: over networks, input sizes and mirrored images; usually one of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxuda.models.layers import resize_bilinear
from jaxuda.sweeps.scores import (
    make_scores,
    padded_sizes,
    probabilities,
    resize,
    resize_matrices,
    score_grid,
    sweep,
)

PyTree = Any
Passes = list[dict[str, Any]]  # one for each network and input size: "image", "rows", "columns"


class Member(NamedTuple):
    """A network, the method it was trained with, its stage's config, and its weight in the average."""

    model: nn.Module
    method: ModuleType
    config: Any
    weight: float = 1.0


class Ensemble:
    """The weighted mean of the scores of several networks, at each image's own size.

    Each network gets images of the size of its evaluation during training, `evaluation.size`, times each of `scales`.
    If every network sees an image once, logits are averaged (ADVENT's published ensembles). If a network sees it
    several times, its method returns probabilities, or classes have weights, class probabilities are averaged. Weights
    are multiplied with probabilities at the size of the network's input, as SePiCo's authors do.

    Args:
      members: at least one, all with the same classes. The batch size is that of the first.
      flip: networks also get every image mirrored.
      scales: factors of the input size.
      class_weights: what class probabilities are multiplied by; () for nothing.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        class_weights: Sequence[float] = (),
    ):
        self.members, self._flip, self._class_weights = list(members), flip, tuple(class_weights)
        self._scores = [make_scores(member.model, member.method, member.config) for member in members]
        probabilistic = any(hasattr(member.method, "predict") for member in members)
        # Weighted classes have probabilities before.
        self._becomes_probabilities = (flip or len(scales) > 1 or probabilistic) and not self._class_weights
        total = len(scales) * sum(member.weight for member in members)
        # (index of the member, its input size, its share)
        self._passes = []
        for index, member in enumerate(members):
            for scale in scales:
                size = tuple(round(side * scale) for side in member.config.evaluation.size)
                self._passes.append((index, size, member.weight / total))

    def batches(
        self, records: Sequence, variables: Sequence[PyTree], *, of_labels: bool = False
    ) -> Iterator[tuple[dict[str, Any], Passes]]:
        """Goes through `records` once; images are decoded once for each pass.

        Args:
          records: as `data.sweep_batches` takes them.
          variables: those of each member.
          of_labels: scores have the size of the labels, if there are any; otherwise that of the images.

        Yields:
          A batch of `data.sweep_batches`, and its passes for `coarse` and `average`.
        """
        batch_size = self.members[0].config.evaluation.batch
        inputs = [(self.members[index].config, size) for index, size, _ in self._passes]
        grids = [self.grid(variables, which) for which in range(len(self._passes))]
        sweeps = [sweep(records, config, size, batch_size) for config, size in inputs]
        for batches in zip(*sweeps, strict=True):
            first = batches[0]
            labelled = of_labels and first["label"] is not None
            sizes = [label.shape for label in first["label"]] if labelled else first["size"]
            sizes = padded_sizes(sizes, len(first["image"]))
            passes = []
            for batch, grid, (config, size) in zip(batches, grids, inputs, strict=True):
                rows, columns = resize_matrices(grid, sizes, config, size)
                passes.append({"image": batch["image"], "rows": rows, "columns": columns})
            yield first, passes

    def grid(self, variables: Sequence[PyTree], which: int = 0) -> tuple[int, int]:
        """(h, w) of the scores of one pass, that is, of one network at one input size."""
        index, size, _ = self._passes[which]
        if self._class_weights:
            return size[1], size[0]
        return score_grid(self._scores[index], variables[index], self.members[index].config, size)

    def coarse(self, variables: Sequence[PyTree], passes: Passes) -> list[list[jax.Array]]:
        """The scores (N, h, w, C) of each pass, of the size `grid`; with `flip` also those of mirrored images."""
        result = []
        for (index, _, _), arrays in zip(self._passes, passes, strict=True):
            images, scores = arrays["image"], self._scores[index]
            views = [scores(variables[index], images)]
            if self._flip:
                views.append(scores(variables[index], images[:, :, ::-1])[:, :, ::-1])
            result.append([self._weighted(view, self.members[index], images.shape[1:3]) for view in views])
        return result

    def _weighted(self, scores: jax.Array, member: Member, size: tuple[int, int]) -> jax.Array:
        """Weighted class probabilities of a size (height, width) if classes have weights, otherwise `scores`."""
        if not self._class_weights:
            return scores
        scores = resize_bilinear(scores, size, member.config.align_corners)
        return probabilities(scores, member.method) * jnp.asarray(self._class_weights)

    def average(self, coarse: list[list[jax.Array]], passes: Passes) -> jax.Array:
        """The weighted mean (N, H, W, C) of the result of `coarse`, at the sizes in `passes`."""
        total = 0.0
        for (index, _, share), arrays, views in zip(self._passes, passes, coarse, strict=True):
            for view in views:
                values = resize(view, arrays["rows"], arrays["columns"])
                if self._becomes_probabilities:
                    values = probabilities(values, self.members[index].method)
                total += share / len(views) * values
        return total

    @property
    def single(self) -> bool:
        """Whether one network sees every image, and only once, and `coarse` has its scores as they are."""
        return len(self._passes) == 1 and not self._flip and not self._class_weights
