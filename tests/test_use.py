"""A trained stage in use: scored and labelled with by the names of its classes, on images as they lie in folders."""

import json
import os
import re
import shutil
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import jaxuda
from jaxuda import convert
from jaxuda.cli import MISTAKE
from jaxuda.data import encoding
from jaxuda.errors import UserError
from jaxuda.inference.restore import parse_checkpoint, restore
from jaxuda.main import main
from jaxuda.sweeps.predict import ImageFiles
from jaxuda.training import checkpoints
from jaxuda.training.classes import fit_classes, of_stage

ROOT = Path(__file__).parents[1]
COLOURS = np.array([[0, 90, 40], [80, 90, 40], [160, 90, 40]])


@pytest.fixture(scope="module")
def stage(data, tmp_path_factory) -> Path:
    """A stage that has learned enough to tell the three classes apart."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    os.chdir(ROOT)
    words = tiny.arguments("source_only", workdir=workdir, **data)
    more = ["--config.pipeline=('source_only',)", "--config.source_only.steps=12", "--config.eval_every=12"]
    assert main(["jaxuda", *words, *more]) == 0
    return workdir / "source_only"


def with_classes(data: dict, folder: Path, change) -> dict:
    """The same data, in which `change` was applied to the list of classes, prepared."""
    for domain in ("source", "target"):
        shutil.copytree(data[domain], folder / domain)
        file = folder / domain / "classes.json"
        table = json.loads(file.read_text())
        file.write_text(json.dumps(table | {"classes": change(table["classes"])}))
        assert tiny.prepare.main(["folder", f"--path={folder / domain}", f"--data_dir={folder / 'tfds'}"]) == 0
    return {"source": folder / "source", "target": folder / "target", "data_dir": folder / "tfds"}


def reversed_classes(classes: list) -> list:
    return classes[::-1]


def renamed_classes(classes: list) -> list:
    return [entry | {"name": name} for entry, name in zip(classes, ("cat", "dog", "bird"), strict=True)]


def using(data: dict, stage: Path, mode: str, *more: str) -> list[str]:
    words = tiny.arguments("source_only", workdir=stage.parent, **data)
    return ["jaxuda", *words, f"--mode={mode}", f"--checkpoint={stage}", *more]


def as_older(stage: Path, folder: Path) -> Path:
    """A copy of a work folder whose stage does not record its classes, as earlier builds wrote it."""
    shutil.copytree(stage.parent, folder)
    file = folder / stage.name / "stage.json"
    record = json.loads(file.read_text())
    del record["classes"]
    file.write_text(json.dumps(record))
    return folder / stage.name


def read_ids(folder: Path, name: str) -> np.ndarray:
    return cv2.imread(str(folder / "predictions" / "ids" / f"{name}.png"), cv2.IMREAD_UNCHANGED)


@pytest.mark.slow
def test_a_stage_records_its_classes_outside_of_its_fingerprint(stage: Path) -> None:
    record = json.loads((stage / "stage.json").read_text())
    classes = [{"name": name, "ids": [i], "color": COLOURS[i].tolist()} for i, name in enumerate(tiny.CLASSES)]
    assert record["classes"] == {"name": "tiny_source", "classes": classes}
    assert "classes" not in record["identity"] and of_stage(stage).classes == tiny.CLASSES


@pytest.mark.parametrize("older", [False, True])
def test_eval_and_predict_put_classes_in_order_by_name(data, stage, tmp_path, capsys, older: bool) -> None:
    stage = as_older(stage, tmp_path / "older") if older else stage
    other = with_classes(data, tmp_path / "reversed", reversed_classes)
    capsys.readouterr()
    scores = []
    for place in (data, other):
        assert main(using(place, stage, "eval")) == 0
        text = capsys.readouterr().out
        scores.append(
            {name: re.search(rf"{re.escape(name)}\s+([\d.]+)", text)[1] for name in (*tiny.CLASSES, "mIoU (3)")}
        )
    assert (
        f"{stage}: its classes were put in the order of this config: sky, box, ground (it has ground, box, sky)" in text
    )
    assert scores[0] == scores[1] and len(set(scores[0].values())) > 2
    for place, out in ((data, "ours"), (other, "theirs")):
        words = [f"--images={data['target']}/images/val", f"--workdir={tmp_path / out}"]
        assert main(using(place, stage, "predict", *words)) == 0
    ours, theirs = (read_ids(tmp_path / out, "0") for out in ("ours", "theirs"))
    np.testing.assert_array_equal(theirs, 2 - ours)
    assert len(np.unique(ours)) > 1


@pytest.mark.parametrize("older", [False, True])
def test_eval_and_predict_refuse_other_classes(data, stage, tmp_path, capsys, older: bool) -> None:
    stage = as_older(stage, tmp_path / "older") if older else stage
    renamed = with_classes(data, tmp_path / "renamed", renamed_classes)
    fewer = with_classes(data, tmp_path / "fewer", lambda c: [c[0] | {"ids": [0, 1]}, c[2]])
    for place, theirs in ((renamed, "the 3 classes cat, dog, bird"), (fewer, "the 2 classes ground, sky")):
        for words in (["eval"], ["predict", f"--images={data['target']}/images"]):
            assert main(using(place, stage, *words)) == MISTAKE
            message = capsys.readouterr().err
            assert (
                f"{stage} was trained on the 3 classes ground, box, sky, but this config has {theirs}: use" in message
            )


def test_a_start_from_other_classes(data, stage, tmp_path) -> None:
    model, variables, _ = restore(str(stage))
    arrays, _ = checkpoints.read_variables(stage / "checkpoints")
    zeros = jax.tree.map(np.zeros_like, variables)

    fitted, notes = fit_classes(arrays, zeros, model, stage, ("sky", "ground", "box"))
    assert notes == ["its classes were put in the order of this config: sky, ground, box (it has ground, box, sky)"]
    for ours, theirs in zip(
        *map(jax.tree.leaves, (fitted["params"]["head"], variables["params"]["head"])), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs[..., [2, 0, 1]])
    jax.tree.map(np.testing.assert_array_equal, fitted["params"]["backbone"], variables["params"]["backbone"])

    fitted, notes = fit_classes(arrays, zeros, model, stage, ("cat", "box", "sky"))
    assert notes == [
        "head starts anew: the checkpoint's is for the 3 classes ground, box, sky, "
        "this network has the 3 classes cat, box, sky"
    ]
    assert not any(leaf.any() for leaf in jax.tree.leaves(fitted["params"]["head"]))
    jax.tree.map(np.testing.assert_array_equal, fitted["params"]["backbone"], variables["params"]["backbone"])

    for classes in (tiny.CLASSES, ()):  # the same, and unknown ones
        fitted, notes = fit_classes(arrays, zeros, model, stage, classes)
        assert notes == []
        jax.tree.map(np.testing.assert_array_equal, fitted, variables)


@pytest.mark.slow
def test_a_run_says_what_it_starts_from(data, stage, tmp_path, capsys) -> None:
    for change, expected in (
        (reversed_classes, "source_only: its classes were put in the order of this config: sky, box, ground"),
        (renamed_classes, "source_only: head starts anew: the checkpoint's is for the 3 classes ground, box, sky"),
    ):
        folder = tmp_path / change.__name__
        words = tiny.arguments("source_only", workdir=folder / "run", **with_classes(data, folder, change))
        more = [
            f"--config.source_only.init={stage}",
            "--config.source_only.steps=1",
            "--config.pipeline=('source_only',)",
        ]
        assert main(["jaxuda", *words, *more]) == 0
        assert expected in capsys.readouterr().out


def test_predict_needs_neither_config_nor_source(data, stage, tmp_path, capsys) -> None:
    images = f"--images={data['target']}/images/val"
    assert main(using(data, stage, "predict", images, f"--workdir={tmp_path / 'with'}")) == 0
    alone = ["jaxuda", "--mode", "predict", f"--checkpoint={stage}", images]
    assert main([*alone, f"--workdir={tmp_path / 'alone'}"]) == 0
    recipe = ["--config=configs/source_only.py:folder", "--config.source.path=/not/here"]
    assert main([*alone, *recipe, f"--workdir={tmp_path / 'elsewhere'}"]) == 0
    expected = read_ids(tmp_path / "with", "3")
    predictor = jaxuda.load(str(stage))
    assert predictor.classes == tiny.CLASSES
    image = encoding.read_image_file((data["target"] / "images" / "val" / "3.png").read_bytes())
    np.testing.assert_array_equal(predictor.predict(image)[0], expected)
    for place in ("alone", "elsewhere"):
        np.testing.assert_array_equal(read_ids(tmp_path / place, "3"), expected)
        colour = cv2.imread(str(tmp_path / place / "predictions" / "colour" / "3.png"))[..., ::-1]
        np.testing.assert_array_equal(colour, COLOURS[expected])

    capsys.readouterr()
    for words, message in (
        ([*alone, "--config.test.flip=True"], "--config.test.flip=True sets a field of a recipe: add the recipe"),
        (["jaxuda", "--mode=eval", f"--checkpoint={stage}"], "which recipe?"),
        (["jaxuda", "--mode=predict", images], "name a model: --checkpoint DIR"),
        (
            ["jaxuda", "--mode=predict", images, f"--checkpoint={as_older(stage, tmp_path / 'older')}"],
            "source_only does not have the colours of its classes (an older jaxuda trained it): add --config",
        ),
    ):
        assert main(words) == MISTAKE
        assert message in capsys.readouterr().err


def test_a_folder_with_a_comma_is_one_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "lr=0.1,seed=0"
    place.mkdir()
    assert parse_checkpoint(str(place)) == [(str(place), "last")]
    assert parse_checkpoint(f"{place}/a,b:best") == [
        (f"{tmp_path}/lr=0.1", "last"),
        ("seed=0/a", "last"),
        ("b", "best"),
    ]


def test_a_checkpoint_that_is_no_stage_names_what_was_meant(stage, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(stage.parent, run)
    shutil.copytree(run / "source_only", run / "adapt")
    shutil.copytree(run / "source_only", run / "oracle")
    record = json.loads((run / "adapt" / "stage.json").read_text())
    record["identity"]["domains"] = ["source", "target"]
    (run / "adapt" / "stage.json").write_text(json.dumps(record))
    shutil.copy2(run / "source_only" / "stage.json", run / "oracle" / "stage.json")
    (run / "oracle" / "stage.json").touch()
    (tmp_path / "x.pth").write_bytes(b"")
    wrong = "is not the folder of a training stage"
    cases = {
        str(
            run
        ): f"{wrong}: it is a work folder; give one of its stages (source_only, adapt, oracle), such as {run}/adapt",
        f"{run}/adapt/checkpoints": f"{wrong}: it lies in one, {run}/adapt\n",
        f"{run}/adapt/checkpoints/12": f"{wrong}: it lies in one, {run}/adapt:12\n",
        f"{tmp_path}/x.pth": f"convert a torch file with python -m jaxuda.convert {tmp_path}/x.pth --config FILE",
        f"{run}/adapt/stage.json": f"{wrong}: it is a file; give {run}/adapt\n",
        f"{tmp_path}/nowhere": f"{wrong}: there is no such folder",
        str(tmp_path): f"{wrong} (it has no stage.json of one)",
    }
    for checkpoint, expected in cases.items():
        assert main(["jaxuda", "--mode=predict", f"--checkpoint={checkpoint}", f"--images={ROOT}/README.md"]) == MISTAKE
        assert expected in capsys.readouterr().err
        with pytest.raises(UserError, match=re.escape(expected.strip())):
            jaxuda.load(checkpoint)


# Images as they lie in folders


def photos(folder: Path, *names: str) -> Path:
    """Small photos, the content of each decided by its name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(sum(name.encode())).integers(0, 256, (10, 14, 3), np.uint8)
        kind = {".jfif": "JPEG", ".jpe": "JPEG", ".webp": "WEBP", ".tif": "TIFF"}.get(Path(name).suffix)
        Image.fromarray(image).save(folder / name, kind)
    return folder


def found(images: Path | str) -> list[str]:
    listed = ImageFiles(str(images))
    return [listed[index]["id"] for index in range(len(listed))]


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    photos(
        tmp_path,
        "photo[1].jpg",
        "photo1.jpg",
        "a [2024]/x.jpg",
        "a [2024]/deep/y.jpg",
        "a 2/z.jpg",
        "b/*.png",
        "b/c.png",
    )
    assert found(tmp_path / "photo[1].jpg") == ["photo[1]"]
    assert found(tmp_path / "photo[0-9].jpg") == ["photo1"]
    assert found(tmp_path / "a [2024]" / "*.jpg") == ["x"]
    assert found(tmp_path / "a [2024]" / "**" / "*.jpg") == ["y", "x"]
    assert found(tmp_path / "a [2024]") == ["y", "x"]
    assert found(tmp_path / "b" / "*.png") == ["*"]
    assert found(tmp_path / "a [2025]" / "*.jpg") == ["z"]
    with pytest.raises(UserError, match="matches no file"):
        found(tmp_path / "b [2024]" / "*.jpg")


def test_relative_patterns_and_the_home_folder(tmp_path: Path, monkeypatch) -> None:
    photos(tmp_path / "home", "a.jpg", "[b]/c.jpg")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    assert sorted(found("~")) == ["a", "c"]
    assert found("~/*.jpg") == found("a.jpg") == ["a"] and found("[b]/*.jpg") == ["c"]


def test_a_second_run_does_not_label_the_first_ones_output(stage, tmp_path, capsys) -> None:
    place = photos(tmp_path / "photos", "a.jpg", "deep/b.jpg", "predictions/c.jpg")
    for out in (place, place, place / "again", place):
        assert main(["jaxuda", "--mode=predict", f"--checkpoint={stage}", f"--images={place}", f"--workdir={out}"]) == 0
        assert sorted(path.name for path in (out / "predictions" / "ids").iterdir()) == ["a.png", "b.png", "c.png"]
    assert f"left out: 12 predictions of an earlier run, such as {place}/again/predictions/colour/a.png" in (
        capsys.readouterr().out
    )
    with pytest.raises(UserError, match=r"matches no file .*; left out: 3 predictions of an earlier run"):
        ImageFiles(str(place / "again" / "predictions" / "ids"))


def test_kinds_of_files_in_a_folder(tmp_path: Path) -> None:
    names = ("a.jpg", "b.JPEG", "c.webp", "d.tif", "e.bmp", "f.jfif", "g.jpe", "h.png", "i.TIFF")
    photos(tmp_path, *names, ".hidden.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "deep/.cache/x.jpg")
    (tmp_path / "._a.jpg").write_bytes(b"\0\5\x16\7" + b"x" * 100)
    (tmp_path / "film.mp4").write_bytes(b"")
    (tmp_path / "photo.heic").write_bytes(b"")
    (tmp_path / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    listed = ImageFiles(str(tmp_path))
    assert [listed[index]["id"] for index in range(len(listed))] == list("abcdefghi")
    (line,) = listed.left_out
    assert line.startswith("left out: 3 files that are not .jpg, ") and line.endswith(f"such as {tmp_path}/film.mp4")
    (tmp_path / "link").symlink_to(tmp_path)
    assert len(ImageFiles(str(tmp_path / "link"))) == 9


def test_bad_images_are_named_together_and_the_others_are_labelled(stage, tmp_path, capsys) -> None:
    place = photos(tmp_path / "photos", *(f"{index}.jpg" for index in range(6)), "webp.webp", f"{'x' * 240}.jpg")
    (place / "1.jpg").write_bytes(b"")
    (place / "3.jpg").write_bytes((place / "3.jpg").read_bytes()[:200])
    (place / "webp.webp").rename(place / "5.jpg")  # of another kind than its name says
    words = ["jaxuda", "--mode=predict", f"--checkpoint={stage}", f"--images={place}", f"--workdir={tmp_path / 'out'}"]
    assert main(words) == MISTAKE
    output = capsys.readouterr()
    assert sorted(path.stem for path in (tmp_path / "out" / "predictions" / "ids").iterdir()) == ["0", "2", "4", "5"]
    assert "4 predictions in" in output.out
    assert output.err.startswith("error: 3 of 7 images cannot be read and have no prediction:\n")
    assert "xxx cannot be the name of a file in predictions: give the image another name" in output.err
    assert f"\n  {place}/1.jpg: cannot be read" in output.err and f"\n  {place}/3.jpg: cannot be read" in output.err
    for index in (0, 2, 4, 5):
        (place / f"{index}.jpg").write_bytes(b"")
    assert main(words) == MISTAKE
    assert capsys.readouterr().err.startswith("error: 7 of 7 images cannot be read")


def test_images_of_16_bits_that_hold_fewer(data, stage, tmp_path, capsys) -> None:
    image = encoding.read_image_file((data["target"] / "images" / "val" / "0.png").read_bytes())
    place = tmp_path / "photos"
    place.mkdir()
    cv2.imwrite(str(place / "deep.png"), image[..., ::-1].astype(np.uint16) << 4)
    cv2.imwrite(str(place / "full.tif"), image[..., ::-1].astype(np.uint16) << 8)
    cv2.imwrite(str(place / "plain.png"), image[..., ::-1])
    words = ["jaxuda", "--mode=predict", f"--checkpoint={stage}", f"--workdir={tmp_path / 'out'}"]
    assert main([*words, f"--images={place}"]) == 0
    highest = int(image.max()) << 4
    expected = (
        rf"warning: 1 of the 2 images of 16 bits use only the values \d+ to {highest} of 65535, such as {place}/d"
    )
    assert re.search(expected, capsys.readouterr().out)
    full = read_ids(tmp_path / "out", "full")
    np.testing.assert_array_equal(full, read_ids(tmp_path / "out", "plain"))
    assert main([*words, f"--images={place}/deep.png", "--image_bits=12"]) == 0
    assert "warning" not in capsys.readouterr().out
    np.testing.assert_array_equal(read_ids(tmp_path / "out", "deep"), full)
    capsys.readouterr()
    assert main([*words, f"--images={place}/deep.png", "--image_bits=8"]) == 0
    assert f"1 images have values above 255, up to {highest}, such as {place}/deep.png" in capsys.readouterr().out
    assert main([*words, f"--images={place}", "--image_bits=7"]) == MISTAKE
    assert capsys.readouterr().err == "error: --image_bits=7: 7 is not an integer in the range [8, 16]\n"


def test_images_whose_predictions_would_have_one_name_are_named(stage, tmp_path, capsys) -> None:
    place = photos(tmp_path / "photos", "a/b.png", "a__b.png", "b.png")
    words = ["jaxuda", "--mode=predict", f"--checkpoint={stage}", f"--images={place}", f"--workdir={tmp_path / 'out'}"]
    assert main(words) == MISTAKE
    output = capsys.readouterr()
    assert "2 predictions in" in output.out
    names = sorted(path.name for path in (tmp_path / "out" / "predictions" / "ids").iterdir())
    assert names == ["a__b.png.png", "b.png.png"]
    assert output.err.startswith("error: 1 of 3 images cannot be read and have no prediction:\n")
    assert f"\n  {place}/a__b.png: its prediction would have the name of that of {place}/a/b.png" in output.err


# The home folder


@pytest.mark.slow
def test_every_command_expands_the_home_folder(data, stage, tmp_path, monkeypatch, capsys) -> None:
    home = photos(tmp_path / "home", "photos/a.jpg")
    shutil.copytree(stage.parent, home / "run")
    monkeypatch.setenv("HOME", str(home))
    here = set(os.listdir())
    words = ["--mode=predict", "--checkpoint=~/run/source_only", "--images=~/photos", "--workdir=~/out"]
    assert main(["jaxuda", *words]) == 0
    assert (home / "out" / "predictions" / "ids" / "a.png").exists()
    assert main(["jaxuda", *words, "--checkpoint=~/run/source_only:last,~/run/source_only", "--images=~/*/a.jpg"]) == 0
    assert jaxuda.load("~/run/source_only").classes == tiny.CLASSES
    assert convert.main(["~/run/source_only", "--export=~/net.pth"]) == 0
    recipe = [word for word in using(data, stage, "eval") if word.startswith("--config") and "every" not in word]
    recipe = [word for word in recipe if not word.startswith(("--config.oracle", "--config.source_only"))]
    assert convert.main(["~/net.pth", *recipe, "--out=~/converted"]) == 0
    assert (home / "net.pth").exists() and of_stage(home / "converted").classes == tiny.CLASSES
    assert main(["jaxuda", *words, "--checkpoint=~/converted", "--workdir=~/other"]) == 0
    assert (home / "other" / "predictions" / "colour" / "a.png").exists()
    other = with_classes(data, tmp_path / "reversed", reversed_classes)
    swapped = [word.replace(str(data["source"]), str(other["source"])) for word in recipe]
    swapped = [word.replace(str(data["data_dir"]), str(other["data_dir"])) for word in swapped]
    assert convert.main(["~/net.pth", *swapped, "--out=~/converted"]) == MISTAKE  # the same weights mean other classes
    assert convert.main(["~/net.pth", *recipe, "--out=~/converted"]) == 0
    workdir = [word if "--workdir" not in word else "--workdir=~/run" for word in using(data, stage, "eval")]
    assert main(["jaxuda", *workdir[1:-2], "--dry_run", "--config.pipeline=('source_only',)"]) == 0
    assert set(os.listdir()) == here
