"""Descriptors against their definition written out cell by cell, NumPy against JAX, and the file between stages."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxuda.artifacts.relations import (
    FILE,
    Relations,
    class_relations,
    cut_regions,
    describe,
    label_regions,
    read_relations,
    write_relations,
)
from jaxuda.errors import UserError

CLASSES = 3


def random_labels(seed: int, count: int, height: int, width: int) -> np.ndarray:
    """Maps of blocks of four cells, with some speckle and some ignored cells."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, (count, height // 4, width // 4)).repeat(4, 1).repeat(4, 2)
    noise = rng.random(labels.shape)
    labels[noise < 0.05] = rng.integers(0, CLASSES)
    labels[noise > 0.95] = 255
    return labels.astype(np.uint8)


def expected_descriptor(region: np.ndarray) -> np.ndarray:
    """The definition, one cell and one class at a time."""
    side = len(region)
    histogram, layout = np.zeros(CLASSES), np.zeros((2, 2, 4))
    for y, x in np.ndindex(side, side):
        if region[y, x] != 255:
            histogram[region[y, x]] += 1
        for c in range(CLASSES):

            def difference(before: int, after: int, c=c) -> int:
                return 0 if 255 in (before, after) else int(after == c) - int(before == c)

            dx = difference(region[y, max(x - 1, 0)], region[y, min(x + 1, side - 1)])
            dy = difference(region[max(y - 1, 0), x], region[min(y + 1, side - 1), x])
            if dx or dy:
                angle = round(np.degrees(np.arctan2(dy, dx))) % 180
                layout[2 * y // side, 2 * x // side, angle // 45] += np.hypot(dx, dy)
    parts = histogram, 0.5 * layout.reshape(-1)
    return np.concatenate([p / (np.linalg.norm(p) or 1) * w for p, w in zip(parts, (1, 0.5), strict=True)])


def test_descriptor_is_its_definition() -> None:
    regions = random_labels(0, 12, 8, 8)
    regions[0], regions[1] = 2, 255
    found = describe(regions, CLASSES)
    assert found.dtype == np.float32 and found.shape == (12, CLASSES + 16)
    np.testing.assert_allclose(found, [expected_descriptor(region) for region in regions], atol=1e-6)
    np.testing.assert_array_equal(found[0], np.eye(CLASSES + 16)[2])  # one class: no layout
    assert not found[1].any()


def test_layout_tells_where_an_edge_is_and_its_direction() -> None:
    upright, level = np.zeros((2, 8, 8), np.uint8)
    upright[:, 2:], level[2:] = 1, 1
    for region, direction, quarters in ((upright, 0, [0, 2]), (level, 2, [0, 1])):
        layout = describe(region[None], CLASSES)[0, CLASSES:].reshape(4, 4)
        assert sorted(zip(*np.nonzero(layout), strict=True)) == [(quarter, direction) for quarter in quarters]
    assert describe(np.tri(8, dtype=np.uint8)[None], CLASSES)[0, CLASSES:].reshape(4, 4).sum(0).argmax() == 3


def test_an_ignored_cell_makes_no_edge() -> None:
    region = np.ones((1, 8, 8), np.uint8)
    region[0, 3:5, 2:6] = 255
    np.testing.assert_array_equal(describe(region, CLASSES)[0], np.eye(CLASSES + 16)[1])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_step_labels_as_the_sweep_does(size: int) -> None:
    """The same maps, once in NumPy, once traced by JAX: equal to the bit."""
    labels = random_labels(size, 4, 60, 92)
    grid = (7, 11)
    regions = cut_regions(labels, grid, size)
    assert regions.shape == (4, grid[0] // size, grid[1] // size, 4 * size, 4 * size)
    prototypes = describe(regions[:2].reshape(-1, 4 * size, 4 * size)[::2], CLASSES)
    relations = Relations(prototypes, np.linspace(0.05, 0.6, len(prototypes), dtype=np.float32))
    ours = label_regions(regions, relations, CLASSES)
    traced = jax.jit(lambda maps, kinds: label_regions(cut_regions(maps, grid, size), kinds, CLASSES))
    theirs = traced(jnp.asarray(labels, jnp.int32), jax.tree.map(jnp.asarray, relations))
    assert theirs.dtype == ours.dtype == np.int32
    np.testing.assert_array_equal(ours, theirs)
    known = np.mean(ours != 255)
    assert 0.2 < known < 1 and len(np.unique(ours)) > 3


def test_regions_lie_at_the_top_left() -> None:
    labels = np.zeros((1, 40, 56), np.uint8)  # 5 x 7 feature cells of 8 pixels
    labels[:, :32, 32:48], labels[:, 32:], labels[:, :, 48:] = 1, 255, 255
    regions = cut_regions(labels, (5, 7), 2)
    assert regions.shape == (1, 2, 3, 8, 8)
    np.testing.assert_array_equal(regions[0].reshape(2, 3, -1).max(-1), [[0, 0, 1]] * 2)
    np.testing.assert_array_equal(regions[0].reshape(2, 3, -1).min(-1), [[0, 0, 1]] * 2)


@pytest.mark.parametrize(("rows", "expected"), [(0, 1), (4, 1), (5, 255), (8, 255)])
def test_mostly_ignored_regions_have_no_relation(rows: int, expected: int) -> None:
    region = np.ones((1, 8, 8), np.uint8)
    region[:, :rows] = 255
    assert label_regions(region, class_relations(CLASSES), CLASSES) == expected


def test_beyond_the_radius_is_no_relation() -> None:
    region = np.zeros((1, 8, 8), np.uint8)
    region[:, :, 4:] = 1
    prototype = describe(np.zeros((1, 8, 8), np.uint8), CLASSES)
    distance = np.linalg.norm(describe(region, CLASSES) - prototype)
    for factor, expected in ((0.99, 255), (1.01, 0)):
        relations = Relations(prototype, np.array([factor * distance], np.float32))
        assert label_regions(region, relations, CLASSES) == expected


def test_map_smaller_than_a_region() -> None:
    with pytest.raises(UserError, match=r"6x3 feature cells are smaller than a region of 4x4: .*region_sizes"):
        cut_regions(np.zeros((1, 24, 48), np.uint8), (3, 6), 4)
    with pytest.raises(UserError, match="region_sizes holds 0"):
        cut_regions(np.zeros((1, 24, 48), np.uint8), (3, 6), 0)


def test_file(tmp_path: Path) -> None:
    found = {2: class_relations(3), 4: Relations(np.ones((2, 19), np.float32), np.ones(2, np.float32))}
    write_relations(tmp_path, found, ("a", "b", "c"))
    again = read_relations(tmp_path, (4, 2), 3, ("a", "b", "c"))
    for size, relations in found.items():
        jax.tree.map(np.testing.assert_array_equal, again[size], relations)


def test_file_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no context relations in .*--from_stage"):
        read_relations(tmp_path, (4,), 3)
    write_relations(tmp_path, {4: class_relations(3)}, ("a", "b", "c"))
    with pytest.raises(UserError, match=r"another label space: 3 classes \(a, b, c\), against 3 \(a, c, b\) here"):
        read_relations(tmp_path, (4,), 3, ("a", "c", "b"))
    with pytest.raises(UserError, match=r"another label space: 3 classes \(a, b, c\), against 5 here"):
        read_relations(tmp_path, (4,), 5)
    with pytest.raises(UserError, match=r"no relations of region size 8: .*the same region_sizes"):
        read_relations(tmp_path, (4, 8), 3)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:50])
    with pytest.raises(UserError, match="is corrupt"):
        read_relations(tmp_path, (4,), 3)
