"""Ranks target images by the entropy of their predictions, and splits them into easy and hard ones.

Pan et al., Unsupervised Intra-domain Adaptation for Semantic Segmentation through Self-Supervision, CVPR 2020,
section 3.2: the score of an image is the mean of its entropy map over pixels and classes, at the network's input
size; the lowest share of the scores is easy, the rest hard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import files, parallel
from jaxuda.data.records import EASY, HARD, Domains, write_split
from jaxuda.errors import UserError
from jaxuda.losses.entropy import entropy_map
from jaxuda.models.layers import resize_bilinear
from jaxuda.sweeps.scores import make_scores, probabilities, shown_pixels, sweep
from jaxuda.training.logs import progress_bar

PyTree = Any
SCORES = "scores.csv"
# Classes whose presence lowers the score where `favour_rare` is set.
RARE = ("wall", "fence", "pole", "light", "sign", "terrain", "rider", "truck", "bus", "train", "motorcycle")


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
    """Writes `folder`/easy.txt and hard.txt (an id per line, easiest first) and scores.csv (id, score).

    Raises:
      UserError: the easy or the hard part would be empty, or `favour_rare` is set for classes other than the 19.
    """
    classes = domains.label_space.classes
    if config.favour_rare and not set(RARE) <= set(classes):
        raise UserError("favour_rare needs the 19 Cityscapes classes: set it to False for this label space")
    ids, found = domains.target.ids(), []
    scores, (width, height) = make_scores(model, method, config), config.evaluation.size

    @jax.jit
    def score(variables: PyTree, images: jax.Array, shown: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = resize_bilinear(scores(variables, images), (height, width), config.align_corners)
        return image_scores(probabilities(values, method), shown)

    variables = parallel.everywhere(variables, devices)
    with progress_bar(len(ids), "rank", "img") as bar:
        for batch in sweep(domains.target.images_only(), config):
            arrays = parallel.spread((batch["image"], shown_pixels(batch, config)), devices)
            values, present = jax.device_get(score(variables, *arrays))
            if config.favour_rare:
                values = favour_rare(values, present[:, [classes.index(name) for name in RARE]].sum(1))
            found += values[: batch["count"]].tolist()
            bar.update(batch["count"])

    easy, hard = split(ids, found, config.easy_share)
    if not easy or not hard:
        raise UserError(
            f"a share of {config.easy_share} of {len(ids)} images leaves {len(easy)} easy and {len(hard)} hard ones, "
            "and both are needed: change the stage's field easy_share, or use more target images"
        )
    table = "".join(f"{name},{value:.8f}\n" for name, value in zip(ids, found, strict=True))
    files.write_bytes(folder / SCORES, f"id,score\n{table}".encode())
    for name, part in ((EASY, easy), (HARD, hard)):
        write_split(folder, name, part)
    say(f"{len(easy)} easy and {len(hard)} hard images; scores from {min(found):.4f} to {max(found):.4f}")


def image_scores(probs: jax.Array, shown: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(N, H, W, C) probabilities -> (N,) mean entropy over pixels and classes, (N, C) which classes are predicted.

    Both count only pixels where `shown` (N, H, W) is True; an image without such pixels has the score 0.
    """
    predicted = (jnp.argmax(probs, -1)[..., None] == jnp.arange(probs.shape[-1])) & shown[..., None]
    means = jnp.sum(jnp.mean(entropy_map(probs), -1) * shown, (1, 2)) / jnp.maximum(jnp.sum(shown, (1, 2)), 1)
    return means, jnp.any(predicted, (1, 2))


def favour_rare(scores: np.ndarray, rare: np.ndarray) -> np.ndarray:
    """Scores (N,) times (11 - rare) / 11 + 0.5; `rare` (N,) is the number of `RARE` classes that are predicted.

    In the published code, the option that should switch this off switches it on.
    """
    return scores * ((len(RARE) - rare) / len(RARE) + 0.5)


def split(ids: Sequence[str], scores: Sequence[float], share: float) -> tuple[list[str], list[str]]:
    """The floor(share * n) ids with the lowest scores, and the others; both in rising order, ties by id."""
    ranked = [name for _, name in sorted(zip(scores, ids, strict=True))]
    count = int(share * len(ranked))
    return ranked[:count], ranked[count:]
