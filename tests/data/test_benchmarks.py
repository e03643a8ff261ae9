"""The five published benchmarks, prepared from tiny folders in their layouts and file formats."""

import json
import subprocess
import sys

import numpy as np
import pytest
from layouts import (
    cityscapes,
    classes_and_instances,
    crosscity,
    depth,
    grey,
    gta5,
    ids,
    image,
    mapillary,
    mapillary2,
    synthia,
)
from PIL import Image

from jaxuda.data import prepared, records
from jaxuda.data.datasets import mapillary2 as mapillary_two
from jaxuda.data.datasets.mapillary import CATEGORIES
from jaxuda.data.encoding import decode_label
from jaxuda.data.labels import label_space, lookup_table
from jaxuda.data.orders.class_balanced import classes_of_images
from jaxuda.data.records import Subset, load
from jaxuda.errors import UserError
from jaxuda.prepare import main, prepare


def _prepared(name, source, data_dir):
    prepare(name, manual_dir=source, data_dir=data_dir)
    return lambda split, space=None: load(name, split, data_dir=data_dir, label_space=space)


def _complaints(capsys, name, source, data_dir):
    assert main([name, "--manual_dir", str(source), "--data_dir", str(data_dir)]) == 2
    assert not [left for left in (data_dir / name.partition("/")[0]).iterdir() if left.name != "lock"]
    return capsys.readouterr().err


def test_gta5(tmp_path, capsys):
    source = gta5(tmp_path / "source")
    data = _prepared("gta5", source, tmp_path)("train")
    output = capsys.readouterr().out
    assert "gta5 has train 3 images; published are train 24966" in output
    assert "00003.png: is 12x8, but its image 00003.png is 16x8; it was resized to this" in output
    assert data.ids() == ["00001", "00002", "00003"] and data.label_space.num_classes == 19
    stored = records.open_split(records.prepared_folder("gta5", tmp_path), "train")
    assert stored[0]["image"] == (source / "images" / "00001.png").read_bytes()
    # Palette indices, not colours; the resized one is nearest.
    np.testing.assert_array_equal(decode_label(stored[0]["label"]), ids(range(35)))
    pillow = Image.fromarray(ids(range(35), (12, 8))).resize((16, 8), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(decode_label(stored[2]["label"]), np.asarray(pillow))
    np.testing.assert_array_equal(data[0]["label"], lookup_table("gta5", "cityscapes19")[ids(range(35))])
    np.testing.assert_array_equal(data[1]["image"], np.asarray(Image.open(source / "images" / "00002.png")))


@pytest.mark.parametrize("parsed", [False, True])
def test_synthia(tmp_path, parsed):
    source = synthia(tmp_path / "source", parsed=parsed)
    data = _prepared("synthia", source, tmp_path)("train")
    assert data.label_space.name == "synthia16"
    for index in range(3):
        record = data[index]
        np.testing.assert_array_equal(record["label"], lookup_table("synthia", "synthia16")[ids(range(23))])
        raw = depth(tmp_path / "again.png")
        np.testing.assert_array_equal(record["depth"], 65536 / (raw.astype(np.float32) + 1))
    seven = load("synthia", "train", data_dir=tmp_path, label_space="super7")[0]["label"]
    np.testing.assert_array_equal(np.unique(seven), [*range(7), 255])


def test_cityscapes(tmp_path):
    source = cityscapes(tmp_path / "source")
    open_split = _prepared("cityscapes", source, tmp_path)
    assert {split: len(open_split(split)) for split in ("train", "val", "test")} == {"train": 4, "val": 4, "test": 2}
    train = open_split("train")
    assert train.ids()[0] == "aachen_000000_000019" and train.ids()[-1] == "ulm_000000_000039"
    np.testing.assert_array_equal(train[3]["label"], lookup_table("cityscapes", "cityscapes19")[ids(range(34))])
    assert not open_split("test").labelled and open_split("test")[0].keys() == {"image", "id"}
    stored = records.open_split(records.prepared_folder("cityscapes", tmp_path), "val")
    file = source / "leftImg8bit" / "val" / "frankfurt" / "frankfurt_000000_000019_leftImg8bit.png"
    assert stored[0]["image"] == file.read_bytes()


@pytest.mark.parametrize("space", ["cityscapes19", "synthia16", "common13", "super7"])
def test_cityscapes_in_every_label_space(tmp_path, space):
    data = _prepared("cityscapes", cityscapes(tmp_path / "source"), tmp_path)("val", space)
    classes = label_space(space).num_classes
    np.testing.assert_array_equal(np.unique(data[0]["label"]), [*range(classes), 255])


def test_crosscity(tmp_path):
    open_split = _prepared("crosscity/rome", crosscity(tmp_path / "source"), tmp_path)
    train, test = open_split("train"), open_split("test")
    assert (len(train), train.labelled, len(test), test.labelled) == (3, False, 2, True)
    assert test.ids() == ["pano_t0", "pano_t1"] and test.label_space.num_classes == 13
    np.testing.assert_array_equal(np.unique(test[1]["label"]), [*range(13), 255])
    with pytest.raises(UserError, match=r"python -m jaxuda.prepare crosscity/rio --manual_dir DIR"):
        load("crosscity/rio", "train", data_dir=tmp_path)


def test_mapillary(tmp_path, capsys):
    source = mapillary(tmp_path / "source")
    val = _prepared("mapillary", source, tmp_path)("val")
    assert val.label_space.classes == ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
    assert [val[i]["image"].shape[:2] for i in range(3)] == [(10, 20), (16, 9), (12, 16)]
    label = val[0]["label"].ravel()
    expected = {"road": 0, "terrain": 0, "curb": 1, "pothole": 2, "vegetation": 3, "sky": 4, "bicyclist": 5, "boat": 6}
    assert {name: label[CATEGORIES.index(name)] for name in expected} == expected
    assert label[CATEGORIES.index("water")] == label[65] == 255

    other = json.loads((source / "config_v1.2.json").read_text())
    other["labels"][3]["readable"] = "Separator"
    (source / "config_v1.2.json").write_text(json.dumps(other))
    message = _complaints(capsys, "mapillary", source, tmp_path / "data")
    assert "category 3 is 'separator', in v1.2 it is 'fence'" in message


def test_mapillary_in_nineteen_classes(tmp_path):
    """Both versions; v2.0 in the same 7 super-classes as v1.2 too."""
    prepare("mapillary", manual_dir=mapillary(tmp_path / "one"), data_dir=tmp_path)
    prepare("mapillary2", manual_dir=mapillary2(tmp_path / "two"), data_dir=tmp_path)
    first, second = (load(f"mapillary{n}", "val", data_dir=tmp_path, label_space="cityscapes19") for n in ("", "2"))
    assert second.label_space == load("mapillary2", "val", data_dir=tmp_path).label_space
    super7 = load("mapillary2", "val", data_dir=tmp_path, label_space="super7")
    expected = {"road": 0, "lane marking - crosswalk": 0, "curb": 1, "pole": 5, "traffic sign (front)": 7, "car": 13}
    expected |= {"bicyclist": 12, "on rails": 16, "traffic sign (back)": 255, "parking": 255, "unlabeled": 255}
    for data, names in ((first, CATEGORIES), (second, mapillary_two.CATEGORIES)):
        label = data[0]["label"].ravel()
        assert {name: label[names.index(name)] for name in expected} == expected
    label = second[0]["label"].ravel(), super7[0]["label"].ravel()
    more = {"garage": (2, 1), "traffic island": (1, 0), "traffic light - cyclists": (6, 2), "vehicle group": (255, 6)}
    more |= {"road median": (255, 1), "signage - store": (255, 255), "person group": (11, 5)}
    places = {name: mapillary_two.CATEGORIES.index(name) for name in more}
    assert {name: (label[0][place], label[1][place]) for name, place in places.items()} == more


def test_versions_of_mapillary_agree():
    """What both have belongs to the same class."""
    assert len(set(mapillary_two.CATEGORIES)) == 124 and mapillary_two.CATEGORIES[108] == "car"
    for space in ("cityscapes19", "super7"):
        found = [
            dict(zip(names, lookup_table(dataset, space), strict=False))
            for dataset, names in (("mapillary", CATEGORIES), ("mapillary2", mapillary_two.CATEGORIES))
        ]
        shared = found[0].keys() & found[1].keys()
        assert len(shared) > 50 and all(found[0][name] == found[1][name] for name in shared)
        assert sorted(set(found[1].values()) - {255}) == [*range(label_space(space).num_classes)]


def test_real_resolutions_pass_without_remark(tmp_path, capsys):
    _prepared("cityscapes", cityscapes(tmp_path / "source", (2048, 1024)), tmp_path)
    output = capsys.readouterr().out
    assert "published are train 2975, val 500, test 1525" in output and "not 2048x1024" not in output
    small = tmp_path / "small"
    _prepared("cityscapes", cityscapes(tmp_path / "other"), small)
    assert "train: 4 images are not 2048x1024 as published, such as" in capsys.readouterr().out


def test_bad_files_are_all_named(tmp_path, capsys):
    source = cityscapes(tmp_path / "source")
    images, labels = source / "leftImg8bit" / "train", source / "gtFine" / "train"
    whole = (images / "ulm" / "ulm_000000_000019_leftImg8bit.png").read_bytes()
    truncated = images / "ulm" / "ulm_000000_000019_leftImg8bit.png"
    truncated.write_bytes(whole[:-20])
    flipped = images / "aachen" / "aachen_000000_000019_leftImg8bit.png"
    flipped.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    wrong_size, wrong_ids = labels / "ulm" / "ulm_000000_000039_gtFine_labelIds.png", labels / "aachen"
    grey(wrong_size, ids(range(34), (8, 16)))
    grey(wrong_ids / "aachen_000000_000039_gtFine_labelIds.png", ids((0, 34, 77)))
    message = _complaints(capsys, "cityscapes", source, tmp_path / "data")
    assert f"{truncated}: cannot be read as an image (it is truncated)" in message
    assert f"{flipped}: cannot be read as an image (a checksum is wrong" in message
    assert f"{wrong_size}: is 8x16, but its image ulm_000000_000039_leftImg8bit.png is 16x8" in message
    assert "aachen_000000_000039_gtFine_labelIds.png: has ids that the dataset does not define: 34, 77" in message


def test_missing_partners_are_all_named(tmp_path, capsys):
    source = synthia(tmp_path / "source", count=30)
    top = source / "RAND_CITYSCAPES"
    for index in range(15):
        (top / "GT" / "LABELS" / f"{index:07d}.png").unlink()
    (top / "Depth" / "Depth" / "0000020.png").unlink()
    (top / "RGB" / "0000021.png").unlink()
    message = _complaints(capsys, "synthia", source, tmp_path / "data")
    assert [f"{top}/RGB/{index:07d}.png: has no label" in message for index in range(16)] == [True] * 15 + [False]
    assert f"{top}/RGB/0000020.png: has no depth" in message
    assert f"{top}/GT/LABELS/0000021.png: has no image" in message


def test_missing_folders_are_named_once(tmp_path, capsys):
    source = gta5(tmp_path / "source")
    for file in (source / "labels").iterdir():
        file.unlink()
    message = _complaints(capsys, "gta5", source, tmp_path / "data")
    assert f"{source}/labels: holds no files *.png" in message and "has no label" not in message
    message = _complaints(capsys, "crosscity/tokyo", crosscity(tmp_path / "cities"), tmp_path / "data")
    assert message.count("there is no such folder") == 3


def test_synthia_files_of_other_kinds(tmp_path, capsys):
    source = synthia(tmp_path / "source", count=4)
    top = source / "RAND_CITYSCAPES"
    image(top / "GT" / "LABELS" / "0000000.png")  # colours
    classes_and_instances(top / "GT" / "LABELS" / "0000001.png", ids((1, 23)), 3)
    grey(top / "Depth" / "Depth" / "0000002.png", ids((1,)))
    depth(top / "Depth" / "Depth" / "0000003.png", (4, 4))
    message = _complaints(capsys, "synthia", source, tmp_path / "data")
    assert "LABELS/0000000.png: holds colours" in message
    assert "LABELS/0000001.png: has ids that the dataset does not define: 23" in message
    assert "Depth/0000002.png: has 8 bits per value" in message
    assert "Depth/0000003.png: is 4x4, but its image 0000003.png is 16x8" in message


def test_a_full_disk_is_known_before(tmp_path, capsys, monkeypatch):
    source = gta5(tmp_path / "source")
    monkeypatch.setattr("jaxuda.data.preparing.shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    monkeypatch.setattr("jaxuda.data.building.Examples.__iter__", lambda _: pytest.fail("has begun all the same"))
    assert "GiB are needed, 0.0 GiB are free" in _complaints(capsys, "gta5", source, tmp_path / "data")


@pytest.fixture
def counted(tmp_path):
    """A dataset with its pixels counted, and what decoding finds in the 16 classes."""
    source = gta5(tmp_path / "source")
    grey(source / "labels" / "00001.png", ids((7, 8, 11, 3)))
    data = _prepared("gta5", source, tmp_path)("train", "synthia16")
    found = [np.bincount(data[i]["label"].ravel(), minlength=256) for i in range(3)]
    return data, np.array([[*row[:16], row[16:].sum()] for row in found])


def test_stored_counts_are_what_decoding_finds(counted):
    data, expected = counted
    data._reader = "nothing is read"
    assert data.class_pixels().dtype == np.int64
    np.testing.assert_array_equal(data.class_pixels(), expected)
    np.testing.assert_array_equal(Subset(data, ["00003", "00001"]).class_pixels(), expected[[2, 0]])
    np.testing.assert_array_equal(classes_of_images(data, 16), expected[:, :16] > 0)
    assert (expected[0, :16] > 0).sum() == 3 and (expected[1, :16] > 0).sum() == 16


def test_datasets_prepared_before_are_counted_once(counted, monkeypatch):
    data, expected = counted
    (file,) = data._folder.glob("pixels-*")
    place, whole = (data._folder, "train", data._sha256), file.read_bytes()
    prepared.write_pixel_counts(data._folder, "train", "of other data", np.ones((3, 256)))
    for left in (file.read_bytes(), None, b"", whole[:200], whole.replace(b"\7", b"\6")):
        file.unlink() if left is None else file.write_bytes(left)
        assert prepared.read_pixel_counts(*place) is None
        np.testing.assert_array_equal(data.class_pixels(), expected)
        assert prepared.read_pixel_counts(*place).shape == (3, 256)
    assert [path.name for path in data._folder.glob(".*")] == []

    file.unlink()
    with monkeypatch.context() as patched:
        patched.setattr("jaxuda.files.os.replace", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
        np.testing.assert_array_equal(data.class_pixels(), expected)
    assert not file.exists()
    damaged = [{"id": b"00001", "image": b"", "label": b"damaged"}]
    monkeypatch.setattr("jaxuda.data.records.open_split", lambda *_: damaged * 3)
    with pytest.raises(UserError, match="gta5 train: record '00001' is corrupt"):
        data.class_pixels()


def test_processes_that_count_at_once(counted):
    data, expected = counted
    (file,) = data._folder.glob("pixels-*")
    file.unlink()
    code = f"from jaxuda.data import load; print(load('gta5', 'train', data_dir={str(data._folder.parents[1])!r})"
    both = [subprocess.Popen([sys.executable, "-c", f"{code}.class_pixels().sum())"], stdout=-1) for _ in range(2)]
    assert [int(process.communicate()[0]) for process in both] == [expected.sum()] * 2
    data._reader = "nothing is read"
    np.testing.assert_array_equal(data.class_pixels(), expected)


def test_datasets_in_many_shards_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxuda.data.building._SHARD_BYTES", 2000)
    data = _prepared("gta5", gta5(tmp_path / "source", 17), tmp_path)("train")
    assert len(list((tmp_path / "gta5" / "1.0.0").glob("*.array_record*"))) > 3
    assert [data[i]["id"] for i in range(17)] == data.ids() == [f"{i:05d}" for i in range(1, 18)]
