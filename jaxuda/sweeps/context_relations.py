"""Local contextual relations of the source: recurring arrangements of classes in small regions of its label maps.

Huang et al., CrCDA, ECCV 2020, section 3.2. They are found before training, from label maps alone: DBSCAN clusters a
class-balanced sample of regions by their descriptors (`artifacts.relations`). Each cluster is a relation; noise
belongs to none. The authors published no code; this is our reading of the paper.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from sklearn.cluster import DBSCAN

from jaxuda import data, files
from jaxuda.artifacts.relations import Relations, cut_regions, describe, mostly_labelled, write_relations
from jaxuda.data import encoding
from jaxuda.data.labels import LabelSpace
from jaxuda.data.records import Domains
from jaxuda.data.threads import map_ahead
from jaxuda.data.transforms import resize_nearest
from jaxuda.errors import UserError
from jaxuda.models import output_shapes
from jaxuda.sweeps.relation_sheet import draw_sheet, is_single
from jaxuda.training.logs import progress_bar

PyTree = Any
MOST_RELATIONS = 255  # labels are 0..254, 255 is ignored


class Found(NamedTuple):
    """The result of the clustering for one region size: M relations, the most frequent in the source first.

    relations: prototypes and radii.
    members: M arrays of indices into the sample.
    shares: (M,) share of the source's regions, as estimated from the sample.
    """

    relations: Relations
    members: list[np.ndarray]
    shares: np.ndarray


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
    """Writes the relations of the source's training labels to `folder`, and a picture sheet for each region size.

    It reads from `config`: `region_sizes`, `sample`, `eps`, `min_samples`, `max_relations`, `seed`, and the size of
    the source's images (`source.resize`; if they are not simply resized, `evaluation.size`).

    Raises:
      UserError: the label maps are smaller than a region, or there are fewer than two relations.
    """
    _check(config)
    source, space = domains.source, domains.source.label_space
    size = tuple(config.source.resize or config.evaluation.size)
    samples = collect(source.labels_only(), size, output_shapes(model, size[::-1]).features.shape[1:3], config)
    found = {}
    for region, (regions, weights) in samples.items():
        result = find_relations(regions, weights, space.num_classes, config)
        found[region] = result.relations
        sheet = folder / f"context_relations_{region}.png"
        files.write_bytes(sheet, encoding.encode_image(draw_sheet(regions, result.members, result.shares, space)))
        say(_summary(region, regions, result, space, sheet))
    write_relations(folder, found, space.classes)


def _check(config: Any) -> None:
    if not config.region_sizes:
        raise UserError("region_sizes is empty: give the sizes of regions in feature cells, such as (4,)")
    if not 2 <= config.max_relations <= MOST_RELATIONS:
        raise UserError(f"max_relations={config.max_relations} must be in 2..{MOST_RELATIONS}")
    if config.eps <= 0 or config.min_samples < 1 or config.sample < 1:
        raise UserError("eps must be positive, min_samples and sample at least 1")


def _summary(size: int, regions: np.ndarray, found: Found, space: LabelSpace, sheet: Path) -> str:
    single = sum(is_single(regions[rows], space.num_classes) for rows in found.members)
    kept = sum(map(len, found.members)) / len(regions)
    return (
        f"regions of {size}x{size} feature cells: {len(found.members)} relations, {single} of a single class and "
        f"{len(found.members) - single} mixed, from {len(regions)} sampled regions, of which {kept:.0%} belong to one; "
        f"they hold {sum(found.shares):.0%} of the source's regions; pictures in {sheet}"
    )


# The sample -------------------------------------------------------------------------------------------------


class BalancedSample:
    """At most `limit` regions of a stream, sampled evenly over its classes. Holds less than three times `limit`.

    A region stands for the class in it that the fewest regions have shown so far. Each region has a random key. A class
    keeps the regions with the smallest keys, as many as an even share allows; a rare class keeps all. The share of a
    class can only fall while the stream goes on, so that a dropped region could not have been kept in the end.

    Args:
      limit: maximum number of regions in the result.
      num_classes: C.
    """

    def __init__(self, limit: int, num_classes: int):
        self._limit = limit
        self._shown = np.zeros(num_classes, np.int64)  # regions that hold a class
        self._seen = np.zeros(num_classes, np.int64)  # regions that stand for a class
        self._kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # regions, their classes, their keys

    def add(self, regions: np.ndarray, keys: np.ndarray) -> None:
        """Takes regions (n, s, s) uint8, each with its own random key; keys (n,)."""
        labelled = mostly_labelled(regions)
        regions, keys = regions[labelled], keys[labelled]
        present = np.stack([np.any(regions == c, axis=(1, 2)) for c in range(len(self._shown))], axis=1)
        self._shown += present.sum(0)
        rarest = np.where(present, self._shown, np.iinfo(np.int64).max).argmin(1)
        self._seen += np.bincount(rarest, minlength=len(self._seen))
        self._kept.append((regions, rarest, keys))
        if sum(len(rows) for _, _, rows in self._kept) > 2 * self._limit:
            self._prune()

    def _prune(self) -> None:
        regions, classes, keys = (np.concatenate(arrays) for arrays in zip(*self._kept, strict=True))
        order = np.lexsort((keys, classes))
        first = np.searchsorted(classes[order], classes[order])  # where the class of each row begins
        order = order[np.arange(len(order)) - first < even_share(self._seen, self._limit)]
        self._kept = [(regions[order], classes[order], keys[order])]

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The sample (n, s, s), and how many regions of the stream each stands for (n,)."""
        self._prune()
        regions, classes, _ = self._kept[0]
        kept = np.bincount(classes, minlength=len(self._seen))
        return regions, (self._seen / np.maximum(kept, 1))[classes]


def even_share(counts: np.ndarray, limit: int) -> int:
    """The largest t for which sum of min(counts, t) stays within `limit`; counts (C,) integers."""
    most = range(int(counts.max(initial=0)) + 1)
    return bisect.bisect_right(most, limit, key=lambda t: np.minimum(counts, t).sum()) - 1


def collect(
    source: data.Records, size: tuple[int, int], grid: tuple[int, int], config: Any
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """A class-balanced sample of regions for each of `config.region_sizes`.

    Args:
      source: labelled records.
      size: (width, height) of the network's input.
      grid: (h, w) of its features for that input.
      config: `region_sizes`, `sample` and `seed` are read.

    Returns:
      For each region size r: regions (n, 4r, 4r) uint8, and how many regions of the source each stands for (n,).
    """
    samples = {region: BalancedSample(config.sample, source.label_space.num_classes) for region in config.region_sizes}
    cut = partial(_cut_record, source, size, grid, tuple(samples))
    with progress_bar(len(source), "relations", "img") as bar:
        for index, cuts in enumerate(map_ahead(cut, range(len(source)))):
            for region, regions in cuts.items():
                keys = np.random.default_rng([config.seed, region, index]).random(len(regions))
                samples[region].add(regions, keys)
            bar.update()
    return {region: sample.result() for region, sample in samples.items()}


def _cut_record(
    source: data.Records, size: tuple[int, int], grid: tuple[int, int], sizes: tuple[int, ...], index: int
) -> dict[int, np.ndarray]:
    label = resize_nearest(source[index]["label"], size)
    return {region: cut_regions(label, grid, region).reshape(-1, *[4 * region] * 2) for region in sizes}


# The clusters -----------------------------------------------------------------------------------------------


def find_relations(regions: np.ndarray, weights: np.ndarray, num_classes: int, config: Any) -> Found:
    """Clusters sampled regions.

    A prototype is the mean of its members' descriptors; its radius is the 95th percentile of their distances to it,
    but at least `eps`. If there are more than `max_relations` clusters, the largest in the sample are kept.

    Args:
      regions: (n, s, s) uint8.
      weights: (n,) how many regions of the source each stands for.
      num_classes: C.
      config: `eps`, `min_samples` and `max_relations` are read.

    Raises:
      UserError: there are fewer than two clusters.
    """
    parts = np.array_split(regions, -(-len(regions) // 1000) or 1)  # limits the memory of `describe`
    described = np.concatenate([describe(part, num_classes) for part in parts])
    # Many regions are equal (those of one class alone); DBSCAN gets each only once, with its number of copies.
    points, place, copies = np.unique(described, axis=0, return_inverse=True, return_counts=True)
    clusters = np.full(len(described), -1)
    if len(points):
        clustering = DBSCAN(eps=config.eps, min_samples=config.min_samples)
        clusters = clustering.fit(points, sample_weight=copies).labels_[place]
    count = clusters.max(initial=-1) + 1
    if count < 2:
        advice = f"lower eps (now {config.eps})"
        if count == 0:
            advice = f"raise eps (now {config.eps}) or lower min_samples (now {config.min_samples})"
        raise UserError(
            f"among {len(regions)} regions sampled from the source's labels {'one' if count else 'no'} context "
            f"relation was found, and at least two are needed: {advice} in the stage that finds them"
        )
    members = sorted((np.flatnonzero(clusters == c) for c in range(count)), key=len, reverse=True)
    members = sorted(members[: config.max_relations], key=lambda rows: -weights[rows].sum())
    prototypes = np.stack([described[rows].mean(0) for rows in members])
    distances = [np.linalg.norm(described[rows] - p, axis=1) for rows, p in zip(members, prototypes, strict=True)]
    radii = np.array([max(config.eps, np.percentile(d, 95)) for d in distances], np.float32)
    shares = np.array([weights[rows].sum() for rows in members]) / weights.sum()
    return Found(Relations(prototypes, radii), members, shares)
