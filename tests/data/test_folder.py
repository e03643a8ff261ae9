"""The user's own folder: which files are accepted, and which are refused by name."""

import json
import os
import unicodedata

import cv2
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


def test_one_complaint_about_each_pair(tmp_path, capsys):
    root = towns.folder(tmp_path / "town", splits=("train",))
    image, label = root / "images" / "train" / "0.png", root / "labels" / "train" / "1.png"
    image.rename(image.with_suffix(".tif"))
    label.rename(label.with_suffix(".bmp"))
    message = towns.fails_on(capsys, root, tmp_path)
    assert [line.split(": ")[0] for line in message.splitlines()[1:]] == [
        f"  {image.with_suffix('.tif')}",
        f"  {label.with_suffix('.bmp')}",
    ]


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


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (["training", "validation"], ["training", "validation"], ["train", "val"]),
        (["Train", "Val"], ["train", "VAL"], ["train", "val"]),
        (["train", "valid", "test"], ["train", "valid"], ["train", "val", "test"]),
        (["Testing"], [], ["test"]),
    ],
)
def test_other_names_of_splits(tmp_path, images, labels, expected):
    root = tmp_path / "town"
    for kind, names in (("images", images), ("labels", labels)):
        for number, name in enumerate(names):
            write = towns.image if kind == "images" else towns.label
            write(root / kind / name / f"{number}.png")
    if labels:
        (root / "classes.json").write_text(json.dumps(towns.CLASSES))
    prepare("folder", path=str(root), data_dir=tmp_path)
    for number, split in enumerate(expected):
        data = load("folder", split, path=str(root), data_dir=tmp_path)
        assert (data.ids(), data.labelled) == ([str(number)], number < len(labels))
    with pytest.raises(UserError, match="has no split"):
        load("folder", "other", path=str(root), data_dir=tmp_path)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ["train2017", "val2017"],
            "images/train2017: is this a split? Splits are folders train, val, test directly in",
        ),
        (["rome/train", "rome/val"], "images/rome/val: is this a split?"),
        (["trainA", "trainB"], "images/trainB: is this a split?"),
        (["train", "Training"], "images/train: is the split train, and so is Training; keep one of them"),
        (["train", "dev"], "images/dev: lies beside the splits train"),
        (["validate", "xtrain"], "images/validate: is this a split?"),
        (["imagesTr", "imagesTs"], "images/imagesTs: is this a split?"),
    ],
)
def test_folders_that_only_look_like_splits_are_refused(tmp_path, capsys, folders, message):
    root = tmp_path / "town"
    for folder in folders:
        towns.image(root / "images" / folder / "0.png")
    assert message in towns.fails_on(capsys, root, tmp_path)


def test_splits_above_images_are_explained(tmp_path, capsys):
    towns.image(tmp_path / "town" / "train" / "images" / "0.png")
    message = towns.fails_on(capsys, tmp_path / "town", tmp_path)
    assert f"move {tmp_path}/town/train/images to {tmp_path}/town/images/train" in message


@pytest.mark.parametrize(
    ("image", "label"),
    [("{}_leftImg8bit.png", "{}_gtFine_labelIds.png"), ("{}.jpg", "{}.jpg.png"), ("img{}.jpg", "mask{}.png")],
)
def test_names_that_differ_are_paired(tmp_path, capsys, image, label):
    root, expected = tmp_path / "town", {}
    for number in range(3):
        towns.image(root / "images" / "train" / "rome" / image.format(number), seed=number)
        towns.label(root / "labels" / "train" / "rome" / label.format(number), ids=[(0, 2, 4)[number]])
        expected["rome__" + image.format(number).rpartition(".")[0]] = number
    (root / "classes.json").write_text(json.dumps(towns.CLASSES))
    prepare("folder", path=str(root), data_dir=tmp_path)
    output = capsys.readouterr().out
    assert output.count("3 labels are named otherwise than their images, such as ") == 1
    data = load("folder", "train", path=str(root), data_dir=tmp_path)
    assert {data[i]["id"]: int(data[i]["label"].max()) for i in range(3)} == expected


def test_names_that_cannot_be_paired_are_explained_once(tmp_path, capsys):
    root = tmp_path / "town"
    for number in range(3):
        towns.image(root / "images" / "train" / f"{number}_rgb.png")
        for kind in ("color", "labelIds"):
            towns.label(root / "labels" / "train" / f"{number}_{kind}.png")
    (root / "classes.json").write_text(json.dumps(towns.CLASSES))
    message = towns.fails_on(capsys, root, tmp_path)
    assert message.count("\n") == 3  # one for each way
    assert "0_rgb.png: has no label of the same name, and so 3 images: is it " in message
    for file in (root / "labels" / "train").iterdir():
        file.unlink()
    for number in range(4):
        towns.label(root / "labels" / "train" / f"oslo_{number}.png")
        towns.image(root / "images" / "train" / f"rome_{number}.png")
        (root / "images" / "train" / f"{number}_rgb.png").unlink(missing_ok=True)
    message = towns.fails_on(capsys, root, tmp_path)
    assert message.count("\n") == 2 and "rome_0.png: none of the 4 images has a label of the same name" in message


def test_names_in_two_forms_of_unicode(tmp_path):
    """macOS writes é as two characters."""
    root = towns.folder(tmp_path / "town", splits=("train",))
    for kind, form in (("images", "NFD"), ("labels", "NFC")):
        file = root / kind / "train" / "0.png"
        file.rename(file.with_name(unicodedata.normalize(form, "café.png")))
    classes = json.loads(json.dumps(towns.CLASSES))
    classes["classes"][0]["name"] = unicodedata.normalize("NFD", "allée")
    (root / "classes.json").write_text(json.dumps(classes))
    prepare("folder", path=str(root), data_dir=tmp_path)
    data = load("folder", "train", path=str(root), data_dir=tmp_path)
    assert unicodedata.normalize("NFC", "café") in data.ids()
    assert data.label_space.classes[0] == unicodedata.normalize("NFC", "allée")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_classes_json_as_windows_saves_it(tmp_path, encoding):
    root = towns.folder(tmp_path / "town", splits=("train",), classes=None)
    text = json.dumps({"name": "Straße", "classes": towns.CLASSES["classes"]}, ensure_ascii=False)
    (root / "classes.json").write_bytes(text.encode(encoding))
    config = Folder.config_of(str(root))
    assert config.classes["name"] == "Straße" and [c["ids"] for c in config.classes["classes"]] == [[0, 7], [2], [4]]
    (root / "classes.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"classes.json: is not a text in UTF-8"):
        Folder.config_of(str(root))


def test_images_of_16_bits(tmp_path, capsys):
    root = towns.folder(tmp_path / "town")
    plain = {file: cv2.imread(str(file)) for file in sorted((root / "images").rglob("*.png"))}
    for file, array in plain.items():
        cv2.imwrite(str(file), array.astype(np.uint16) * 16)
    train = [array[..., ::-1] for file, array in plain.items() if file.parent.name == "train"]

    def images():
        data = load("folder", "train", path=str(root), data_dir=tmp_path)
        return [data[i]["image"] for i in range(len(data))], data.fingerprint

    prepare("folder", path=str(root), data_dir=tmp_path)
    output = capsys.readouterr().out
    assert "6 of the 6 images of 16 bits use only the values" in output and "add --image_bits 12" in output
    dark, before = images()
    np.testing.assert_array_equal(dark, [array >> 4 for array in train])
    prepare("folder", path=str(root), data_dir=tmp_path, image_bits=12)
    assert "images of 16 bits" not in capsys.readouterr().out
    bright, after = images()
    np.testing.assert_array_equal(bright, train)
    assert before != after
    prepare("folder", path=str(root), data_dir=tmp_path)  # does not undo it
    assert "already prepared" in capsys.readouterr().out and images()[1] == after
    prepare("folder", path=str(root), data_dir=tmp_path, image_bits=10)
    assert f"values above 1023, up to {16 * int(max(map(np.max, plain.values())))}" in capsys.readouterr().out
    assert "must be 8 to 16" in towns.fails(capsys, "folder", "--path", root, "--image_bits", 7)


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
