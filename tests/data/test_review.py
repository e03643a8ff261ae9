"""What `prepare folder` shows of the user's own data, and its warnings, on tiny files that are drawn here."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
from PIL import Image

from jaxuda.data import review
from jaxuda.data.records import load
from jaxuda.prepare import main


@pytest.fixture
def town(tmp_path) -> Path:
    """A folder without mistakes, except that every pixel has a class."""
    return tiny.draw_folder(tmp_path / "town", "town", 0)


def told(capsys, folder: Path, code: int = 0) -> str:
    """The output of the command: stdout, or stderr if it fails."""
    assert main(["folder", "--path", str(folder), "--data_dir", str(folder.parent / "data")]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def warned(capsys, folder: Path) -> list[str]:
    """The warnings, except for the one that the drawn labels always give."""
    found = [line for line in told(capsys, folder).splitlines() if line.startswith("warning: ")]
    return [line for line in found if "255 is unused" not in line]


def change_labels(folder: Path, change, splits=("train", "val")) -> None:
    for split in splits:
        for file in sorted((folder / "labels" / split).iterdir()):
            Image.fromarray(change(np.asarray(Image.open(file)).copy())).save(file)


def change_classes(folder: Path, change) -> None:
    file = folder / "classes.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_good_folder_is_shown(town, capsys):
    output = told(capsys, town)
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.split()}
    pixels = np.concatenate([cv2.imread(str(f), 0).ravel() for f in sorted(town.glob("labels/train/*"))])
    shares = np.bincount(pixels) / pixels.size
    for index, name in enumerate(tiny.CLASSES):
        train, images, _, _, weight, ids = rows[name]
        assert (train, images, ids) == (f"{shares[index]:.2%}", "6", str(index))
        expected = np.log(1.02 + shares.max()) / np.log(1.02 + shares[index])
        assert float(weight) == pytest.approx(expected, abs=0.006)
    assert rows["ignored"] == ["0.00%", "0", "0.00%", "0"]
    assert "255 is unused" in output
    again = told(capsys, town)
    assert "already prepared" in again and again.count("\n") == output.count("\n")


def test_the_sheet_lays_labels_over_their_images(town, capsys):
    told(capsys, town)
    (file,) = (town.parent / "data").glob("folder/*/*/preview.png")
    sheet = np.asarray(Image.open(file))
    data = load("folder", "train", path=str(town), data_dir=town.parent / "data")
    ids = range(6)
    height, width = round(32 * 320 / 48), 320
    assert sheet.shape[1] == 3 * width and sheet.shape[0] > 12 * height
    top = sheet.shape[0] - 12 * (height + 20) + 20  # below the names of the classes and of the first image
    image, laid_over, colours = np.split(sheet[top : top + height].astype(float), 3, 1)
    label = cv2.resize(data[ids[0]]["label"], (width, height), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(colours, data.label_space.palette[label])
    np.testing.assert_allclose(laid_over, 0.45 * image + 0.55 * colours, atol=1)


def test_images_of_the_sheet_show_all_classes():
    shown = np.zeros((50, 4), bool)
    shown[:, 0], shown[17, 1], shown[33, [1, 2]], shown[41, 3] = True, True, True, True
    assert {33, 41} <= set(review._chosen(shown)) and len(set(review._chosen(shown))) == 6
    assert review._chosen(shown[:3]) == [0, 1, 2]
    assert review._chosen(np.zeros((9, 2), bool)) == [0, 1, 3, 4, 6, 8]


def test_ids_that_are_off_by_one(town, capsys):
    change_labels(town, lambda label: np.clip(label + 1, 1, 2))
    assert "no pixel has the id 0 (ground), the lowest in classes.json: do the labels count from 1?" in "".join(
        warned(capsys, town)
    )
    # An id beyond those of the classes is an error; the message gives a likely cause.
    change_labels(town, lambda label: label + 1)
    assert "does not define: 3 (classes.json names 0-2; do the labels count from 1?; ids of no class" in told(
        capsys, town, 2
    )


def test_classes_that_are_off_by_one(town, capsys):
    def count_from_one(content):
        for index, entry in enumerate(content["classes"]):
            entry["ids"] = [index + 1]

    change_classes(town, count_from_one)
    assert "(classes.json names 1-3; do the labels count from 0?" in told(capsys, town, 2)
    change_classes(town, lambda content: content.update(ignore=[0]))
    text = "\n".join(warned(capsys, town))
    assert "no pixel has the id 3 (sky), the highest in classes.json, but " in text
    assert "have 0, which is ignored: do the labels count from 0?" in text


def test_colours_in_place_of_ids(town, capsys):
    palette = np.array([[0, 90, 40], [80, 90, 40], [160, 90, 40]], np.uint8)
    change_labels(town, lambda label: palette[label])
    assert "not class ids; save it as a grey or palette PNG of ids; it is colour-coded (ground, box, sky, ...)" in told(
        capsys, town, 2
    )
    change_labels(town, lambda colours: np.repeat(colours[..., :1] // 80, 3, 2))
    assert "its three channels are alike" in told(capsys, town, 2)


def test_a_palette_that_contradicts_the_classes(town, capsys):
    file = town / "labels" / "train" / "0.png"
    label = np.asarray(Image.open(file))
    for palette, expected in (([0, 90, 40, 80, 90, 40, 160, 90, 40], 0), ([160, 90, 40, 0, 90, 40, 80, 90, 40], 1)):
        picture = Image.fromarray(label, "P")
        picture.putpalette(palette)
        picture.save(file)
        found = [text for text in warned(capsys, town) if "its palette shows the id 0 in the colour of sky" in text]
        assert len(found) == expected


def test_masks_of_0_and_255(town, capsys):
    change_labels(town, lambda label: np.where(label == 1, 255, 0).astype(np.uint8))
    text = "\n".join(warned(capsys, town))
    assert "the labels only hold ground and 255, and 255 always means 'ignored'" in text
    assert "classes.json names classes that no label shows: box, sky" in text


def draw_masks(folder: Path, classes: int, border: bool) -> None:
    """Two of three masks hold 0 and 1, the others 0 and 255; with a border, all have one of 255."""
    change_classes(folder, lambda content: content.update(classes=content["classes"][:classes]))
    for split in ("train", "val"):
        for number, file in enumerate(sorted((folder / "labels" / split).iterdir())):
            thing = (np.asarray(Image.open(file)) == 1) * (255 if number % 3 == 1 else 1)
            if border:
                thing[0] = 255
            Image.fromarray(thing.astype(np.uint8)).save(file)


@pytest.mark.parametrize("classes", [2, 3])
def test_masks_of_both_kinds(town, capsys, classes):
    draw_masks(town, classes, border=False)
    (text,) = [text for text in warned(capsys, town) if "masks of 0 and 255" in text]
    assert f"4 of 12 labels, such as {town}/labels/train/1.png, only hold ground and 255" in text


@pytest.mark.parametrize("classes", [2, 3])
def test_borders_of_255_are_no_masks(town, capsys, classes):
    """Unless there are two classes: a label of one of them and 255 is then suspicious."""
    draw_masks(town, classes, border=True)
    assert any("masks of 0 and 255" in text for text in warned(capsys, town)) == (classes == 2)


@pytest.mark.parametrize(("tag", "square"), [(2, False), (3, False), (4, False), (6, True), (8, True)])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_images_that_exif_turns(tmp_path, capsys, tag, square, suffix):
    town = tiny.draw_folder(tmp_path / "town", "town", 0)
    exif = Image.Exif()
    exif[0x0112] = tag
    for number, file in enumerate(sorted((town / "images").rglob("*.png"))):
        picture = Image.open(file).copy()
        label = town / "labels" / file.relative_to(town / "images")
        if square:
            picture = picture.crop((0, 0, 32, 32))
            Image.open(label).crop((0, 0, 32, 32)).save(label)
        file.unlink()
        picture.save(file.with_suffix(suffix), **({"exif": exif} if number % 4 else {}))
    (text,) = warned(capsys, town)
    assert "warning: 9 images are turned or mirrored by their EXIF tag, such as " in text
    assert f"{town}/images/train/1{suffix}" in text
    assert "already prepared" in (again := told(capsys, town)) and "9 images are turned" in again


def test_images_that_exif_turns_to_another_size_need_no_warning(tmp_path, capsys):
    town, exif = tiny.draw_folder(tmp_path / "town", "town", 0), Image.Exif()
    exif[0x0112] = 6
    for file in (town / "images").rglob("*.png"):
        Image.fromarray(np.rot90(np.asarray(Image.open(file)))).save(file, exif=exif)
    assert warned(capsys, town) == []
    label = town / "labels" / "train" / "0.png"
    Image.fromarray(np.rot90(np.asarray(Image.open(label)))).save(label)
    assert f"{label}: is 32x48, but its image 0.png is 48x32 (upright: if its EXIF tag turns" in told(capsys, town, 2)


def test_255(town, capsys):
    assert "255 is unused" in told(capsys, town)
    change_labels(town, lambda label: np.where(label == 2, 255, label))
    assert "255 is unused" not in told(capsys, town)
    change_labels(town, lambda label: np.where(np.arange(48) < 40, 255, label).astype(np.uint8))
    assert any("of the pixels belong to no class" in text for text in warned(capsys, town))


def test_images_in_both_splits(town, capsys):
    assert warned(capsys, town) == []
    first = town / "images" / "train" / "1.png"
    (town / "images" / "val" / "4.png").write_bytes(first.read_bytes())
    (text,) = warned(capsys, town)
    assert f"in more than one split (1 times), such as {first} and {town}/images/val/4.png" in text
    (town / "images" / "val" / "4.png").write_bytes((town / "images" / "val" / "5.png").read_bytes())
    (text,) = warned(capsys, town)
    assert f"the same image twice (1 times), such as {town}/images/val/4.png and {town}/images/val/5.png" in text


def test_missing_and_rare_classes(town, capsys):
    def only_a_dot(label):
        label[label == 1] = 0
        label[20, 20] = 1
        return label

    change_labels(town, only_a_dot, ["train"])
    (text,) = warned(capsys, town)
    assert "box: less than a 100th of the pixels of ground" in text
    assert '--config.class_weights="(1,' in text
    change_labels(town, lambda label: np.where(label == 1, 0, label), ["train"])
    (text,) = warned(capsys, town)
    assert "no label of train shows box, which cannot be learned there" in text


def test_unlabelled_folders_are_only_counted(tmp_path, capsys):
    bare = tiny.draw_folder(tmp_path / "bare", "bare", 0, labelled=False)
    output = told(capsys, bare)
    assert "train: 6 images, unlabelled" in output and "class" not in output
    assert not list((tmp_path / "data").glob("folder/*/*/preview.png"))
