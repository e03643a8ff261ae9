"""ACDC and Dark Zurich, prepared from tiny folders in their layouts, and wrong copies of them."""

import shutil

import layouts
import numpy as np
import pytest
from PIL import Image

from jaxuda.data import prepared, records
from jaxuda.data.datasets.acdc import Acdc
from jaxuda.data.labels import lookup_table
from jaxuda.data.records import load
from jaxuda.errors import UserError
from jaxuda.prepare import main, prepare

WHOLE = "+".join(f"acdc/{condition}" for condition in layouts.ACDC)
RAW = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def refused(capsys, name, source) -> str:
    """The message of the command, which must leave nothing."""
    data = source.parent / "refused"
    assert main([name, "--manual_dir", str(source), "--data_dir", str(data)]) == 2
    assert not list(data.glob("*/*"))
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A data folder with all conditions of ACDC and Dark Zurich."""
    top = tmp_path_factory.mktemp("night")
    prepare("acdc", manual_dir=layouts.acdc(top / "acdc-source"), data_dir=top)
    prepare("darkzurich", manual_dir=layouts.darkzurich(top / "dark-source"), data_dir=top)
    return top


# --- ACDC


def test_conditions_are_stored_once_and_joined(everything):
    whole = load(WHOLE, "val", data_dir=everything)
    alone = [load(f"acdc/{condition}", "val", data_dir=everything) for condition in layouts.ACDC]
    assert [len(each) for each in alone] == [2] * 4 and len(whole) == 8 and whole.labelled
    assert whole.ids()[:2] == ["acdc-fog+GOPR0001_frame_000003", "acdc-fog+GP010001_frame_000003"]
    assert whole.ids()[4] == "acdc-rain+GOPR0001_frame_002003"
    np.testing.assert_array_equal(whole[6]["image"], alone[3][0]["image"])
    assert (whole.class_pixels() == np.concatenate([each.class_pixels() for each in alone])).all()
    stored = {folder.name for folder in (everything / "acdc").iterdir() if folder.is_dir()}
    assert stored == set(layouts.ACDC)


def test_labels_are_train_ids(everything):
    data = load("acdc/fog", "train", data_dir=everything)
    np.testing.assert_array_equal(data[0]["label"], layouts.ids(layouts.TRAIN_IDS))
    assert not load("acdc/snow", "test", data_dir=everything).labelled
    seven = load("acdc/fog", "val", label_space="super7", data_dir=everything)
    np.testing.assert_array_equal(np.unique(seven[0]["label"]), [*range(7), 255])
    assert lookup_table("acdc", "synthia16")[9] == 255


@pytest.mark.parametrize("name", ["acdc/night", "darkzurich"])
def test_raw_ids_are_stored_as_train_ids(tmp_path, name):
    dataset = name.partition("/")[0]
    source = getattr(layouts, dataset)(tmp_path / "source")
    for file in list(source.rglob("*_gt_labelTrainIds.png")):
        file.unlink()
    prepare(name, manual_dir=source, data_dir=tmp_path)
    data = load(name, "val", data_dir=tmp_path)
    table = np.full(256, 255, np.uint8)
    table[RAW] = range(19)
    np.testing.assert_array_equal(data[0]["label"], table[layouts.ids(range(34))])
    decoded = np.stack([np.bincount(data[index]["label"].ravel(), minlength=256) for index in range(len(data))])
    np.testing.assert_array_equal(data.class_pixels(), np.column_stack([decoded[:, :19], decoded[:, 19:].sum(1)]))


def test_split_above_condition(tmp_path, everything):
    source = layouts.acdc(tmp_path / "source", swapped=True)
    prepare("acdc", manual_dir=source, data_dir=tmp_path)
    for split in ("train", "val", "test"):
        ours, theirs = (load("acdc/rain", split, data_dir=folder).ids() for folder in (tmp_path, everything))
        assert ours == theirs


def test_flattened_copies_have_no_conditions(tmp_path, capsys):
    source = layouts.acdc_flat(tmp_path / "source")
    prepare("acdc", manual_dir=source, data_dir=tmp_path)
    output = capsys.readouterr().out
    assert "acdc/fog: is not in" in output
    assert "acdc/all has train 8, val 8 images; published are train 1600, val 406, test 2000" in output
    data = load("acdc/all", "train", data_dir=tmp_path)
    assert len(data) == 8 and data.labelled and data.ids()[0] == "GOPR0001_frame_000005"
    with pytest.raises(UserError, match=r"python -m jaxuda.prepare acdc/fog --manual_dir DIR"):
        load(WHOLE, "train", data_dir=tmp_path)


def test_a_flattened_copy_beside_the_conditions_is_not_stored_again(tmp_path):
    source = layouts.acdc(tmp_path / "source")
    for kind in ("rgb_anon", "gt"):
        for file in list((source / kind / "fog" / "train").glob("*/*")):
            (source / kind / "train").mkdir(exist_ok=True)
            shutil.copy(file, source / kind / "train" / file.name)
    folders = prepare("acdc", manual_dir=source, data_dir=tmp_path)
    assert [folder.parent.name for folder in folders] == list(layouts.ACDC)


def test_published_counts():
    conditions = [Acdc.PUBLISHED[condition] for condition in layouts.ACDC]
    assert {split: sum(each[split] for each in conditions) for split in conditions[0]} == Acdc.PUBLISHED["all"]


def test_published_size(tmp_path, capsys):
    prepare("acdc/fog", manual_dir=layouts.acdc(tmp_path / "small"), data_dir=tmp_path)
    assert "train: 2 images are not 1920x1080 as published" in capsys.readouterr().out


# --- Dark Zurich


def test_dark_zurich(everything):
    train, val, test = (load("darkzurich", split, data_dir=everything) for split in ("train", "val", "test"))
    assert [len(each) for each in (train, val, test)] == [4, 4, 4]
    assert [each.labelled for each in (train, val, test)] == [False, True, False]
    assert train.ids()[0] == "GOPR0351_frame_000001" and train[0].keys() == {"image", "id"}
    np.testing.assert_array_equal(val[3]["label"], layouts.ids(layouts.TRAIN_IDS))


def test_images_by_day(everything):
    stored = prepared.open_split(prepared.prepared_folder("darkzurich", everything), "train")
    file = everything / "dark-source/rgb_anon/train/day/GOPR0345/GOPR0345_frame_000090_rgb_anon.png"
    assert [stored[index]["reference"] for index in range(4)] == [file.read_bytes()] * 4
    data = load("darkzurich", "train", data_dir=everything)
    with_day = data.with_reference()
    assert with_day[1].keys() == {"image", "reference", "id"} and "reference" not in data[1]
    np.testing.assert_array_equal(with_day[1]["reference"], np.asarray(Image.open(file)))
    with pytest.raises(UserError, match="darkzurich val: record 'GOPR0351_frame_000001' has no reference image"):
        load("darkzurich", "val", data_dir=everything).with_reference()[0]
    with pytest.raises(UserError, match="acdc/fog train has no reference images"):
        load("acdc/fog", "train", data_dir=everything).with_reference()


def test_each_archive_in_a_folder_of_its_own(tmp_path, everything):
    source = layouts.darkzurich(tmp_path / "source")
    for split in ("train", "val", "test"):
        for kind in ("rgb_anon", "gt", "corresp"):
            if (source / kind / split).is_dir():
                (source / f"Dark_Zurich_{split}" / kind).mkdir(parents=True)
                (source / kind / split).rename(source / f"Dark_Zurich_{split}" / kind / split)
    prepare("darkzurich", manual_dir=source, data_dir=tmp_path)
    for split in ("train", "val", "test"):
        ours, theirs = (load("darkzurich", split, data_dir=folder) for folder in (tmp_path, everything))
        assert ours.fingerprint == theirs.fingerprint


def test_correspondences_in_other_spelling_or_missing(tmp_path, capsys):
    source = layouts.darkzurich(tmp_path / "source")
    (table,) = source.rglob("*.csv")
    rows = [row.split(",") for row in table.read_text().splitlines()]
    table.write_text("\n".join(",".join(f"rgb_anon/{cell}_rgb_anon.png" for cell in row) for row in rows[:-1]))
    message = refused(capsys, "darkzurich", source)
    assert message.count("has no image by day in") == 1 and "GOPR0376_frame_000002_rgb_anon.png: has no" in message
    table.write_text("\n".join([*(",".join(row) for row in rows[:-1]), f"{rows[-1][0]},train/day/GOPR0345/lost"]))
    assert "day/GOPR0345/lost_rgb_anon.png: there is no such file, but corresp names it" in refused(
        capsys, "darkzurich", source
    )
    table.write_text("night\n")
    assert f"{table}, line 1: must be NIGHT,DAY, but has 1 columns" in refused(capsys, "darkzurich", source)
    shutil.rmtree(source / "corresp")
    prepare("darkzurich", manual_dir=source, data_dir=tmp_path)
    with pytest.raises(UserError, match=r"has no reference image"):
        load("darkzurich", "train", data_dir=tmp_path).with_reference()[0]


def test_images_by_day_of_another_size(tmp_path, capsys):
    source = layouts.darkzurich(tmp_path / "source")
    (day,) = (source / "rgb_anon/train/day").rglob("*.png")
    layouts.image(day, (8, 8))
    assert f"{day}: is 8x8, but its image GOPR0351_frame_000001_rgb_anon.png is 16x8" in refused(
        capsys, "darkzurich", source
    )


# --- wrong copies of both

NAMES = {"acdc": "acdc/night", "darkzurich": "darkzurich"}


def draw(dataset, tmp_path):
    """The folder, and the folder of the labels of split `val`."""
    source = getattr(layouts, dataset)(tmp_path / "source")
    return source, source / ("gt/night/val" if dataset == "acdc" else "gt/val/night")


@pytest.mark.parametrize("dataset", NAMES)
def test_other_ids_than_the_name_says(tmp_path, capsys, dataset):
    source, labels = draw(dataset, tmp_path)
    for file in list(labels.rglob("*_gt_labelIds.png")):
        file.replace(file.with_name(file.name.replace("labelIds", "labelTrainIds")))
    message = refused(capsys, NAMES[dataset], source)
    assert message.count("(raw ids of Cityscapes: files of these end in _gt_labelIds.png)") == len(
        list(labels.rglob("*TrainIds.png"))
    )
    source, labels = draw(dataset, tmp_path / "other")
    for file in list(source.rglob("*_gt_labelTrainIds.png")):
        file.replace(file.with_name(file.name.replace("labelTrainIds", "labelIds")))
    message = refused(capsys, NAMES[dataset], source)
    assert message.count("holds only the ids 0-18 and 255: these are train ids") >= len(
        list(labels.rglob("*_labelIds.png"))
    )


@pytest.mark.parametrize("dataset", NAMES)
def test_instances_and_colours_are_refused(tmp_path, capsys, dataset):
    source, labels = draw(dataset, tmp_path)
    first, second, *_ = sorted(labels.rglob("*TrainIds.png"))
    Image.fromarray(np.full(layouts.SIZE[::-1], 26001, np.uint16)).save(first)
    layouts.image(second)
    message = refused(capsys, NAMES[dataset], source)
    assert f"{first}: holds the id 26001" in message and f"{second}: holds colours" in message


@pytest.mark.parametrize("dataset", NAMES)
def test_missing_halves(tmp_path, capsys, dataset):
    source, labels = draw(dataset, tmp_path)
    (file, *_) = sorted(labels.rglob("*TrainIds.png"))
    file.unlink()
    assert f"{file.name.replace('_gt_labelTrainIds', '_rgb_anon')}: has no label" in refused(
        capsys, NAMES[dataset], source
    )
    shutil.rmtree(labels)
    assert f"{labels}: there is no such folder" in refused(capsys, NAMES[dataset], source)
    shutil.rmtree(source / "gt")
    shutil.rmtree(source / "rgb_anon")
    assert "there is no such folder" in refused(capsys, NAMES[dataset], source)


@pytest.mark.parametrize("dataset", NAMES)
def test_labels_of_the_test_split(tmp_path, capsys, dataset):
    source, labels = draw(dataset, tmp_path)
    place = source / ("gt/night/test" if dataset == "acdc" else "gt/test/night")
    shutil.copytree(labels, place)
    message = refused(capsys, NAMES[dataset], source)
    assert "is a label of the test split, which has no public ones; move" in message and str(place) in message


@pytest.mark.parametrize("dataset", NAMES)
def test_one_level_too_deep(tmp_path, capsys, dataset):
    source, _ = draw(dataset, tmp_path)
    (tmp_path / "around").mkdir()
    source.rename(tmp_path / "around" / "unpacked")
    prepare(NAMES[dataset], manual_dir=tmp_path / "around", data_dir=tmp_path)
    assert len(load(NAMES[dataset], "val", data_dir=tmp_path)) > 1
    (tmp_path / "deep").mkdir()
    (tmp_path / "around").rename(tmp_path / "deep" / "around")
    assert "there is no such folder" in refused(capsys, NAMES[dataset], tmp_path / "deep")
    assert records.load(NAMES[dataset], "val", data_dir=tmp_path)
