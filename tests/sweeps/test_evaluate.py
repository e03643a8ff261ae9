"""Evaluation of mixed sizes, unlabelled images and last batches against a plain computation per image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxuda.data.transforms import resize_image
from jaxuda.metrics import confusion_matrix
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.layers import normalise, resize_bilinear
from jaxuda.sweeps.evaluate import make_evaluator
from jaxuda.sweeps.predict import predictions
from jaxuda.sweeps.scores import resize, resize_matrices

MODEL = DeepLabV2(4, "resnet18", "torchvision", width=8, blocks=(1, 1, 1, 1))
CONFIG = ConfigDict({"evaluation": {"size": (64, 48), "batch": 2}, "preprocess": "imagenet", "align_corners": True})
PLAIN = object()  # a method without its own predict


class Memory(list):
    """Records in memory."""


@pytest.fixture(scope="module")
def variables() -> dict:
    return jax.device_get(MODEL.init(jax.random.key(0), jnp.zeros((1, 48, 64, 3))))


def records(sizes: list[tuple[int, int]], labelled: bool = True) -> Memory:
    rng = np.random.default_rng(0)
    rows = Memory()
    for index, size in enumerate(sizes):
        row = {"id": f"image{index}", "image": rng.integers(0, 256, (48, 64, 3), np.uint8)}
        if labelled:
            row["label"] = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), size)
        rows.append(row)
    return rows


def by_hand(variables: dict, row: dict, size: tuple[int, int], config: ConfigDict = CONFIG) -> np.ndarray:
    width, height = config.evaluation.size
    image = resize_image(row["image"], (width, height), config.evaluation.get("interpolation", "bicubic"))[None]
    logits = MODEL.apply(variables, normalise(image, "imagenet"), train=False).main
    if config.evaluation.get("through_input"):
        logits = resize_bilinear(logits, (height, width), config.align_corners)
    return np.asarray(jnp.argmax(resize_bilinear(logits, size, config.align_corners), -1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_mixed_sizes_equal_one_by_one(variables: dict, devices: int) -> None:
    rows = records([(48, 64), (50, 70), (31, 33)])
    evaluation = make_evaluator(MODEL, PLAIN, CONFIG, jax.local_devices()[:devices])(variables, rows)
    expected = sum(confusion_matrix(row["label"], by_hand(variables, row, row["label"].shape), 4) for row in rows)
    np.testing.assert_array_equal(evaluation.confusion, expected)
    assert evaluation.confusion.sum() == sum((row["label"] != 255).sum() for row in rows)


def test_scores_go_through_the_input_of_each_pass() -> None:
    """Of another size than `evaluation.size` where inputs are scaled, and with the border of a kept aspect."""
    evaluation = {"size": (64, 48), "keep_aspect": True, "through_input": True}
    config = ConfigDict({"align_corners": False, "evaluation": evaluation})
    found = resize_matrices((6, 8), [(30, 80)], config, size=(32, 24))
    scores = np.random.default_rng(0).random((1, 6, 8, 2), np.float32)
    at_input = resize_bilinear(scores, (24, 32), align_corners=False)
    canvas = resize_bilinear(at_input, (60, 80), align_corners=False)
    np.testing.assert_allclose(resize(scores, *found)[:, :30, :80], canvas[:, :30], atol=1e-5)


def test_figures_without_labels_do_not_count_the_filling(variables: dict) -> None:
    evaluate = make_evaluator(MODEL, PLAIN, CONFIG, jax.local_devices()[:1])
    rows = records([(48, 64)] * 3, labelled=False)
    three = evaluate(variables, rows)
    assert three.confusion is None and set(three.summary()) == {"entropy", "diversity", "snd"}
    singles = [evaluate(variables, Memory([row])).figures for row in rows]
    for name in ("entropy", "snd"):
        assert three.figures[name] == pytest.approx(np.mean([single[name] for single in singles]), rel=1e-5)
    assert 0 < three.figures["entropy"] <= 1 and 0 < three.figures["diversity"] <= 1


def test_predictions_have_each_image_own_size(variables: dict) -> None:
    rows = records([(48, 64)] * 3)
    rows[1]["image"] = rows[1]["image"][:31, :45]
    found = dict(predictions(variables, rows, model=MODEL, method=PLAIN, config=CONFIG))
    assert list(found) == ["image0", "image1", "image2"]
    for row in rows:
        np.testing.assert_array_equal(found[row["id"]], by_hand(variables, row, row["image"].shape[:2]))


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"interpolation": "opencv"}, {"through_input": True}])
def test_fields_of_other_evaluations(variables: dict, changed: dict) -> None:
    """The published evaluations of self-training: OpenCV's resize, logits at the input's size before the label's."""
    config = ConfigDict({**CONFIG.to_dict(), "align_corners": False})
    config.evaluation = {"size": (40, 24), "batch": 2, **changed}
    rows = records([(96, 128), (90, 120), (31, 33)])
    found = make_evaluator(MODEL, PLAIN, config, jax.local_devices()[:1])(variables, rows).confusion
    maps = [by_hand(variables, row, row["label"].shape, config) for row in rows]
    expected = sum(confusion_matrix(row["label"], each, 4) for row, each in zip(rows, maps, strict=True))
    # The two resizes are one product of matrices here: rounding may decide between two equal classes.
    assert np.abs(found - expected).sum() <= 4
    del config.evaluation[next(iter(changed))]
    without = [by_hand(variables, row, row["label"].shape, config) for row in rows]
    assert sum((one != other).sum() for one, other in zip(maps, without, strict=True)) > 20
