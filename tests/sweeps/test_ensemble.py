"""Averages over networks, scales and mirrored images, and images that keep their aspect, against plain loops."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxuda.data.labels import label_space
from jaxuda.data.transforms import resize_image
from jaxuda.errors import UserError
from jaxuda.metrics import confusion_matrix
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.layers import normalise, resize_bilinear
from jaxuda.sweeps.ensemble import Ensemble, Member
from jaxuda.sweeps.evaluate import make_ensemble_evaluator
from jaxuda.sweeps.predict import ImageFiles, ensemble_predictions, write_predictions

MODEL = DeepLabV2(4, "resnet18", "torchvision", width=8, blocks=(1, 1, 1, 1))
PLAIN = object()  # a method without its own predict


def config(size=(64, 48), preprocess="imagenet", **evaluation) -> ConfigDict:
    return ConfigDict(
        {"evaluation": {"size": size, "batch": 2, **evaluation}, "preprocess": preprocess, "align_corners": True}
    )


@pytest.fixture(scope="module")
def variables() -> list[dict]:
    init = jax.jit(lambda key: MODEL.init(key, jnp.zeros((1, 48, 64, 3)), train=False))
    return [jax.device_get(init(jax.random.key(seed))) for seed in (0, 1)]


def records(sizes: list[tuple[int, int]]) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "id": f"image{index}",
            "image": rng.integers(0, 256, (*size, 3), np.uint8),
            "label": rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), size),
        }
        for index, size in enumerate(sizes)
    ]


@jax.jit
def logits(variables: dict, images: jax.Array) -> jax.Array:
    return MODEL.apply(variables, images, train=False).main


def by_hand(variables, image, settings, size, flip=False) -> np.ndarray:
    """Logits at the image's own size, with the image shown at `size`."""
    shown = resize_image(image, size)[None]
    shown = shown[:, :, ::-1] if flip else shown
    result = logits(variables, normalise(shown, settings.preprocess))
    result = result[:, :, ::-1] if flip else result
    return np.asarray(resize_bilinear(result, image.shape[:2], align_corners=True))[0]


def softmax(values: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.softmax(values))


def test_weighted_classes(variables: list[dict]) -> None:
    """The probabilities are multiplied at the size of the network's input, then they get the image's own size."""
    settings, weights, rows = config(), (0.5, 1.0, 1.0, 2.0), records([(48, 64), (100, 140)])
    ensemble = Ensemble([Member(MODEL, PLAIN, settings)], class_weights=weights)
    plain = Ensemble([Member(MODEL, PLAIN, settings)])
    confusion, changed = 0, 0
    for row in rows:
        shown = resize_image(row["image"], settings.evaluation.size)[None]
        scores = resize_bilinear(logits(variables[0], normalise(shown, "imagenet")), (48, 64), align_corners=True)
        probs = softmax(scores) * np.array(weights)
        expected = np.asarray(resize_bilinear(probs, row["label"].shape, align_corners=True)[0].argmax(-1))
        (_, found), (_, unweighted) = (
            next(iter(ensemble_predictions(each, variables[:1], [row]))) for each in (ensemble, plain)
        )
        assert np.mean(found == expected) > 0.999  # rounding may decide pixels between two classes
        changed += np.sum(found != unweighted)
        confusion += np.asarray(confusion_matrix(row["label"], expected, 4))
    assert changed > 100
    evaluate = make_ensemble_evaluator(ensemble, jax.local_devices()[:1])
    scored = evaluate(variables[:1], rows).confusion
    assert scored.sum() == confusion.sum() and np.abs(scored - confusion).sum() < 10


@pytest.mark.slow
def test_two_networks_average_their_logits(variables: list[dict]) -> None:
    settings = [config(), config((48, 32), "caffe")]
    members = [Member(MODEL, PLAIN, s, w) for s, w in zip(settings, (3.0, 1.0), strict=True)]
    rows = records([(48, 64), (50, 70), (31, 33)])
    expected = []
    for row in rows:
        mean = sum(
            w / 4 * by_hand(v, row["image"], s, s.evaluation.size)
            for v, s, w in zip(variables, settings, (3, 1), strict=True)
        )
        expected.append(mean.argmax(-1))
    found = dict(ensemble_predictions(Ensemble(members), variables, rows))
    assert list(found) == ["image0", "image1", "image2"]
    for row, ids in zip(rows, expected, strict=True):
        assert np.mean(found[row["id"]] == ids) > 0.999  # rounding decides where two classes are equal
    evaluate = make_ensemble_evaluator(Ensemble(members), jax.local_devices()[:2])
    evaluation = evaluate(variables, rows)
    sums = sum(np.asarray(confusion_matrix(row["label"], found[row["id"]], 4)) for row in rows)
    np.testing.assert_array_equal(evaluation.confusion, sums)
    assert evaluation.figures == {}
    alone = dict(ensemble_predictions(Ensemble(members[:1]), variables[:1], rows))
    assert any(np.any(alone[name] != found[name]) for name in found)


def test_scales_and_mirrored_images_average_probabilities(variables: list[dict]) -> None:
    ensemble = Ensemble([Member(MODEL, PLAIN, config())], flip=True, scales=(0.5, 1.0))
    (row,) = records([(50, 70)])
    views = [
        softmax(by_hand(variables[0], row["image"], config(), size, flip))
        for size in ((32, 24), (64, 48))
        for flip in (False, True)
    ]
    ((_, ids),) = ensemble_predictions(ensemble, variables[:1], [row])
    assert np.mean(ids == np.mean(views, 0).argmax(-1)) > 0.999
    assert np.mean(ids == views[2].argmax(-1)) < 0.999


def test_images_that_keep_their_aspect(variables: list[dict]) -> None:
    """The image is at the top left of a canvas with the input's aspect; its scores are cut out of the canvas."""
    settings = config((64, 48), keep_aspect=True)
    rows = records([(30, 80), (48, 20)])
    found = dict(ensemble_predictions(Ensemble([Member(MODEL, PLAIN, settings)]), variables[:1], rows))
    shown = {"image0": (64, 24), "image1": (20, 48)}  # width, height within 64x48
    whole = {"image0": (60, 80), "image1": (48, 64)}  # height, width of the canvas at the image's own scale
    for row in rows:
        width, height = shown[row["id"]]
        canvas = np.zeros((1, 48, 64, 3), np.uint8)
        canvas[0, :height, :width] = resize_image(row["image"], (width, height))
        scores = resize_bilinear(logits(variables[0], normalise(canvas, "imagenet")), whole[row["id"]], True)
        rows_, columns = row["image"].shape[:2]
        expected = np.asarray(scores.argmax(-1))[0, :rows_, :columns]
        assert found[row["id"]].shape == expected.shape and np.mean(found[row["id"]] == expected) > 0.999


def test_images_of_a_folder_and_their_names(tmp_path: Path) -> None:
    for name in ("rome/a.png", "rome/b.JPG", "oslo/deep/c.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / name)
    (tmp_path / "rome" / "notes.txt").write_text("")
    assert [record["id"] for record in list(ImageFiles(str(tmp_path)))] == ["c", "a", "b"]
    Image.new("RGB", (4, 4)).save(tmp_path / "oslo" / "a.png")
    assert [record["id"] for record in list(ImageFiles(str(tmp_path)))] == [
        "oslo__a",
        "oslo__deep__c",
        "rome__a",
        "rome__b",
    ]
    Image.new("RGB", (4, 4)).save(tmp_path / "oslo" / "a.jpg")
    assert ImageFiles(str(tmp_path / "oslo"))[0]["id"] == "a.jpg"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"matches no file \(\.jpg"):
        ImageFiles(str(tmp_path / "empty"))


def test_predictions_are_written_with_raw_ids(tmp_path: Path) -> None:
    ids = np.array([[0, 5, 15]], np.uint8)
    for space, raw in (("cityscapes19", [7, 17, 28]), ("synthia16", [7, 17, 33]), ("super7", None)):
        folder = tmp_path / space
        written = write_predictions([("x", ids[:, :2] if raw is None else ids)], folder, label_space(space))
        assert (folder / "cityscapes_ids" in written) == (raw is not None)
        if raw:
            np.testing.assert_array_equal(np.asarray(Image.open(folder / "cityscapes_ids" / "x.png")), [raw])
        np.testing.assert_array_equal(
            np.asarray(Image.open(folder / "colour" / "x.png"))[0, 0], label_space(space).palette[0]
        )
