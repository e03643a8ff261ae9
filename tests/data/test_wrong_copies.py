"""Copies of the published datasets that are not as published: what is read all the same, and what is named."""

import json
import shutil
from pathlib import Path

import layouts
import numpy as np
import pytest
from PIL import Image

from jaxuda.data.labels import lookup_table
from jaxuda.data.records import load
from jaxuda.prepare import main

NAMES = {"gta5": "gta5", "synthia": "synthia", "cityscapes": "cityscapes", "crosscity": "crosscity/rome"}
NAMES |= {"mapillary": "mapillary", "mapillary2": "mapillary2", "camvid": "camvid/day"}


def draw(dataset: str, root: Path) -> Path:
    if dataset == "camvid":
        import towns

        return towns.camvid(root)
    return getattr(layouts, dataset)(root)


def prepared(dataset: str, root: Path, capsys) -> str:
    """The output of the command, which must succeed."""
    assert main([NAMES[dataset], "--manual_dir", str(root), "--data_dir", str(root.parent / "data")]) == 0
    return capsys.readouterr().out


def refused(dataset: str, root: Path, capsys) -> str:
    """The message of the command, which must leave nothing."""
    data = root.parent / "data"
    assert main([NAMES[dataset], "--manual_dir", str(root), "--data_dir", str(data)]) == 2
    assert not list(data.glob("*/*"))
    return capsys.readouterr().err


def labels_of(dataset: str, root: Path) -> list[Path]:
    """The label files that are read, sorted."""
    patterns = {
        "gta5": "labels/*.png",
        "synthia": "RAND_CITYSCAPES/GT/LABELS/*.png",
        "cityscapes": "gtFine/[tv][ra]*/*/*_labelIds.png",
        "crosscity": "Rome/Labels/Test/*.png",
        "mapillary": "*/labels/*.png",
        "mapillary2": "*/v2.0/labels/*.png",
        "camvid": "*annot/*.png",
    }
    return sorted(root.glob(patterns[dataset]))


def rewrite(file: Path, ids: list[int]) -> None:
    layouts.grey(file, layouts.ids(tuple(ids), Image.open(file).size))


@pytest.mark.parametrize("dataset", ["cityscapes", "crosscity", "mapillary", "mapillary2", "camvid"])
def test_bad_files_of_every_split_are_named_at_once(tmp_path, capsys, dataset):
    root = draw(dataset, tmp_path / "source")
    images = {
        "cityscapes": "leftImg8bit/*/*/*",
        "crosscity": "Rome/Images/*/*",
        "mapillary": "*/images/*",
        "mapillary2": "*/images/*",
    }
    bad = sorted(root.glob(images.get(dataset, "*/00[01][16]*.jpg")))
    bad = [file for file in bad if "0001TP" not in file.name]  # not of the config "day"
    for file in bad:
        file.write_bytes(b"no image")
    message = refused(dataset, root, capsys)
    assert message.count("cannot be read as an image") == len(bad) and all(str(file) in message for file in bad)
    assert len({file.relative_to(root).parts[:-1] for file in bad}) > 1


# --- labels of another kind


@pytest.mark.parametrize("dataset", ["gta5", "cityscapes", "synthia", "crosscity", "mapillary", "mapillary2"])
@pytest.mark.parametrize("void", [True, False])
def test_train_ids_are_called_so_in_every_split(tmp_path, capsys, dataset, void):
    """With 255 in some files of every split, as most have, and without."""
    root = draw(dataset, tmp_path / "source")
    files = labels_of(dataset, root)
    for number, file in enumerate(files):
        rewrite(file, [*range(19), 255] if void and number % 2 else [*range(19)])
    message = refused(dataset, root, capsys)
    assert message.count("these are train ids") == len(files) > 1
    for file in files:
        assert f"{file}: holds " in message


@pytest.mark.parametrize("split", ["train", "val"])
def test_train_ids_in_one_split(tmp_path, capsys, split):
    root = layouts.cityscapes(tmp_path / "source")
    for file in labels_of("cityscapes", root):
        if split in file.parts:
            rewrite(file, [0, 2, 10, 13])
    message = refused("cityscapes", root, capsys)
    assert message.count("these are train ids") == message.count(f"/gtFine/{split}/") == 4


def test_published_labels_are_not_taken_for_train_ids(tmp_path, capsys):
    """A single frame with low ids alone (a tunnel) is only named, and only if it shows much of id 0."""
    root = layouts.gta5(tmp_path / "source")
    rewrite(root / "labels" / "00001.png", [1, 7, 8, 11, 12])
    assert "no id above 18" not in prepared("gta5", root, capsys)
    shutil.rmtree(tmp_path / "data")
    rewrite(root / "labels" / "00001.png", [0, 2, 10, 13])
    text = prepared("gta5", root, capsys)
    assert (
        f"1 of 3 labels hold no id above 18, such as {root}/labels/00001.png; look whether they hold train ids" in text
    )


@pytest.mark.parametrize("dataset", ["gta5", "cityscapes", "mapillary", "mapillary2", "crosscity"])
def test_instance_ids_are_refused(tmp_path, capsys, dataset):
    root = draw(dataset, tmp_path / "source")
    file = labels_of(dataset, root)[0]
    size = Image.open(file).size
    Image.fromarray(np.full(size[::-1], 26001, np.uint16)).save(file)
    message = refused(dataset, root, capsys)
    assert f"{file}: holds the id 26001; ids must be 0..255 (if it shows single objects, their instances" in message


@pytest.mark.parametrize("dataset", NAMES)
def test_orphan_labels_and_colours_are_named(tmp_path, capsys, dataset):
    root = draw(dataset, tmp_path / "source")
    file = labels_of(dataset, root)[-1]
    orphan = file.with_name(file.name.replace("_gtFine", "9_gtFine") if "_gtFine" in file.name else f"9{file.name}")
    shutil.copy(file, orphan)
    assert f"{orphan}: has no image" in refused(dataset, root, capsys)
    orphan.unlink()
    layouts.image(file, Image.open(file).size)
    assert f"{file}: holds colours" in refused(dataset, root, capsys)


@pytest.mark.parametrize("dataset", ["gta5", "synthia"])
def test_files_of_other_tools_beside_the_labels(tmp_path, capsys, dataset):
    root = draw(dataset, tmp_path / "source")
    files = labels_of(dataset, root)
    for file in files:
        layouts.grey(file.with_name(f"{file.stem}_labelTrainIds.png"), layouts.ids((0, 1, 255)))
    prepared(dataset, root, capsys)
    data = load(dataset, "train", data_dir=tmp_path / "data")
    assert data.ids() == [file.stem for file in files]
    assert set(np.unique(data[0]["label"])) == set(
        lookup_table(dataset, data.label_space)[: 35 if dataset == "gta5" else 23]
    )
    shutil.rmtree(tmp_path / "data")
    for file in files:
        file.unlink()
    message = refused(dataset, root, capsys)
    assert message.count("\n") == 2 and f"is it {files[0].with_name(f'{files[0].stem}_labelTrainIds.png')}?" in message


def test_jpeg_is_named(tmp_path, capsys):
    root = layouts.gta5(tmp_path / "source")
    for file in list((root / "images").iterdir()):
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    assert f"{root}/images: holds no files *.png (but 3 others, such as 00001.jpg)" in refused("gta5", root, capsys)
    label = root / "labels" / "00002.png"
    Image.open(label).convert("L").save(label, "JPEG")
    shutil.copytree(root / "labels", root / "images", dirs_exist_ok=True)
    assert f"{label}: is JPEG; labels must be PNG" in refused("gta5", root, capsys)


# --- other folders


def test_a_copy_without_val(tmp_path, capsys):
    root = layouts.cityscapes(tmp_path / "source")
    shutil.rmtree(root / "gtFine" / "val")
    assert f"{root}/gtFine/val: there is no such folder" in refused("cityscapes", root, capsys)
    shutil.rmtree(root / "leftImg8bit" / "val")
    message = refused("cityscapes", root, capsys)
    assert "leftImg8bit/val: there is no such folder" in message and "has no" not in message


@pytest.mark.parametrize("dataset", NAMES)
def test_a_folder_around_the_dataset(tmp_path, capsys, dataset):
    root = draw(dataset, tmp_path / "source")
    around = tmp_path / "download"
    around.mkdir()
    (around / "__MACOSX").mkdir()
    root.rename(around / "unpacked")
    prepared(dataset, around, capsys)
    split = "train" if dataset != "crosscity" else "test"
    assert load(NAMES[dataset], split, data_dir=tmp_path / "data")[0].keys() >= {"image", "label"}


def test_each_archive_in_a_folder_of_its_own(tmp_path, capsys):
    root = layouts.cityscapes(tmp_path / "source")
    for name, around in (("leftImg8bit", "leftImg8bit_trainvaltest"), ("gtFine", "gtFine")):
        (root / name).rename(tmp_path / name)
        (root / around).mkdir()
        (tmp_path / name).rename(root / around / name)
    prepared("cityscapes", root, capsys)
    assert len(load("cityscapes", "val", data_dir=tmp_path / "data")) == 4


# --- other versions


def test_mapillary_of_the_package_with_two_versions(tmp_path, capsys):
    root = layouts.mapillary(tmp_path / "source")
    for split in ("training", "validation"):
        (root / split / "v1.2").mkdir()
        (root / split / "labels").rename(root / split / "v1.2" / "labels")
        for file in (root / split / "v1.2" / "labels").iterdir():
            layouts.palette(
                root / split / "v2.0" / "labels" / file.name, layouts.ids(range(124), Image.open(file).size)
            )
    (root / "config_v2.0.json").write_text(json.dumps({"labels": [{"readable": "Bird"}]}))
    prepared("mapillary", root, capsys)
    labels = np.asarray(Image.open(sorted((root / "validation/v1.2/labels").iterdir())[0]))
    data = load("mapillary", "val", data_dir=tmp_path / "data")
    np.testing.assert_array_equal(data[0]["label"], lookup_table("mapillary", "super7")[labels])

    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(root / "training" / "v1.2")
    shutil.rmtree(root / "validation" / "v1.2")
    message = refused("mapillary", root, capsys)
    assert message.count("v2.0: holds labels of v2.0; those of v1.2 are missing (mapillary2 reads v2.0)") == 2
    for split in ("training", "validation"):
        (root / split / "v2.0" / "labels").rename(root / split / "labels")
    message = refused("mapillary", root, capsys)
    assert "has ids that the dataset does not define: 66, 67" in message
    assert "(v2.0 has such ids: prepare its labels as mapillary2)" in message


def test_mapillary_2_is_not_v1(tmp_path, capsys):
    root = layouts.mapillary(tmp_path / "source")
    message = refused("mapillary2", root, capsys)
    assert f"{root}/training/v2.0/labels: there is no such folder" in message
    for split in ("training", "validation"):
        (root / split / "v1.2").mkdir()
        (root / split / "labels").rename(root / split / "v1.2" / "labels")
    message = refused("mapillary2", root, capsys)
    assert message.count("v1.2: holds labels of v1.2; those of v2.0 are missing (mapillary reads v1.2)") == 2
    for split in ("training", "validation"):
        (root / split / "v1.2").rename(root / split / "v2.0")
    message = refused("mapillary2", root, capsys)
    assert message.count("holds no id above 65, as all labels of its split: these are labels of v1.2") == 2

    config = json.loads((layouts.mapillary2(tmp_path / "other") / "config_v2.0.json").read_text())
    config["labels"] = config["labels"][:-1]
    (root / "config_v2.0.json").write_text(json.dumps(config))
    assert "config_v2.0.json: has 123 categories, v2.0 has 124" in refused("mapillary2", root, capsys)


def test_one_city_of_crosscity(tmp_path, capsys):
    root = layouts.crosscity(tmp_path / "source")
    words = ["--data_dir", str(tmp_path / "data"), "--manual_dir"]
    assert main(["crosscity", *words, str(root)]) == 0
    output = capsys.readouterr().out
    assert [f"crosscity/{city}: is not in {root}" in output for city in ("rio", "rome", "taipei", "tokyo")] == [
        1,
        0,
        1,
        1,
    ]
    assert len(load("crosscity/rome", "test", data_dir=tmp_path / "data")) == 2
    shutil.rmtree(tmp_path / "data")
    assert main(["crosscity", *words, str(root / "Rome")]) == 0
    assert len(load("crosscity/rome", "test", data_dir=tmp_path / "data")) == 2
    (root / "Rome").rename(root / "Paris")
    assert main(["crosscity", *words, str(root)]) == 2
    assert f"{root}/Rio/Images/Train: there is no such folder" in capsys.readouterr().err


def test_colour_labels_of_the_original_camvid(tmp_path, capsys):
    root = draw("camvid", tmp_path / "source")
    for file in labels_of("camvid", root):
        layouts.image(file.with_name(f"{file.stem}_L.png"), (8, 6))
        file.unlink()
    message = refused("camvid", root, capsys)
    assert message.count("\n") == 4 and f"and so 4 images: is it {root}/trainannot/0001TP_1_L.png?" in message
