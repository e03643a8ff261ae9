"""CamVid, the user's folder, `prepare` and `load`, on tiny files that are drawn here."""

import fcntl
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxuda import prepare as prepare_module
from jaxuda.data import make_input, records
from jaxuda.data.camvid import Camvid
from jaxuda.data.folder import Folder
from jaxuda.data.records import load
from jaxuda.data.transforms import build_transform
from jaxuda.errors import UserError
from jaxuda.prepare import main, prepare

CLASSES = {
    "name": "My Town",
    "classes": [
        {"name": "road", "ids": [0, 7], "color": [128, 64, 128]},
        {"name": "sky", "id": 2, "color": [70, 130, 180]},
        {"name": "lantern", "id": 4, "color": [1, 2, 3]},
    ],
    "ignore": [9],
}


def _image(file, size=(8, 6), seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(array).save(file)
    return array


def _label(file, ids=(0, 7, 2, 4, 9, 255), size=(8, 6), palette=False):
    file.parent.mkdir(parents=True, exist_ok=True)
    array = np.resize(np.array(ids, np.uint8), size[::-1])
    picture = Image.fromarray(array)
    if palette:
        picture = Image.fromarray(array, "P")
        picture.putpalette(list(range(256)) * 3)
    picture.save(file)
    return array


def _folder(root, splits=("train", "val"), classes=CLASSES):
    for split in splits:
        for index in range(3):
            _image(root / "images" / split / f"{index}.png", seed=index)
            _label(root / "labels" / split / f"{index}.png", palette=index == 1)
    if classes:
        (root / "classes.json").write_text(json.dumps(classes))
    return root


def _camvid(root):
    names = {
        "train": ["0006R0_1", "0016E5_1", "0001TP_1", "0001TP_2"],
        "val": ["0016E5_7"],
        "test": ["Seq05VD_1", "0001TP_9"],
    }
    for split, stems in names.items():
        for seed, stem in enumerate(stems):
            _image(root / split / f"{stem}.jpg", seed=seed)
            _label(root / f"{split}annot" / f"{stem}.png", range(12))
    return root


def _fails(capsys, *arguments):
    """Runs the command line, which must fail as users see it; returns the message."""
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def _fails_on(capsys, folder, tmp_path):
    """The message for a bad folder; nothing may be left of it."""
    message = _fails(capsys, "folder", "--path", folder, "--data_dir", tmp_path / "data")
    assert not list((tmp_path / "data").glob("folder/*"))
    assert not list((tmp_path / "data").glob("folder/.*"))
    return message


# CamVid


def test_camvid_has_its_two_domains(tmp_path, capsys):
    source = _camvid(tmp_path / "source")
    assert main(["camvid", "--manual_dir", str(source), "--data_dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "camvid/day has train 3, val 1 images; published are train 476, val 101" in output
    assert "sky 8.3%" in output
    ids = {
        (config, split): load(f"camvid/{config}", split, data_dir=tmp_path).ids()
        for config in ("day", "dusk") for split in ("train", "val")
    }  # fmt: skip
    assert ids == {
        ("day", "train"): ["0006R0_1", "0016E5_1", "Seq05VD_1"],
        ("day", "val"): ["0016E5_7"],
        ("dusk", "train"): ["0001TP_1", "0001TP_2"],
        ("dusk", "val"): ["0001TP_9"],
    }
    day = load("camvid/day", "train", data_dir=tmp_path)
    assert day.label_space.name == "camvid11"
    # The bytes of the file, not another encoding.
    stored = records.open_split(records.prepared_folder("camvid/day", tmp_path), "train")[0]["image"]
    assert stored == (source / "train" / "0006R0_1.jpg").read_bytes()
    np.testing.assert_array_equal(day[0]["label"].ravel()[:12], [*range(11), 255])


def test_camvid_published_numbers():
    assert Camvid.PUBLISHED == {"day": {"train": 476, "val": 101}, "dusk": {"train": 62, "val": 62}}


def test_camvid_complains_of_what_is_missing(tmp_path, capsys):
    assert "camvid/day needs --manual_dir DIR: the folder CamVid of" in _fails(capsys, "camvid", "--data_dir", tmp_path)
    missing = tmp_path / "nowhere"
    assert f"--manual_dir {missing}: there is no such folder" in _fails(
        capsys, "camvid", "--manual_dir", missing, "--data_dir", tmp_path
    )
    source = _camvid(tmp_path / "source")
    (source / "trainannot" / "0006R0_1.png").unlink()
    (source / "test" / "Seq05VD_1.jpg").unlink()
    (source / "val" / "0016E5_7.jpg").unlink()
    _image(source / "test" / "holiday.jpg")
    _label(source / "testannot" / "holiday.png")
    message = _fails(capsys, "camvid", "--manual_dir", source, "--data_dir", tmp_path)
    assert f"{source}/train/0006R0_1.jpg: has no label" in message
    assert f"{source}/testannot/Seq05VD_1.png: has no image" in message
    assert f"{source}/val: holds no files *.jpg or *.png" in message
    assert f"{source}/test/holiday.jpg: its name starts with none of 0006R0" in message
    assert not list(tmp_path.glob("camvid/*"))


# The user's folder


def test_folder_round_trip(tmp_path):
    root = _folder(tmp_path / "town")
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
    root = _folder(tmp_path / "town")
    prepare("folder", path=str(root), data_dir=tmp_path)
    data = load("folder", "val", path=str(root), data_dir=tmp_path, label_space="cityscapes19")
    assert data.label_space.name == "cityscapes19"
    np.testing.assert_array_equal(data[0]["label"].ravel()[:6], [0, 0, 10, 255, 255, 255])
    for space, message in (
        ("nothing", "unknown label space"),
        ("common13", "none of the classes of common13"),
    ):
        changed = {**CLASSES, "classes": CLASSES["classes"][2:]}
        (root / "classes.json").write_text(json.dumps({**changed, "ignore": [0, 2, 7, 9]}))
        prepare("folder", path=str(root), data_dir=tmp_path)
        with pytest.raises(UserError, match=message):
            load("folder", "val", path=str(root), data_dir=tmp_path, label_space=space)


def test_folder_without_splits_and_with_sub_folders(tmp_path):
    root = tmp_path / "town"
    _image(root / "images" / "rome" / "1.JPG")
    _label(root / "labels" / "rome" / "1.png")
    (root / "images" / ".DS_Store").write_text("")
    (root / "classes.json").write_text(json.dumps(CLASSES))
    prepare("folder", path=str(root), data_dir=tmp_path)
    data = load("folder", "train", path=str(root), data_dir=tmp_path)
    assert data.ids() == ["rome__1"]
    with pytest.raises(UserError, match="folder has no split 'val'; it has train"):
        load("folder", "val", path=str(root), data_dir=tmp_path)


def test_unlabelled_folders(tmp_path, capsys):
    bare = tmp_path / "bare"
    _image(bare / "images" / "1.png")
    prepare("folder", path=str(bare), data_dir=tmp_path)
    assert "1 images, unlabelled" in capsys.readouterr().out
    data = load("folder", "train", path=str(bare), data_dir=tmp_path)
    assert data[0].keys() == {"image", "id"}
    assert data.label_space is None
    space = load("folder", "train", path=str(bare), data_dir=tmp_path, label_space="synthia16").label_space
    assert space.name == "synthia16"
    with pytest.raises(UserError, match="has no labels and cannot be a source"):
        make_input(data, batch=1, steps=1, source_transform=build_transform({}))

    partly = _folder(tmp_path / "partly")
    for file in (partly / "labels" / "train").iterdir():
        file.unlink()
    (partly / "labels" / "train").rmdir()
    prepare("folder", path=str(partly), data_dir=tmp_path)
    assert "label" not in load("folder", "train", path=str(partly), data_dir=tmp_path)[0]
    assert "label" in load("folder", "val", path=str(partly), data_dir=tmp_path)[0]


def test_two_folders_never_collide(tmp_path):
    first, second = _folder(tmp_path / "a"), _folder(tmp_path / "b")
    _image(second / "images" / "train" / "0.png", seed=9)
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
    root = _folder(tmp_path / "town", splits=("train",))
    image, label = root / "images" / "train", root / "labels" / "train"
    _label(label / "0.png", (0, 3, 200))
    _label(label / "1.png", size=(4, 4))
    data = (image / "2.png").read_bytes()
    (image / "2.png").write_bytes(data[: len(data) // 2])
    for name, content in (("3", b"hello"), ("4", b"")):
        (image / f"{name}.png").write_bytes(content)
        _label(label / f"{name}.png")
    _image(image / "5.png")
    Image.new("RGB", (8, 6)).save(label / "5.png")
    message = _fails_on(capsys, root, tmp_path)
    assert f"{label}/0.png: holds ids that the dataset does not name: 3, 200" in message
    assert f"{label}/1.png: is 4x4, but its image 1.png is 8x6" in message
    assert f"{image}/2.png: cannot be read as an image (" in message
    assert f"{image}/3.png: cannot be read as an image (no JPEG or PNG)" in message
    assert f"{image}/4.png: cannot be read as an image" in message
    assert f"{label}/5.png: holds colours (mode RGB)" in message


def test_bad_listings_are_named(tmp_path, capsys):
    root = _folder(tmp_path / "town")
    (root / "labels" / "train" / "0.png").unlink()
    _label(root / "labels" / "train" / "stray.png")
    _image(root / "images" / "beside.png")
    _image(root / "images" / "train" / "1.jpg")
    (root / "images" / "val" / "notes.txt").write_text("")
    _image(root / "images" / "val" / "a" / "b.png")
    _image(root / "images" / "val" / "a__b.png")
    _image(root / "images" / "val" / "line\nbreak.png")
    message = _fails_on(capsys, root, tmp_path)
    assert f"{root}/images/beside.png: lies beside the splits train and val" in message
    assert "train/1.png: has the same name as 1.jpg" in message
    assert "train/stray.png: has no image" in message
    assert "train/0.png: has no label, though" in message
    assert "notes.txt: is not .jpg or .jpeg or .png" in message
    assert "line\\nbreak.png: its name has characters" in message
    assert "would get the same name as" in message


def test_links_must_not_lead_out(tmp_path, capsys):
    root = _folder(tmp_path / "town", splits=("train",))
    _image(tmp_path / "secret.png")
    (root / "images" / "train" / "3.png").symlink_to(tmp_path / "secret.png")
    (root / "images" / "train" / "4.png").symlink_to(tmp_path / "nowhere.png")
    (root / "images" / "train" / "more").symlink_to(tmp_path)
    message = _fails_on(capsys, root, tmp_path)
    for name in ("3.png", "4.png", "more"):
        assert f"train/{name}: is a link that leads out of the folder" in message
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "images").symlink_to(root / "images")
    assert "is a link that leads out of the folder" in _fails_on(capsys, outside, tmp_path)


def test_empty_and_missing_folders(tmp_path, capsys):
    assert "needs a folder 'images'; there is none" in _fails_on(capsys, tmp_path / "nowhere", tmp_path)
    root = tmp_path / "town"
    (root / "images" / "train").mkdir(parents=True)
    assert "images/train: holds no images" in _fails_on(capsys, root, tmp_path)
    root = _folder(tmp_path / "plain", classes=None)
    assert "classes.json: is missing" in _fails_on(capsys, root, tmp_path)
    assert "needs the path of the user's folder" in _fails(capsys, "folder", "--data_dir", tmp_path / "data")


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
    root = _folder(tmp_path / "town", splits=("train",), classes=None)
    (root / "classes.json").write_text(classes if isinstance(classes, str) else json.dumps(classes))
    with pytest.raises(UserError, match=message):
        Folder.config_of(str(root))


# Preparing and loading


def test_records_pickle_and_have_a_fingerprint(tmp_path):
    root = _folder(tmp_path / "town")
    prepare("folder", path=str(root), data_dir=tmp_path)
    data = load("folder", "train", path=str(root), data_dir=tmp_path)
    first = data[0]
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 3000
    np.testing.assert_array_equal(copy[0]["image"], first["image"])
    again = load("folder", "train", path=str(root), data_dir=tmp_path)
    assert copy.fingerprint == again.fingerprint == data.fingerprint
    other = load("folder", "train", path=str(root), data_dir=tmp_path, label_space="cityscapes19")
    assert other.fingerprint != data.fingerprint
    assert int(data.fingerprint, 16)
    assert data.images_only()[0].keys() == {"image", "id"}
    assert "label" in data[0]


def test_records_feed_workers(tmp_path):
    root = _folder(tmp_path / "town")
    prepare("folder", path=str(root), data_dir=tmp_path)
    data = load("folder", "train", path=str(root), data_dir=tmp_path)
    transform = build_transform({"crop": (4, 4)})
    runs = []
    for num_workers in (0, 1):
        options = {"batch": 2, "steps": 3, "num_workers": num_workers}
        with make_input(data, data, **options, source_transform=transform, target_transform=transform) as batches:
            runs.append(list(batches))
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first["source"]["label"], second["source"]["label"])
        np.testing.assert_array_equal(first["target"]["image"], second["target"]["image"])
        assert first["target"].keys() == {"image", "id"}


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="unknown dataset 'street'; known: streets, camvid, folder"):
        load("street/game", "train", data_dir=tmp_path)
    with pytest.raises(UserError, match="unknown dataset 'camvid/night'; choose from camvid/day, camvid/dusk"):
        load("camvid/night", "train", data_dir=tmp_path)
    with pytest.raises(UserError, match="camvid/day takes no path"):
        load("camvid/day", "train", data_dir=tmp_path, path="x")
    with pytest.raises(UserError, match=r"python -m jaxuda.prepare camvid --manual_dir DIR --data_dir "):
        load("camvid/day", "train", data_dir=tmp_path)


def test_the_environment_names_the_data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "there"))
    assert records.root(None) == tmp_path / "there"
    assert records.root(tmp_path) == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.root(None) == tmp_path / "tensorflow_datasets"


def test_a_killed_run_is_cleaned_up(tmp_path, capsys):
    root = _folder(tmp_path / "town")
    leftover = tmp_path / "folder" / ".preparing-other_123" / "folder"
    leftover.mkdir(parents=True)
    (leftover / "half.array_record").write_text("half")
    (final,) = prepare("folder", path=str(root), data_dir=tmp_path)
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [final.parent.name]
    capsys.readouterr()
    prepare("folder", path=str(root), data_dir=tmp_path)
    assert f"folder: already prepared in {final}" in capsys.readouterr().out


def test_a_killed_run_leaves_nothing_that_loads(tmp_path, monkeypatch):
    root = _folder(tmp_path / "town")
    code = (
        "import os, sys\nfrom jaxuda import prepare as p\n"
        "p._summarise = lambda *_: os.kill(os.getpid(), 9)\n"
        "p.prepare('folder', path=sys.argv[1], data_dir=sys.argv[2])"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(root), str(tmp_path)], capture_output=True)
    assert killed.returncode == -9
    assert list((tmp_path / "folder").glob(".preparing-*"))
    with pytest.raises(UserError, match="is not prepared"):
        load("folder", "train", path=str(root), data_dir=tmp_path)
    prepare("folder", path=str(root), data_dir=tmp_path)
    assert not list((tmp_path / "folder").glob(".preparing-*"))
    assert len(load("folder", "train", path=str(root), data_dir=tmp_path)) == 3


def test_the_lock_is_held_while_preparing(tmp_path):
    with prepare_module._locked(tmp_path):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


def test_a_full_or_unwritable_disk(tmp_path, monkeypatch, capsys):
    root = _folder(tmp_path / "town")
    (tmp_path / "file").write_text("")
    message = _fails(capsys, "folder", "--path", root, "--data_dir", tmp_path / "file")
    assert "cannot write the dataset below" in message
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("jaxuda.prepare.shutil.disk_usage", lambda _: usage)
    assert "0.2 GiB are needed, 0.0 GiB are free" in _fails_on(capsys, root, tmp_path)


def test_damaged_records_are_named(tmp_path, monkeypatch):
    root = _folder(tmp_path / "town")
    prepare("folder", path=str(root), data_dir=tmp_path)
    data = load("folder", "train", path=str(root), data_dir=tmp_path)
    data._reader = [{"id": b"0", "image": b"damaged", "label": b""}]
    with pytest.raises(UserError, match="folder town train: record '0' is damaged"):
        data[0]


def test_command_line_in_a_fresh_process(tmp_path):
    root = _folder(tmp_path / "town")
    command = [sys.executable, "-m", "jaxuda.prepare", "folder", "--data_dir", str(tmp_path), "--path"]
    done = subprocess.run([*command, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "road" in done.stdout
    assert "absl" not in done.stderr
    failed = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
