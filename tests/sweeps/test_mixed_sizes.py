"""Sweeps over a target whose images keep their aspect: the padding to the network's input is never counted.

Instead of a network, the red value of a pixel divided by ten is its class, and its green value the confidence.
Every sweep is compared with the result for each image alone, without padding.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image

from jaxuda.data.labels import label_space
from jaxuda.data.records import Domains
from jaxuda.data.transforms import fitted_size, resize_image
from jaxuda.inference.predictor import Predictor
from jaxuda.losses.entropy import entropy_map
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.sweeps import entropy_rank, prototypes, pseudo_label, target_classes
from jaxuda.sweeps.evaluate import make_evaluator
from jaxuda.sweeps.predict import predictions
from jaxuda.sweeps.scores import image_masks
from jaxuda.sweeps.thresholds import class_thresholds, confidence_histogram

pytestmark = pytest.mark.usefixtures("all_optimizations")  # rounding decides between two classes

SPACE = label_space("super7")
SIZE = (32, 24)
IMAGES = {"wide": (12, 64), "high": (40, 10), "same": (24, 32), "large": (60, 48), "small": (9, 15)}  # height, width


def config(**changes) -> ConfigDict:
    evaluation = {"size": SIZE, "batch": 2, "keep_aspect": True, **changes.pop("evaluation", {})}
    fields = {"preprocess": "imagenet", "align_corners": True, "easy_share": 0.5, "favour_rare": False}
    return ConfigDict({"evaluation": evaluation, "threshold_cap": 0.9, **fields, **changes})


class Memory(list):
    name, label_space, labelled = "a target of many sizes", SPACE, False

    def ids(self) -> list[str]:
        return [record["id"] for record in self]

    def images_only(self) -> "Memory":
        return self


def target() -> Memory:
    rng, records = np.random.default_rng(0), Memory()
    for name, size in IMAGES.items():
        # Large areas, so that resizing does not change most pixels; never black, as the padding is.
        areas = np.stack([10 * rng.integers(0, 7, (3, 3)), rng.integers(40, 256, (3, 3)), np.zeros((3, 3), int)], -1)
        rows, columns = np.arange(size[0]) * 3 // size[0], np.arange(size[1]) * 3 // size[1]
        records.append({"id": name, "image": areas[rows[:, None], columns].astype(np.uint8)})
    return records


def drawn(variables, images, *, model, config) -> jax.Array:
    """Probabilities at the resolution of the images."""
    colours = images * jnp.array([0.229, 0.224, 0.225]) + jnp.array([0.485, 0.456, 0.406])
    red, green = colours[..., 0] * 255, colours[..., 1:2]
    classes = jax.nn.one_hot(jnp.clip(jnp.round(red / 10), 0, 6).astype(int), 7)
    confidence = 0.2 + 0.75 * green
    return confidence * classes + (1 - confidence) * (1 - classes) / 6


METHOD = SimpleNamespace(predict=drawn)


def alone(record: dict, within: tuple[int, int] = SIZE) -> np.ndarray:
    """Probabilities (h, w, 7) of an image at the size that it has in the network's input."""
    height, width = record["image"].shape[:2]
    image = resize_image(record["image"], fitted_size((width, height), within))
    normalised = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return np.asarray(drawn(None, jnp.asarray(normalised, jnp.float32), model=None, config=None))


def run(sweep, folder: Path, devices: int = 1, **changes) -> None:
    sweep.run(
        {}, Domains(SimpleNamespace(label_space=SPACE), target()), folder,
        model=SimpleNamespace(num_classes=7), method=METHOD, config=config(**changes),
        devices=jax.local_devices()[:devices], say=lambda text: None,
    )  # fmt: skip


def test_ranking(tmp_path: Path) -> None:
    run(entropy_rank, tmp_path, devices=2)
    rows = dict(line.split(",") for line in (tmp_path / "scores.csv").read_text().splitlines()[1:])
    expected = {record["id"]: float(jnp.mean(entropy_map(alone(record)))) for record in target()}
    assert {name: float(value) for name, value in rows.items()} == pytest.approx(expected, rel=1e-4)
    order = (tmp_path / "easy.txt").read_text().split() + (tmp_path / "hard.txt").read_text().split()
    assert order == sorted(expected, key=expected.get)


def test_thresholds_and_pseudo_labels(tmp_path: Path) -> None:
    run(pseudo_label, tmp_path)
    histogram = sum(np.asarray(confidence_histogram(alone(record)), np.int64) for record in target())
    expected = class_thresholds(histogram, 0.9)
    found = json.loads((tmp_path / "thresholds.json").read_text())
    np.testing.assert_allclose([found[name] for name in SPACE.classes], expected, atol=0.01)
    assert len(set(expected)) > 4
    for record in target():
        ids = np.asarray(Image.open(tmp_path / "labels" / f"{record['id']}.png"))
        assert ids.shape == record["image"].shape[:2]
        sure = ids != 255
        assert sure.mean() > 0.2 and np.mean((record["image"][..., 0] // 10 == ids)[sure]) > 0.7


def test_classes_seen_in_the_target(tmp_path: Path) -> None:
    run(target_classes, tmp_path)
    found = json.loads((tmp_path / "target_classes.json").read_text())["images"]
    for record in target():
        predicted = alone(record).argmax(-1)
        shares = [np.mean(predicted == index) for index in range(7)]
        np.testing.assert_allclose(found[record["id"]], shares, atol=0.005)  # rounding decides between two classes


@pytest.mark.slow
def test_figures_without_labels() -> None:
    small = (16, 12)  # so few pixels that the density uses all of them
    settings = config(evaluation={"size": small})
    evaluate = make_evaluator(SimpleNamespace(num_classes=7), METHOD, settings, jax.local_devices()[:2])
    found, singles = evaluate({}, target()).figures, []
    for record in target():
        height, width = record["image"].shape[:2]
        size = fitted_size((width, height), small)
        filled = config(evaluation={"size": size, "keep_aspect": False, "batch": 1})
        one = make_evaluator(SimpleNamespace(num_classes=7), METHOD, filled, jax.local_devices()[:1])
        singles.append(one({}, Memory([record])).figures)
    for name in ("entropy", "snd"):
        assert found[name] == pytest.approx(np.mean([single[name] for single in singles]), rel=1e-4)
    means = np.mean([alone(record, small).mean((0, 1)) for record in target()], 0)
    assert found["diversity"] == pytest.approx(-np.sum(means * np.log(means)) / np.log(7), rel=1e-4)


def test_masks_follow_the_images() -> None:
    batch = {"image": np.zeros((3, 24, 32, 3)), "size": [(12, 64), (40, 10)]}
    masks = image_masks(batch, SIZE, fit=True)
    assert [mask.sum() for mask in masks] == [6 * 32, 24 * 6, 0] and masks[0, :6].all() and masks[1, :, :6].all()
    assert [mask.sum() for mask in image_masks(batch, SIZE, fit=True, grid=(3, 4))] == [4, 3, 0]
    assert [mask.sum() for mask in image_masks(batch, SIZE, fit=False, grid=(3, 4))] == [12, 12, 0]


def test_prototypes(tmp_path: Path) -> None:
    """A black half of the network's input must not become part of a prototype."""
    features = jnp.concatenate([jnp.ones((1, 24, 16, 2)), jnp.full((1, 24, 16, 2), 5.0)], 2)
    shown = image_masks({"size": [(24, 16)], "image": np.zeros((1, 24, 32, 3))}, SIZE, fit=True)
    sums, used, pixels = prototypes._sums(features, jnp.zeros((1, 24, 32), jnp.int32), jnp.asarray(shown), 3)
    assert used == pixels == 24 * 16
    np.testing.assert_allclose(sums[0] / np.linalg.norm(sums[0]), np.full(2, 0.5**0.5), rtol=1e-6)
    with_all, _, _ = prototypes._sums(features, jnp.zeros((1, 24, 32), jnp.int32), jnp.ones((1, 24, 32), bool), 3)
    assert not np.allclose(with_all, sums)


@pytest.mark.slow
def test_prediction_from_python_is_that_of_the_command_line() -> None:
    model = DeepLabV2(7, "resnet18", "torchvision", width=8, blocks=(1, 1, 1, 1))
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 24, 32, 3))))
    settings = config(train="source_only", label_space="super7")
    predictor = Predictor(SPACE.classes, model, variables, FrozenConfigDict(settings))
    images = target()[:2]
    found = dict(predictions(variables, images, model=model, method=object(), config=settings))
    for record in images:
        labels, _ = predictor.predict(record["image"])
        assert labels.shape == record["image"].shape[:2] and np.mean(labels == found[record["id"]]) > 0.999
