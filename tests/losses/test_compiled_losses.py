"""Losses and statistics, compiled, give what their operations give one by one, at the sizes of real maps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import CLASSES, COPIES, SIZE, same
from jax.nn import softmax

from jaxuda.losses.adversarial import class_domain_ce, domain_bce
from jaxuda.losses.association import cycle, smoothness
from jaxuda.losses.contrastive import (
    ClassStatistics,
    class_centres,
    distribution_contrast,
    nearest_prototype_labels,
    prototype_contrast,
    update_statistics,
)
from jaxuda.losses.depth import berhu
from jaxuda.losses.entropy import adaptive_entropy, entropy_loss
from jaxuda.losses.feature_distance import feature_distance
from jaxuda.losses.segmentation import cross_entropy, lovasz_softmax, weighted_cross_entropy


@pytest.mark.parametrize("rows", [32_769, 33_000, 40_000, 65_000, 130_000])
def test_sums_of_squares_of_products(rows: int) -> None:
    """The program that jaxlib 0.10.2 compiles wrongly."""
    rng = np.random.default_rng(0)
    matrix, vectors = (rng.normal(size=(count, 3)).astype(np.float32) for count in (3, rows))

    def sums(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
        return jax.vmap(lambda vector: jnp.sum(jnp.square(matrix @ vector)))(vectors)

    expected = np.square(vectors.astype(np.float64) @ matrix.T.astype(np.float64)).sum(1)
    np.testing.assert_allclose(sums(matrix, vectors), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(sums)(matrix, vectors), expected, rtol=1e-4, atol=1e-5)


class Given(NamedTuple):
    """Arguments of losses at the positions N, h, w, with as many channels A as classes C.

    maps, other: (N, h, w, C). soft: (N, h, w, C) in 0..1. labels: (N, h, w) uint8, some 255. memory: (C, A).
    """

    maps: Any
    other: Any
    soft: Any
    labels: Any
    memory: Any
    statistics: ClassStatistics


def draw() -> Given:
    """Two random images."""
    rng, channels = np.random.default_rng(0), len(CLASSES)
    shape = (2, *SIZE, channels)
    maps, other = rng.normal(size=(2, *shape)).astype(np.float32)
    soft = rng.random(shape, np.float32)
    labels = rng.choice([*range(channels), 255], shape[:3]).astype(np.uint8)
    rows = rng.normal(size=(channels, channels)).astype(np.float32)
    memory = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    statistics = ClassStatistics(rows, np.square(rows), np.full(channels, 1e3, np.float32))
    return jax.tree.map(jnp.asarray, Given(maps, other, soft, labels, memory, statistics))


def copied(given: Given) -> Given:
    """Every image `COPIES` times, and as many times as many pixels seen before."""
    statistics = given.statistics._replace(count=COPIES * given.statistics.count)
    images = (jnp.concatenate([x] * COPIES) for x in given[:4])
    return Given(*images, given.memory, statistics)


LOSSES: dict[str, Callable[[Given], jax.Array]] = {
    "cross_entropy": lambda x: cross_entropy(x.maps, x.labels),
    "weighted_cross_entropy": lambda x: weighted_cross_entropy(x.maps, x.labels, x.soft[..., 0]),
    "lovasz_softmax": lambda x: lovasz_softmax(softmax(x.maps), x.labels),
    "entropy_loss": lambda x: entropy_loss(softmax(x.maps)),
    "adaptive_entropy": lambda x: adaptive_entropy(softmax(x.maps), 0.7),
    "domain_bce": lambda x: domain_bce(x.maps, 1),
    "class_domain_ce": lambda x: class_domain_ce(jnp.concatenate([x.maps, x.other], -1), x.soft, 1),
    "berhu": lambda x: berhu(x.maps[..., 0], x.other[..., 0]),
    "feature_distance": lambda x: feature_distance(x.maps, x.other, x.labels == 1),
    "distribution_contrast": lambda x: distribution_contrast(x.maps, x.labels, x.statistics, 0.3),
    "prototype_contrast": lambda x: prototype_contrast(x.maps, x.labels, x.memory, 0.07),
    "smoothness": lambda x: smoothness(x.maps),
}


def in_numpy(given: Given) -> dict[str, float]:
    """Those of the losses that are simple, in float64."""
    maps, other, soft = (np.asarray(x, np.float64) for x in given[:3])
    log = maps - np.log(np.sum(np.exp(maps), -1, keepdims=True))
    target = other - np.log(np.sum(np.exp(np.concatenate([maps, other], -1)), -1, keepdims=True))
    labels = np.asarray(given.labels)
    known = labels != 255
    error = np.abs(maps - other)[..., 0]
    threshold = 0.2 * error.max()
    return {
        "cross_entropy": -np.mean(log[known, labels[known]]),
        "weighted_cross_entropy": -np.sum(soft[known, 0] * log[known, labels[known]]) / labels.size,
        "entropy_loss": -np.mean(np.sum(np.exp(log) * log, -1)) / np.log(len(CLASSES)),
        "domain_bce": np.mean(np.log1p(np.exp(-maps))),
        "class_domain_ce": -np.mean(np.sum(soft * target, -1)),
        "feature_distance": np.mean(np.linalg.norm(maps - other, axis=-1)[labels == 1]),
        "berhu": np.mean(np.where(error <= threshold, error, (error**2 + threshold**2) / (2 * threshold))),
    }


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients(name: str) -> None:
    def loss(maps: jax.Array, given: Given) -> jax.Array:
        return LOSSES[name](given._replace(maps=maps))

    given, both = draw(), jax.value_and_grad(loss)
    with jax.disable_jit():
        value, gradient = both(given.maps, given)
    assert np.abs(gradient).max() > 0
    np.testing.assert_allclose(value, in_numpy(given).get(name, value), rtol=1e-5)
    for positions in (given, copied(given)):
        found, slopes = jax.jit(both)(positions.maps, positions)
        # Copies leave the mean as it is, and share the gradient of what they are copies of.
        np.testing.assert_allclose(found, value, rtol=1e-5)
        wrong = np.abs(slopes.reshape(-1, *gradient.shape).sum(0) - gradient) > 1e-4 * np.abs(gradient).max()
        assert np.mean(wrong) < 1e-3  # rounding decides on which side of a margin an entry is


def _pairs(maps: jax.Array) -> jax.Array:
    """As many maps of 10 x 10 positions: association takes the square of a map's positions."""
    return maps.reshape(-1, 10, 10, maps.shape[-1])


def _statistics(given: Given) -> ClassStatistics:
    found = update_statistics(given.statistics, given.maps, given.labels)
    return found._replace(count=found.count / given.labels.size)


FORWARD: dict[str, Callable[[Given], Any]] = {
    "update_statistics": _statistics,
    "class_centres": lambda x: class_centres(x.maps, x.labels, len(CLASSES)),
    "nearest_prototype_labels": lambda x: nearest_prototype_labels(x.maps, x.memory, 0.3),
    "cycle": lambda x: cycle(_pairs(x.maps), _pairs(x.other)),  # what cycle_association averages
}


@pytest.mark.parametrize("name", FORWARD)
def test_statistics_and_associations(name: str) -> None:
    given, compute = draw(), FORWARD[name]
    with jax.disable_jit():
        expected = jax.tree.leaves(compute(given))
    for positions in (given, copied(given)):
        for found, one_by_one in zip(jax.tree.leaves(jax.jit(compute)(positions)), expected, strict=True):
            same(found, np.concatenate([one_by_one] * (len(found) // len(one_by_one))))


def test_statistics_are_those_of_numpy() -> None:
    given = draw()
    maps, labels = np.asarray(given.maps, np.float64), np.asarray(given.labels)
    start = ClassStatistics(*(jnp.zeros_like(x) for x in given.statistics))
    found = jax.jit(update_statistics)(start, given.maps, given.labels)
    pixels = [maps[labels == c] for c in range(len(CLASSES))]
    same(found.mean, np.stack([rows.mean(0) for rows in pixels]))
    same(found.var, np.stack([rows.var(0) for rows in pixels]))
    np.testing.assert_array_equal(found.count, [len(rows) for rows in pixels])
