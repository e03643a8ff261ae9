"""The sample is balanced, bounded and repeatable; planted relations are found; the stage runs without a network."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxuda.artifacts.relations import FILE, read_relations
from jaxuda.cli import MISTAKE
from jaxuda.data.labels import make_label_space
from jaxuda.data.records import Domains
from jaxuda.errors import UserError
from jaxuda.main import main
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.sweeps import context_relations as sweep
from jaxuda.sweeps.relation_sheet import is_single

SPACE = make_label_space("three", {"road": (90, 90, 90), "car": (0, 0, 200), "train": (0, 200, 0)})
MODEL = DeepLabV2(3, "resnet18", "torchvision", width=8, blocks=(1, 1, 1, 1))


def config(**changes) -> ConfigDict:
    fields = {"region_sizes": (2,), "sample": 500, "eps": 0.15, "min_samples": 5, "max_relations": 100, "seed": 0}
    return ConfigDict(fields | {"source": {"resize": (48, 32)}, "evaluation": {"size": (48, 32)}} | changes)


class _Source(list):
    """Labels without images, since the search must not read images."""

    name, label_space = "a tiny source", SPACE

    def labels_only(self) -> "_Source":
        return self


def source(images: int = 30) -> _Source:
    """Road, with a car's left or lower edge in some regions of 16 pixels; a train in very few; and disorder."""
    rng = np.random.default_rng(0)
    records = _Source()
    for index in range(images):
        label = np.zeros((32, 48), np.uint8)
        for top, left in np.ndindex(2, 3):
            region = label[16 * top : 16 * top + 16, 16 * left : 16 * left + 16]
            kind = rng.random()
            if kind < 0.3:
                region[:, 8:] = 1
            elif kind < 0.5:
                region[:9] = 1
            elif kind < 0.55:
                region[:] = rng.integers(0, 3, (8, 8)).repeat(2, 0).repeat(2, 1)
            elif kind < 0.62:
                region[:] = 2
        records.append({"label": label, "id": str(index)})
    return records


def run(folder: Path, records: _Source, **changes) -> list[str]:
    folder.mkdir(exist_ok=True)
    told = []
    sweep.run(
        None,
        Domains(records, None),
        folder,
        model=MODEL,
        method=None,
        config=config(**changes),
        devices=[],
        say=told.append,
    )
    return told


def test_planted_relations_are_found(tmp_path: Path) -> None:
    told = run(tmp_path, source())
    relations = read_relations(tmp_path, (2,), 3, SPACE.classes)[2]
    shares = relations.prototypes[:, :3]
    # Road alone, car right of road, car above road, train alone: in the order of their frequency.
    np.testing.assert_array_equal(shares > 0.1, [[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert relations.prototypes[1, 3:].reshape(4, 4).sum(0).argmax() == 0
    assert relations.prototypes[2, 3:].reshape(4, 4).sum(0).argmax() == 2
    assert (relations.radii >= np.float32(0.15)).all()
    assert "4 relations, 2 of a single class and 2 mixed" in told[0]
    sheet = cv2.imread(str(tmp_path / "context_relations_2.png"))
    assert sheet.shape[0] == 2 * 52 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 5


def test_same_seed_same_file(tmp_path: Path) -> None:
    contents = []
    for name, changes in (("a", {}), ("b", {}), ("c", {"seed": 1})):
        run(tmp_path / name, source(), sample=60, **changes)
        contents.append((tmp_path / name / FILE).read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_several_region_sizes(tmp_path: Path) -> None:
    told = run(tmp_path, source(), region_sizes=(1, 2))
    found = read_relations(tmp_path, (1, 2), 3)
    assert len(told) == 2 and not np.array_equal(found[1].prototypes, found[2].prototypes)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "context_relations_1.png", "context_relations_2.png"}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 120))
def test_even_share_fills_the_sample(counts: list[int], limit: int) -> None:
    counts = np.array(counts)
    share = sweep.even_share(counts, limit)
    assert np.minimum(counts, share).sum() <= limit
    assert share == counts.max() or np.minimum(counts, share + 1).sum() > limit


def test_sample_is_balanced_and_bounded() -> None:
    """100 of 3000 regions of road, 300 with a car and 20 with a train are kept: all trains, as many cars as roads."""
    sample = sweep.BalancedSample(100, 3)
    held = []
    for index in range(20):
        regions = np.zeros((166, 4, 4), np.uint8)
        regions[:15, 0, 0], regions[15, 0, 0] = 1, 2
        regions[16, 0] = regions[16, 1] = 255  # half is ignored
        regions[17, :3] = 255  # more: skipped
        sample.add(regions, np.random.default_rng(index).random(166))
        held.append(sum(len(rows) for rows, _, _ in sample._kept))
    regions, weights = sample.result()
    kinds = np.array([2 if 2 in r else 1 if 1 in r else 0 for r in regions])
    assert max(held) <= 3 * 100 + 66
    assert np.bincount(kinds).tolist() == [40, 40, 20]
    np.testing.assert_allclose([weights[kinds == kind].sum() for kind in range(3)], [20 * 149, 300, 20])


def test_dropping_early_loses_nothing() -> None:
    """The kept regions are those with the smallest keys of each class in the whole stream."""
    sample, everything = sweep.BalancedSample(30, 2), {0: [], 1: []}
    for index in range(25):
        keys = np.random.default_rng(index).random(12)
        regions = np.zeros((12, 4, 4), np.uint8)
        regions[:3, 1] = 1
        sample.add(regions, keys)
        everything[1] += keys[:3].tolist()
        everything[0] += keys[3:].tolist()
    sample.result()
    _, classes, keys = sample._kept[0]
    for kind, all_keys in everything.items():
        assert sorted(keys[classes == kind]) == sorted(all_keys)[:15]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_samples": 1000}, r"no context relation was found.*raise eps \(now 0.15\) or lower min_samples"),
        ({"eps": 5.0}, r"one context relation was found.*lower eps \(now 5.0\)"),
        ({"region_sizes": (8,)}, "smaller than a region of 8x8"),
        ({"region_sizes": ()}, "region_sizes is empty"),
        ({"max_relations": 256}, r"max_relations=256 must be in 2..255"),
        ({"eps": 0.0}, "eps must be positive"),
    ],
)
def test_settings_that_find_nothing(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, source(), **changes)


def test_nothing_labelled(tmp_path: Path) -> None:
    records = _Source([{"label": np.full((32, 48), 255, np.uint8)}])
    with pytest.raises(UserError, match=r"among 0 regions .* no context relation"):
        run(tmp_path, records)


def test_the_largest_clusters_stay() -> None:
    regions = np.repeat(np.arange(3, dtype=np.uint8), [5, 30, 20])[:, None, None] * np.ones((1, 8, 8), np.uint8)
    weights = np.repeat([100.0, 1.0, 2.0], [5, 30, 20])
    found = sweep.find_relations(regions, weights, 3, config(max_relations=2))
    # The cluster of 5 is dropped although its regions are the most frequent in the source; the rest is sorted by that.
    assert [regions[rows[0], 0, 0] for rows in found.members] == [2, 1]
    np.testing.assert_allclose(found.shares, np.array([40, 30]) / weights.sum())
    assert all(is_single(regions[rows], 3) for rows in found.members)


@pytest.mark.slow
def test_recipe_on_tiny_data(tmp_path: Path, monkeypatch, capsys) -> None:
    """The sweep needs no network, and the adaptation uses its artifacts."""
    monkeypatch.chdir(Path(__file__).parents[2])
    domains = tiny.prepare_domains(tmp_path)
    words = ["jaxuda", *tiny.arguments("crcda", workdir=tmp_path / "run", **domains)]
    words += ["--config.pipeline=('context_relations', 'adapt')", "--config.adapt.init=scratch"]
    words += ["--config.adapt.region_sizes=(2,)", "--config.context_relations.region_sizes=(2,)"]
    sweep_field = "--config.context_relations.min_samples"
    assert main([*words, f"{sweep_field}=1000"]) == MISTAKE
    assert "lower min_samples (now 1000)" in capsys.readouterr().err
    assert main([*words, f"{sweep_field}=2"]) == MISTAKE
    assert "--from_stage context_relations" in capsys.readouterr().err
    assert main([*words, f"{sweep_field}=2", "--from_stage=context_relations"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["stage"] == "adapt" and "loss" in row]
    assert len(steps) == 6 and max(row["known_regions2"] for row in steps) > 0
    assert (tmp_path / "run" / "context_relations" / "artifacts" / FILE).exists()
