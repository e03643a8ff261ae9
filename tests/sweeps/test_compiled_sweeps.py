"""Sweeps, compiled, give what their operations give one by one, at the sizes of real maps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import CLASSES, COPIES, SIZE, same
from ml_collections import ConfigDict

from jaxuda.artifacts.prototypes import FILE
from jaxuda.artifacts.relations import Relations, cut_regions, label_regions
from jaxuda.data import encoding
from jaxuda.data.labels import make_label_space
from jaxuda.data.records import Domains
from jaxuda.models import Outputs
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.sweeps import class_statistics, entropy_rank, prototypes, pseudo_label, target_classes
from jaxuda.sweeps.evaluate import make_evaluator

pytestmark = pytest.mark.usefixtures("all_optimizations")


class Pixelwise(DeepLabV2):
    """A network with the resolution of its images: a product with a matrix at each pixel."""

    def __call__(self, images: jax.Array, train: bool = False, index: jax.Array | None = None) -> Outputs:
        features = images @ jnp.array([[1, -1, 0], [0, 1, 1], [1, 0, -2]], jnp.float32)
        return Outputs(images @ jnp.array([[2, 0, 1], [-1, 1, 0], [0, 1, -1]], jnp.float32), features)


class InMemory(list):
    """Six labelled images."""

    name, labelled = "six images", True
    label_space = make_label_space("three", dict.fromkeys(CLASSES, (0, 0, 0)))

    @classmethod
    def draw(cls) -> "InMemory":
        rng = np.random.default_rng(0)
        return cls(
            {
                "id": str(index),
                "image": rng.integers(0, 256, (*SIZE, 3), np.uint8),
                "label": rng.choice(np.array([0, 1, 2, 255], np.uint8), SIZE),
            }
            for index in range(2 * COPIES)
        )

    def ids(self) -> list[str]:
        return [record["id"] for record in self]

    def images_only(self) -> "InMemory":
        return type(self)({name: record[name] for name in ("id", "image")} for record in self)


MODEL = Pixelwise(len(CLASSES))
METHOD = object()  # a method without its own predict
CONFIG = {
    "preprocess": "imagenet",
    "align_corners": True,
    "seed": 0,
    "source": {"resize": SIZE[::-1]},
    "target": {"resize": SIZE[::-1]},
    "evaluation": {"size": SIZE[::-1], "batch": 2},
    "projection": "none",
    "margin": 0.1,
    "normalise_for_labels": True,
    "source_images": 6,
    "target_images": 6,
    "threshold_cap": 0.9,
    "favour_rare": False,
    "easy_share": 0.5,
}


def _run(sweep: Any, records: InMemory, config: ConfigDict, folder: Path) -> Path:
    sweep.run(
        {}, Domains(records, records), folder, model=MODEL, method=METHOD, config=config,
        devices=jax.devices()[:1], say=lambda text: None,
    )  # fmt: skip
    return folder


def _evaluate(records: InMemory, config: ConfigDict, folder: Path) -> list[Any]:
    confusion, figures, _ = make_evaluator(MODEL, METHOD, config, jax.devices()[:1])({}, records)
    return [confusion / confusion.sum(), np.array(list(figures.values()))]


def _class_statistics(records: InMemory, config: ConfigDict, folder: Path) -> list[Any]:
    found = class_statistics.collect({}, records, model=MODEL, config=config, devices=jax.devices()[:1])
    return jax.tree.leaves(found)


def _prototypes(records: InMemory, config: ConfigDict, folder: Path) -> list[Any]:
    with np.load(_run(prototypes, records, config, folder) / FILE) as arrays:
        return [arrays["source"], arrays["target"]]


def _pseudo_labels(records: InMemory, config: ConfigDict, folder: Path) -> list[Any]:
    paths = sorted((_run(pseudo_label, records, config, folder) / "labels").iterdir())
    maps = np.stack([encoding.read_label_file(path.read_bytes()) for path in paths])
    assert 0.1 < np.mean(maps == 255) < 0.9
    return [maps]


def _entropy_rank(records: InMemory, config: ConfigDict, folder: Path) -> list[Any]:
    lines = (_run(entropy_rank, records, config, folder) / entropy_rank.SCORES).read_text().split()[1:]
    return [np.array([float(line.split(",")[1]) for line in lines])]


def _target_classes(records: InMemory, config: ConfigDict, folder: Path) -> list[Any]:
    found = json.loads((_run(target_classes, records, config, folder) / target_classes.FILE).read_text())
    return [np.array(list(found["images"].values()))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sweep", [_evaluate, _class_statistics, _prototypes, _pseudo_labels, _entropy_rank, _target_classes]
)
def test_sweeps(sweep: Callable, tmp_path: Path) -> None:
    records, results = InMemory.draw(), []
    for name, batch in (("one by one", 2), ("compiled", 2), ("more at a time", 2 * COPIES)):
        config = ConfigDict(CONFIG)
        config.evaluation.batch = batch
        (tmp_path / name).mkdir()
        with jax.disable_jit(name == "one by one"):
            results.append(sweep(records, config, tmp_path / name))
    for found in results[1:]:
        for ours, expected in zip(found, results[0], strict=True):
            same(ours, expected)


def test_relations_of_regions() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), (2, 4 * SIZE[0], 4 * SIZE[1]))
    regions = cut_regions(labels, SIZE, 1)
    relations = Relations(rng.random((5, len(CLASSES) + 16)).astype(np.float32), np.full(5, 1.5, np.float32))
    expected = label_regions(regions, relations, len(CLASSES))
    assert 0.1 < np.mean(expected == 255) < 0.9 and len(np.unique(expected)) > 2
    same(jax.jit(label_regions, static_argnums=2)(regions, relations, len(CLASSES)), expected)
