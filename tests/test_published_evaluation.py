"""Scoring and labelling on the published benchmarks through the command line, on small folders in their layouts.

A network with random weights comes from a torch file; the scores that `--mode eval` prints must equal those computed
from the files of `--mode predict` and the published label files.
"""

import re
from pathlib import Path

import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as scripts
import layouts
import numpy as np
import pytest
from golden_weights import random_variables
from PIL import Image

from jaxuda import convert
from jaxuda.cli import MISTAKE
from jaxuda.data.datasets.cityscapes import CLASSES
from jaxuda.data.datasets.mapillary import CATEGORIES
from jaxuda.data.labels import label_space, lookup_table
from jaxuda.interop import save_torch
from jaxuda.main import main
from jaxuda.metrics import confusion_matrix, iou
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.prepare import prepare

ROOT = Path(__file__).parents[1]
FULL = (2048, 1024)


def converted(benchmark: str, classes: int, folder: Path, seed: int = 0) -> str:
    """A folder like that of a finished stage, with a small network of random weights."""
    model = DeepLabV2(classes, backbone="resnet18", variant="torchvision", width=8)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(seed)
    head = variables["params"]["head"]  # so that no class covers everything
    head |= {name: rng.normal(size=array.shape).astype(np.float32) for name, array in head.items()}
    save_torch(variables, model, folder.with_suffix(".pth"))
    fields = {"backbone": "resnet18", "variant": "torchvision", "width": 8, "aux": False}
    words = [f"--config.model.{name}={value}" for name, value in fields.items()]
    words += [f"--config=configs/advent.py:{benchmark}", f"--out={folder}"]
    assert convert.main([str(folder.with_suffix(".pth")), *words]) == 0
    return str(folder)


def command(benchmark: str, data_dir: Path, checkpoint: str, *more: str) -> list[str]:
    words = [f"--config=configs/advent.py:{benchmark}", f"--config.data_dir={data_dir}", f"--checkpoint={checkpoint}"]
    return ["jaxuda", *words, *more]


def compare(words: list[str], images: Path, truths: dict[str, np.ndarray], space: str, tmp_path: Path, capsys) -> str:
    """Runs both modes; the printed table must equal that of the written ids and the true ids (by image name)."""
    classes = label_space(space).classes
    assert main([*words, "--mode=predict", f"--images={images}", f"--workdir={tmp_path}"]) == 0
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    files = sorted((tmp_path / "predictions" / "ids").iterdir())
    assert len(files) == len(truths)
    for file in files:
        guess, truth = np.asarray(Image.open(file)), truths[file.stem]
        assert guess.shape == truth.shape
        np.add.at(confusion, (truth[truth != 255], guess[truth != 255]), 1)
    assert np.count_nonzero(confusion.sum(0)) > 1
    capsys.readouterr()
    assert main([*words, "--mode=eval"]) == 0
    text = capsys.readouterr().out
    for name, value in zip(classes, 100 * iou(confusion), strict=True):
        (found,) = re.findall(rf"^{name} +(\S+)$", text, re.MULTILINE)
        assert found == "-" if np.isnan(value) else float(found) == pytest.approx(value, abs=0.11), name
    return text


def cityscapes_truths(source: Path, space: str) -> dict[str, np.ndarray]:
    table = lookup_table("cityscapes", label_space(space))
    files = (source / "gtFine" / "val").rglob("*_labelIds.png")
    return {f.name.replace("gtFine_labelIds.png", "leftImg8bit"): table[np.asarray(Image.open(f))] for f in files}


def by_the_scripts(source: Path, predictions: Path, monkeypatch) -> dict[str, float]:
    """The scores of the Cityscapes scripts for written predictions: class -> IoU in percent, and "mean".

    They find the prediction of each label by its name. They call numpy.in1d, which numpy 2.4 removed; this is what it
    was: numpy.isin, flattened.
    """
    if not hasattr(np, "in1d"):
        monkeypatch.setattr(np, "in1d", lambda *args, **more: np.isin(*args, **more).ravel(), raising=False)
    args = scripts.args
    for name, value in {"predictionPath": str(predictions), "predictionWalk": None, "quiet": True}.items():
        monkeypatch.setattr(args, name, value)
    monkeypatch.setattr(args, "JSONOutput", False)
    labels = sorted(map(str, (source / "gtFine" / "val").rglob("*_gtFine_labelIds.png")))
    found = scripts.evaluateImgLists([scripts.getPrediction(args, label) for label in labels], labels, args)
    scores = found["classScores"] | {"mean": found["averageScoreClasses"]}
    return {name: 100 * score for name, score in scores.items()}


@pytest.mark.slow
def test_cityscapes_at_its_published_size(tmp_path: Path, capsys, monkeypatch) -> None:
    """19 classes, input of 1024x512, scores at 2048x1024, as the Cityscapes scripts give; files for the test server."""
    source = layouts.cityscapes(tmp_path / "source")
    name = "frankfurt/frankfurt_000000_000019"  # the only one of that size
    layouts.image(source / "leftImg8bit" / "val" / f"{name}_leftImg8bit.png", FULL)
    label = np.kron(layouts.ids(range(34), (32, 16)), np.ones((64, 64), np.uint8))
    layouts.grey(source / "gtFine" / "val" / f"{name}_gtFine_labelIds.png", label)
    instances = np.where(label == 26, 26001, label).astype(np.uint16)
    Image.fromarray(instances).save(source / "gtFine" / "val" / f"{name}_gtFine_instanceIds.png")
    prepare("cityscapes", manual_dir=source, data_dir=tmp_path)  # but not GTA5, which is not needed
    words = command("gta5", tmp_path, converted("gta5", 19, tmp_path / "network"))
    truths = cityscapes_truths(source, "cityscapes19")
    assert (1024, 2048) in [truth.shape for truth in truths.values()]
    text = compare(words, source / "leftImg8bit" / "val", truths, "cityscapes19", tmp_path, capsys)
    assert "mIoU (19)" in text and "on cityscapes val\n" in text

    theirs = by_the_scripts(source, tmp_path / "predictions" / "cityscapes_ids", monkeypatch)
    ours = {
        name: re.findall(rf"^{re.escape(name)} +(\S+)$", text, re.MULTILINE)
        for name in [*CLASSES.values(), "mIoU (19)"]
    }
    for name, (score,) in ours.items():
        key = {"light": "traffic light", "sign": "traffic sign", "mIoU (19)": "mean"}.get(name, name)
        assert float(score) == pytest.approx(theirs[key], abs=0.051), name
    assert theirs["mean"] > 0
    pairs = [(truth, tmp_path / "predictions" / "ids" / f"{name}.png") for name, truth in truths.items()]
    exact = iou(sum(confusion_matrix(truth, np.asarray(Image.open(file)), 19) for truth, file in pairs))
    assert 100 * np.nanmean(exact) == pytest.approx(theirs["mean"], rel=1e-6)

    for name in truths:
        ids, raw, colour = (
            np.asarray(Image.open(tmp_path / "predictions" / kind / f"{name}.png"))
            for kind in ("ids", "cityscapes_ids", "colour")
        )
        np.testing.assert_array_equal(lookup_table("cityscapes", "cityscapes19")[raw], ids)
        np.testing.assert_array_equal(colour, label_space("cityscapes19").palette[ids])


@pytest.mark.slow
def test_cityscapes_by_an_ensemble_mirrored_and_scaled(tmp_path: Path, capsys) -> None:
    """16 classes and mIoU* over 13; two networks, weighted."""
    source = layouts.cityscapes(tmp_path / "source", (64, 32))
    prepare("cityscapes", manual_dir=source, data_dir=tmp_path)
    first, second = (converted("synthia", 16, tmp_path / f"network{seed}", seed) for seed in (0, 1))
    averaged = ["--config.test.flip=True", "--config.test.scales=(0.5, 1.0)", "--config.test.weights=(0.7, 0.3)"]
    smaller = ["--config.evaluation.size=(128, 64)", "--config.evaluation.batch=2", "--config.devices=2"]
    words = command("synthia", tmp_path, f"{first},{second}", *averaged, *smaller)
    truths = cityscapes_truths(source, "synthia16")
    text = compare(words, source / "leftImg8bit" / "val", truths, "synthia16", tmp_path, capsys)
    assert "mIoU (16)" in text and "mIoU* (13)" in text and "network0 + network1" in text
    assert "on cityscapes val, input of 128x64, scaled by 0.5 and 1.0, mirrored images too\n" in text

    words = command("synthia", tmp_path, f"{first}:all", "--mode=eval", smaller[0])
    assert main(words) == 0
    alone = capsys.readouterr().out
    assert "network0:0" in alone and re.search("mIoU.*", alone)[0] != re.search("mIoU.*", text)[0]
    assert main([*words, "--config.devices=3"]) == MISTAKE
    assert "or change --config.evaluation.batch" in capsys.readouterr().err


def test_conditions_and_class_weights(tmp_path: Path, capsys) -> None:
    """ACDC: a table for all conditions and one for each; with class weights a second column beside the first."""
    source = layouts.acdc(tmp_path / "source", (64, 32))
    prepare("acdc", manual_dir=source, data_dir=tmp_path)
    checkpoint = converted("acdc", 19, tmp_path / "network")
    words = command("acdc", tmp_path, checkpoint, "--config.evaluation.size=(64, 32)", "--mode=eval")
    assert main([*words, f"--config.test.class_weights={(5.0, *(1.0,) * 17, 0.2)}"]) == 0
    tables = capsys.readouterr().out.split("IoU in % of ")[1:]
    names = [table.partition(" on ")[2].partition(",")[0] for table in tables]
    whole = "acdc/fog val + acdc/night val + acdc/rain val + acdc/snow val"
    assert names == [whole, *(f"acdc/{condition} val" for condition in layouts.ACDC)]
    assert all(re.search(r"network +network, weighted\n", table) for table in tables)
    (scores,) = re.findall(r"^mIoU \(19\) +(\S+) +(\S+)$", tables[0], re.MULTILINE)
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "weighted" not in text and re.search(r"mIoU \(19\) +(\S+)", text)[1] == scores[0]
    assert main([*words, "--config.test.class_weights=(1.0, 2.0)"]) == MISTAKE
    assert "config.test.class_weights has 2 weights, but there are 19 classes" in capsys.readouterr().err


def test_crosscity(tmp_path: Path, capsys) -> None:
    source = layouts.crosscity(tmp_path / "source")
    prepare("crosscity/rome", manual_dir=source, data_dir=tmp_path)
    table = lookup_table("crosscity", label_space("crosscity13"))
    files = (source / "Rome" / "Labels" / "Test").iterdir()
    truths = {file.stem.removesuffix("_eval"): table[np.asarray(Image.open(file))] for file in files}
    checkpoint = converted("crosscity-rome", 13, tmp_path / "network")
    words = command("crosscity-rome", tmp_path, checkpoint, "--config.evaluation.size=(64, 32)")
    text = compare(words, source / "Rome" / "Images" / "Test", truths, "crosscity13", tmp_path, capsys)
    assert "mIoU (13)" in text and "on crosscity/rome test, input of 64x32\n" in text


@pytest.mark.slow
def test_mapillary(tmp_path: Path, capsys) -> None:
    """Images of several sizes, which keep their aspect."""
    source = layouts.mapillary(tmp_path / "source")
    prepare("mapillary", manual_dir=source, data_dir=tmp_path)
    table = lookup_table("mapillary", label_space("super7"))
    files = list((source / "validation" / "labels").iterdir())
    truths = {file.stem: table[np.asarray(Image.open(file))] for file in files}
    assert len({truth.shape for truth in truths.values()}) == 3 and len(CATEGORIES) == 66
    checkpoint = converted("mapillary", 7, tmp_path / "network")
    words = command("mapillary", tmp_path, checkpoint, "--config.evaluation.size=(64, 48)")
    text = compare(words, source / "validation" / "images", truths, "super7", tmp_path, capsys)
    assert "mIoU (7)" in text
    assert not (tmp_path / "predictions" / "cityscapes_ids").exists()
    # Without padding an image gives other scores.
    assert main([*words, "--mode=eval", "--config.evaluation.keep_aspect=False"]) == 0
    assert re.search("mIoU.*", capsys.readouterr().out)[0] != re.search("mIoU.*", text)[0]
