"""Scores on the published benchmarks: those of the Cityscapes scripts, and by hand for 16, 13 and 7 classes.

Images contain the prediction: the class of a pixel is its red value divided by ten.
"""

import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import minent
from jaxuda.data import servers
from jaxuda.data.datasets.cityscapes import CLASSES
from jaxuda.data.labels import label_space
from jaxuda.data.records import load
from jaxuda.metrics import iou, iou_table, mean_iou
from jaxuda.prepare import prepare
from jaxuda.sweeps.evaluate import Evaluation, make_evaluator
from jaxuda.sweeps.predict import ImageFiles, predictions, write_predictions

NAN = np.nan


def painted(variables, images, *, model, config) -> jax.Array:
    """Probabilities (N, h, w, C): high for the painted class, low for the others."""
    red = (images[..., 0] * 0.229 + 0.485) * 255
    return 0.9 * jax.nn.one_hot(jnp.round(red / 10).astype(int), model.num_classes) + 0.1 / model.num_classes


def network(classes: int, size: tuple[int, int], **evaluation) -> dict:
    config = {"evaluation": {"size": size, "batch": 2, **evaluation}, "preprocess": "imagenet", "align_corners": True}
    return {
        "model": SimpleNamespace(num_classes=classes),
        "method": SimpleNamespace(predict=painted),
        "config": ConfigDict(config),
    }


def paint(file: Path, classes: np.ndarray) -> None:
    """Writes an image that is predicted as `classes` (H, W)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    red = np.stack([10 * classes, 0 * classes, 0 * classes], -1).astype(np.uint8)
    Image.fromarray(red).save(file, quality=100, subsampling=0)


def score(name: str, split: str, space: str, data_dir: Path, size: tuple[int, int], **evaluation) -> Evaluation:
    records = load(name, split, data_dir=data_dir, label_space=space)
    evaluate = make_evaluator(
        **network(label_space(space).num_classes, size, **evaluation), devices=jax.local_devices()[:1]
    )
    return evaluate({}, records)


def test_nineteen_classes_as_the_cityscapes_scripts(tmp_path: Path) -> None:
    scripts = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    source, rng, size = layouts.cityscapes(tmp_path / "source", (64, 32)), np.random.default_rng(0), (64, 32)
    raw = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])
    for file in sorted((source / "leftImg8bit" / "val").rglob("*.png")):
        label = Path(str(file).replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit", "_gtFine_labelIds"))
        # Half of the pixels are correct; class 9 is neither labelled nor predicted, 16 labelled but never predicted.
        truth = rng.choice(np.delete(np.arange(19), 9), size[::-1])
        guess = np.where(rng.random(truth.shape) < 0.5, truth, rng.choice(np.delete(np.arange(19), 9), size[::-1]))
        void = rng.random(truth.shape) < 0.2
        layouts.grey(label, np.where(void, rng.integers(0, 7, truth.shape), raw[truth]).astype(np.uint8))
        paint(file, np.where(guess == 16, 0, guess))
    prepare("cityscapes", manual_dir=source, data_dir=tmp_path)
    evaluation = score("cityscapes", "val", "cityscapes19", tmp_path, size)

    found = ImageFiles(str(source / "leftImg8bit" / "val"))
    written = write_predictions(predictions({}, found, **network(19, size)), tmp_path, label_space("cityscapes19"))
    assert [folder.name for folder in written] == ["colour", "ids", "cityscapes_ids"]
    truths = sorted((source / "gtFine" / "val").rglob("*labelIds.png"))
    guesses = sorted((tmp_path / "cityscapes_ids").iterdir())
    # As the test server finds them: CITY_SEQUENCE_FRAME*.png.
    assert [f.name.split("_leftImg8bit")[0] for f in guesses] == [t.name.split("_gtFine")[0] for t in truths]
    arguments = scripts.args
    arguments.evalInstLevelScore, arguments.JSONOutput, arguments.quiet = False, False, True
    theirs = scripts.evaluateImgLists([str(g) for g in guesses], [str(t) for t in truths], arguments)

    space = label_space("cityscapes19")
    names = {"light": "traffic light", "sign": "traffic sign"}
    expected = [theirs["classScores"][names.get(name, name)] for name in space.classes]
    np.testing.assert_allclose(iou(evaluation.confusion), expected, rtol=0, atol=1e-9)
    assert mean_iou(evaluation.confusion) == pytest.approx(theirs["averageScoreClasses"], abs=1e-9)
    assert np.isnan(expected[9]) and expected[16] == 0 and 0.2 < np.nanmean(expected) < 0.6


def test_conditions_add_up_and_what_the_server_gets_scores_as_the_scripts(tmp_path: Path, monkeypatch) -> None:
    scripts = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    source, rng, size = layouts.acdc(tmp_path / "source", (64, 32)), np.random.default_rng(0), (64, 32)
    raw, images = np.array([*CLASSES]), sorted((source / "rgb_anon").glob("*/val/*/*.png"))
    labels = [Path(str(file).replace("rgb_anon", "gt", 1).replace("rgb_anon", "gt_labelIds")) for file in images]
    for file, label in zip(images, labels, strict=True):
        truth = rng.choice(19, size[::-1])
        void = rng.random(truth.shape) < 0.2
        layouts.grey(label, np.where(void, 0, raw[truth]).astype(np.uint8))
        train = np.where(void, 255, truth).astype(np.uint8)
        layouts.grey(label.with_name(label.name.replace("labelIds", "labelTrainIds")), train)
        paint(file, np.where(rng.random(truth.shape) < 0.5, truth, rng.choice(19, truth.shape)))
    prepare("acdc", manual_dir=source, data_dir=tmp_path)
    config = minent.get_config("acdc")
    together = score(config.target.name, "val", "cityscapes19", tmp_path, size)
    whole, rows = together.confusion, together.parts
    assert list(rows) == [f"acdc/{condition} val" for condition in layouts.ACDC]
    for name, row in rows.items():
        alone = score(name.removesuffix(" val"), "val", "cityscapes19", tmp_path, size)
        assert row.summary() == alone.summary() and row.confusion.sum() and not alone.parts
    np.testing.assert_array_equal(sum(row.confusion for row in rows.values()), whole)
    means = {name: np.mean([row.figures[name] for row in rows.values()]) for name in ("entropy", "snd")}
    assert {name: together.figures[name] for name in means} == pytest.approx(means)

    found = ImageFiles(f"{source}/rgb_anon/*/val/*/*.png")
    write_predictions(predictions({}, found, **network(19, size)), tmp_path, label_space("cityscapes19"))
    monkeypatch.setitem(servers.SERVERS, "acdc", servers.SERVERS["acdc"]._replace(size=size))
    servers.pack("acdc", tmp_path / "cityscapes_ids", found.names(), tmp_path / "acdc.zip")
    with zipfile.ZipFile(tmp_path / "acdc.zip") as archive:
        archive.extractall(tmp_path / "served")
    guesses = []
    for image in images:  # the scripts take raw ids
        served = tmp_path / "served" / "labelTrainIds" / image.name
        layouts.grey(served, raw[np.asarray(Image.open(served))].astype(np.uint8))
        guesses.append(str(served))
    arguments = scripts.args
    arguments.evalInstLevelScore, arguments.JSONOutput, arguments.quiet = False, False, True
    theirs = scripts.evaluateImgLists(guesses, [str(label) for label in labels], arguments)
    assert mean_iou(whole) == pytest.approx(theirs["averageScoreClasses"], abs=1e-9) and 0.2 < mean_iou(whole) < 0.6


def test_sixteen_and_thirteen_classes_by_hand(tmp_path: Path) -> None:
    source, size = layouts.cityscapes(tmp_path / "source", (4, 2)), (4, 2)
    # road road sidewalk fence | terrain truck person person, which is predicted as
    # road sidewalk sidewalk road | road wall person rider
    label, guess = [[7, 7, 8, 13], [22, 27, 24, 24]], {16: [[0, 1, 1, 0], [0, 3, 10, 11]]}
    for file in (source / "leftImg8bit" / "val").rglob("*.png"):
        paint(file, np.array(guess[16]))
    # All splits alike: eight pixels drawn from the layout's first ids alone would be taken for train ids.
    for file in (source / "gtFine").rglob("*labelIds.png"):
        layouts.grey(file, np.array(label, np.uint8))
    prepare("cityscapes", manual_dir=source, data_dir=tmp_path)

    confusion = score("cityscapes", "val", "synthia16", tmp_path, size).confusion
    # Terrain and truck are not classes here: predictions on them are not counted.
    expected = {"road": 1 / 3, "sidewalk": 1 / 2, "fence": 0, "person": 1 / 2, "rider": 0}
    table = dict(zip(label_space("synthia16").classes, iou(confusion), strict=True))
    assert {name: value for name, value in table.items() if not np.isnan(value)} == pytest.approx(expected)
    space = label_space("synthia16")
    text = iou_table({"model": confusion}, space.classes, space.starred)
    assert "mIoU (16)            26.7" in text and "mIoU* (13)           33.3" in text  # * without fence

    # With all 19 outputs terrain and truck are errors of what is predicted there, road and wall; mIoU* leaves out their
    # own rows. The last two pixels are now predicted as sky and person.
    space = label_space("synthia19")
    confusion = score("cityscapes", "val", "synthia19", tmp_path, size).confusion
    found = {name: value for name, value in zip(space.classes, iou(confusion), strict=True) if not np.isnan(value)}
    nothing = dict.fromkeys(("fence", "wall", "terrain", "truck", "sky"), 0)
    assert found == pytest.approx({"road": 1 / 4, "sidewalk": 1 / 2, "person": 1 / 2, **nothing})
    text = iou_table({"model": confusion}, space.classes, space.starred)
    assert "mIoU (19)            15.6" in text and "mIoU* (16)           20.8" in text  # 1.25 / 8 and / 6


def test_thirteen_classes_by_hand(tmp_path: Path) -> None:
    source = tmp_path / "source"
    layouts.image(source / "Rome" / "Images" / "Train" / "a.jpg")
    # building pole vegetation void | car bus bicycle bicycle
    layouts.grey(source / "Rome/Labels/Test/b_eval.png", np.array([[11, 17, 21, 255], [26, 28, 33, 33]], np.uint8))
    # building building building sky | car car bicycle motorcycle
    paint(source / "Rome" / "Images" / "Test" / "b.png", np.array([[2, 2, 2, 6], [9, 9, 12, 11]]))
    prepare("crosscity/rome", manual_dir=source, data_dir=tmp_path)
    confusion = score("crosscity/rome", "test", "crosscity13", tmp_path, (4, 2)).confusion
    expected = [NAN, NAN, 1 / 2, NAN, NAN, 0, NAN, NAN, NAN, 1 / 2, 0, 0, 1 / 2]
    np.testing.assert_allclose(iou(confusion), expected)
    assert mean_iou(confusion) == pytest.approx(1.5 / 6)


def test_seven_classes_by_hand_on_images_of_any_shape(tmp_path: Path) -> None:
    """JPEGs in blocks of 16 pixels, wider and higher than the network's input."""
    source = tmp_path / "source"
    # road curb | person water; bicycle sky | traffic light, unlabelled
    labels = {"wide": [[13, 2, 19, 31]], "high": [[52], [27], [48], [65]]}
    guesses = {"wide": [[0, 0, 5, 3]], "high": [[6], [3], [2], [1]]}
    for name, label in labels.items():
        for folder in ("training", "validation"):
            blocks = np.ones((16, 16), np.uint8)
            layouts.palette(source / folder / "labels" / f"{name}.png", np.kron(np.array(label, np.uint8), blocks))
            paint(source / folder / "images" / f"{name}.jpg", np.kron(np.array(guesses[name]), blocks))
    prepare("mapillary", manual_dir=source, data_dir=tmp_path)
    # At 32x32 each image fills an eighth of the input; the blocks' borders are blurred, hence the tolerance.
    confusion = score("mapillary", "val", "super7", tmp_path, (64, 64), keep_aspect=True).confusion
    assert confusion.sum() == 6 * 256
    expected = [1 / 2, 0, 1, 0, 0, 1, 1]
    np.testing.assert_allclose(iou(confusion), expected, atol=0.15)
    assert abs(mean_iou(confusion) - 3.5 / 7) < 0.05
