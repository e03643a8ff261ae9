"""The user's own folder: which files are accepted, and which are refused by name."""

import json
import os

import numpy as np
import pytest
import towns
from PIL import Image

from jaxuda.data import make_input
from jaxuda.data.datasets.folder import Folder
from jaxuda.data.records import load
from jaxuda.data.transforms import build_transform
from jaxuda.errors import UserError
from jaxuda.prepare import prepare


def test_folder_round_trip(tmp_path):
    root = towns.folder(tmp_path / "town")
    (final,) = prepare("folder", path=str(root), data_dir=tmp_path / "data")
    assert final.parent.name.startswith("my_town_")
    data = load("folder", "train", path=str(root), data_dir=tmp_path / "data")
    assert (len(data), data.ids(), data.labelled) == (3, ["0", "1", "2"], True)
    assert data.label_space.name == "My Town"
    assert data.label_space.classes == ("road", "sky", "lantern")
    np.testing.assert_array_equal(data.label_space.palette[1], [70, 130, 180])
    for index in range(3):
        record = data[index]
        assert record.keys() == {"image", "label", "id"}
        np.testing.assert_array_equal(record["image"], np.asarray(Image.open(root / f"images/train/{index}.png")))
        np.testing.assert_array_equal(record["label"].ravel()[:6], [0, 0, 1, 2, 255, 255])
    np.testing.assert_array_equal(data[-1]["image"], data[2]["image"])
    with pytest.raises(IndexError):
        data[3]


def test_folder_classes_are_matched_by_name(tmp_path):
    root = towns.folder(tmp_path / "town")
    prepare("folder", path=str(root), data_dir=tmp_path)
    data = load("folder", "val", path=str(root), data_dir=tmp_path, label_space="cityscapes19")
    assert data.label_space.name == "cityscapes19"
    np.testing.assert_array_equal(data[0]["label"].ravel()[:6], [0, 0, 10, 255, 255, 255])
    for space, message in (
        ("nothing", "unknown label space"),
        ("common13", "none of the classes of common13"),
    ):
        changed = {**towns.CLASSES, "classes": towns.CLASSES["classes"][2:]}
        (root / "classes.json").write_text(json.dumps({**changed, "ignore": [0, 2, 7, 9]}))
        prepare("folder", path=str(root), data_dir=tmp_path)
        with pytest.raises(UserError, match=message):
            load("folder", "val", path=str(root), data_dir=tmp_path, label_space=space)


def test_folder_without_splits_and_with_sub_folders(tmp_path):
    root = tmp_path / "town"
    towns.image(root / "images" / "rome" / "1.JPG")
    towns.label(root / "labels" / "rome" / "1.png")
    (root / "images" / ".DS_Store").write_text("")
    (root / "classes.json").write_text(json.dumps(towns.CLASSES))
    prepare("folder", path=str(root), data_dir=tmp_path)
    data = load("folder", "train", path=str(root), data_dir=tmp_path)
    assert data.ids() == ["rome__1"]
    with pytest.raises(UserError, match="folder has no split 'val'; it has train"):
        load("folder", "val", path=str(root), data_dir=tmp_path)


def test_unlabelled_folders(tmp_path, capsys):
    bare = tmp_path / "bare"
    towns.image(bare / "images" / "1.png")
    prepare("folder", path=str(bare), data_dir=tmp_path)
    assert "1 images, unlabelled" in capsys.readouterr().out
    data = load("folder", "train", path=str(bare), data_dir=tmp_path)
    assert data[0].keys() == {"image", "id"}
    assert data.label_space is None
    space = load("folder", "train", path=str(bare), data_dir=tmp_path, label_space="synthia16").label_space
    assert space.name == "synthia16"
    with pytest.raises(UserError, match="has no labels, so it cannot be a source"):
        make_input(data, batch=1, steps=1, source_transform=build_transform({}))

    partly = towns.folder(tmp_path / "partly")
    for file in (partly / "labels" / "train").iterdir():
        file.unlink()
    (partly / "labels" / "train").rmdir()
    prepare("folder", path=str(partly), data_dir=tmp_path)
    assert "label" not in load("folder", "train", path=str(partly), data_dir=tmp_path)[0]
    assert "label" in load("folder", "val", path=str(partly), data_dir=tmp_path)[0]


def test_two_folders_never_collide(tmp_path):
    first, second = towns.folder(tmp_path / "a"), towns.folder(tmp_path / "b")
    towns.image(second / "images" / "train" / "0.png", seed=9)
    (one,) = prepare("folder", path=str(first), data_dir=tmp_path)
    (other,) = prepare("folder", path=str(second), data_dir=tmp_path)
    assert one != other
    prints = {
        load("folder", split, path=str(root), data_dir=tmp_path).fingerprint
        for root in (first, second) for split in ("train", "val")
    }  # fmt: skip
    assert len(prints) >= 3
    # A changed folder is another dataset, which is not prepared.
    os.utime(first / "images" / "train" / "0.png", ns=(5, 5))
    with pytest.raises(UserError) as error:
        load("folder", "train", path=str(first), data_dir=tmp_path)
    assert f"python -m jaxuda.prepare folder --path {first} --data_dir {tmp_path}" in str(error.value)


def test_bad_files_are_named(tmp_path, capsys):
    root = towns.folder(tmp_path / "town", splits=("train",))
    image, label = root / "images" / "train", root / "labels" / "train"
    towns.label(label / "0.png", (0, 3, 200))
    towns.label(label / "1.png", size=(4, 4))
    data = (image / "2.png").read_bytes()
    (image / "2.png").write_bytes(data[: len(data) // 2])
    for name, content in (("3", b"hello"), ("4", b"")):
        (image / f"{name}.png").write_bytes(content)
        towns.label(label / f"{name}.png")
    towns.image(image / "5.png")
    Image.new("RGB", (8, 6)).save(label / "5.png")
    message = towns.fails_on(capsys, root, tmp_path)
    assert f"{label}/0.png: has ids that the dataset does not define: 3, 200" in message
    assert f"{label}/1.png: is 4x4, but its image 1.png is 8x6" in message
    assert f"{image}/2.png: cannot be read as an image (" in message
    assert f"{image}/3.png: cannot be read as an image (not a JPEG or PNG)" in message
    assert f"{image}/4.png: cannot be read as an image" in message
    assert f"{label}/5.png: holds colours (mode RGB)" in message


def test_bad_listings_are_named(tmp_path, capsys):
    root = towns.folder(tmp_path / "town")
    (root / "labels" / "train" / "0.png").unlink()
    towns.label(root / "labels" / "train" / "stray.png")
    towns.image(root / "images" / "beside.png")
    towns.image(root / "images" / "train" / "1.jpg")
    (root / "images" / "val" / "notes.txt").write_text("")
    towns.image(root / "images" / "val" / "a" / "b.png")
    towns.image(root / "images" / "val" / "a__b.png")
    towns.image(root / "images" / "val" / "line\nbreak.png")
    message = towns.fails_on(capsys, root, tmp_path)
    assert f"{root}/images/beside.png: lies beside the splits train and val" in message
    assert "train/1.png: has the same name as 1.jpg" in message
    assert "train/stray.png: has no image" in message
    assert "train/0.png: has no label, though" in message
    assert "notes.txt: is not .jpg or .jpeg or .png" in message
    assert "line\\nbreak.png: its name has characters" in message
    assert "would get the same name as" in message


def test_links_must_not_lead_out(tmp_path, capsys):
    root = towns.folder(tmp_path / "town", splits=("train",))
    towns.image(tmp_path / "secret.png")
    (root / "images" / "train" / "3.png").symlink_to(tmp_path / "secret.png")
    (root / "images" / "train" / "4.png").symlink_to(tmp_path / "nowhere.png")
    (root / "images" / "train" / "more").symlink_to(tmp_path)
    message = towns.fails_on(capsys, root, tmp_path)
    for name in ("3.png", "4.png", "more"):
        assert f"train/{name}: is a link that leads out of the folder" in message
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "images").symlink_to(root / "images")
    assert "is a link that leads out of the folder" in towns.fails_on(capsys, outside, tmp_path)


def test_empty_and_missing_folders(tmp_path, capsys):
    assert "needs a folder 'images'; it is missing" in towns.fails_on(capsys, tmp_path / "nowhere", tmp_path)
    root = tmp_path / "town"
    (root / "images" / "train").mkdir(parents=True)
    assert "images/train: holds no images" in towns.fails_on(capsys, root, tmp_path)
    root = towns.folder(tmp_path / "plain", classes=None)
    assert "classes.json: is missing" in towns.fails_on(capsys, root, tmp_path)
    assert "needs the path of the user's folder" in towns.fails(capsys, "folder", "--data_dir", tmp_path / "data")


def _class(**changes):
    return {"name": "a", "classes": [{"name": "road", "ids": [0], "color": [1, 2, 3], **changes}]}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "with a text as name"),
        ({"name": "", "classes": []}, "with a text as name"),
        ({"name": "a", "classes": {}}, "a list of 1 to 255 classes"),
        ({"name": "a", "classes": []}, "a list of 1 to 255 classes"),
        ({"name": "a", "classes": ["road"]}, "class 0: must be"),
        (_class(ids=[256]), r'class 0 \(road\): "ids" must be a list of numbers 0..254'),
        (_class(ids=[255]), '"ids" must be'),
        (_class(ids=[True]), '"ids" must be'),
        (_class(ids=[]), '"ids" must be'),
        (_class(color=[1, 2]), '"color" must be three numbers'),
        ({**_class(), "ignore": 9}, '"ignore" must be a list'),
        ({**_class(), "ignore": [0]}, "id 0 appears more than once"),
        ({"name": "a", "classes": _class()["classes"] * 2}, "class name road appears more than once"),
    ],
)
def test_classes_json_is_checked(tmp_path, classes, message):
    root = towns.folder(tmp_path / "town", splits=("train",), classes=None)
    (root / "classes.json").write_text(classes if isinstance(classes, str) else json.dumps(classes))
    with pytest.raises(UserError, match=message):
        Folder.config_of(str(root))
