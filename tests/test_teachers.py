"""What people see of a training with a teacher: pictures, scores of both networks, the share of confident pixels."""

import re
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from methods.test_contract import begin, make_batch, stage_config
from ml_collections import ConfigDict
from plugins import noisy_teacher
from plugins.network_recipe import NETWORK
from tensorboardX.proto.event_pb2 import Event

import jaxuda
from jaxuda import files, methods, parallel, report
from jaxuda.cli import MISTAKE, parse
from jaxuda.data import encoding
from jaxuda.data.labels import colourise, make_label_space
from jaxuda.data.sheet import HEADING, contact_sheet
from jaxuda.errors import UserError
from jaxuda.main import main
from jaxuda.models import make_model
from jaxuda.pipeline import recipe, stages
from jaxuda.report.gallery import make_gallery
from jaxuda.report.runs import read_run
from jaxuda.training import checkpoints, loop, pictures

ROOT = Path(__file__).parents[1]
HEIGHT, WIDTH = 32, 48
COLUMNS = ("source", "target", "pseudo_label", "confident")


@pytest.fixture(scope="module")
def words(data) -> list[str]:
    places = {"source.path": data["source"], "target.path": data["target"], "data_dir": data["data_dir"]}
    fields = [f"--config.{field}={place}" for field, place in places.items()]
    return ["jaxuda", "--config=tests/plugins/network_recipe.py", *fields, "--config.eval_every=2"]


@pytest.fixture(scope="module")
def work(words, tmp_path_factory) -> Path:
    """A finished work folder; the teacher is the evaluated network."""
    folder = tmp_path_factory.mktemp("work") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main([*words, f"--workdir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def space(work):
    colours = {name: (80 * index, 90, 40) for index, name in enumerate(tiny.CLASSES)}
    return make_label_space("tiny", colours)


@pytest.fixture
def folder(work: Path, tmp_path: Path) -> Path:
    """An empty work folder; a run in it takes over source only from `work`."""
    shutil.copytree(work / "source_only", tmp_path / "finished" / "source_only")
    return tmp_path / "run"


def cells(path: Path, columns: int) -> list[list[np.ndarray]]:
    """The cells of a sheet, by row and column."""
    sheet = encoding.decode_image(path.read_bytes())[HEADING:]
    assert sheet.shape[1] == columns * WIDTH and len(sheet) % HEIGHT == 0
    return [np.split(row, columns, axis=1) for row in np.split(sheet, len(sheet) // HEIGHT)]


def images(folder: Path, split: str) -> list[np.ndarray]:
    return [encoding.decode_image(p.read_bytes()) for p in sorted((folder / "images" / split).iterdir())]


@pytest.mark.slow
def test_the_sheets_show_what_the_training_looks_at(work: Path, data: dict, space) -> None:
    names = {f"000000{step}-{kind}.png" for step in (2, 4) for kind in ("training", "predictions")}
    assert {path.name for path in (work / "adapt" / "pictures").iterdir()} == names
    assert not (work / "source_only" / "pictures").exists()
    rows = cells(pictures.sheet_path(work / "adapt", 4, pictures.TRAINING), len(COLUMNS))
    assert len(rows) == 1  # two devices share the batch of two
    for source, target, pseudo, confident in rows:
        for cell, domain in ((source, "source"), (target, "target")):
            known = [view for image in images(data[domain], "train") for view in (image, image[:, ::-1])]
            assert any(np.abs(cell.astype(int) - image).max() <= 1 for image in known), domain
        assert {tuple(colour) for colour in pseudo.reshape(-1, 3)} <= {tuple(colour) for colour in space.palette}
        assert set(np.unique(confident)) <= {0, 255}


def test_the_networks_stand_beside_the_labels(work: Path, data: dict, space) -> None:
    rows = cells(pictures.sheet_path(work / "adapt", 4, pictures.PREDICTIONS), 4)
    assert len(rows) == pictures.EXAMPLES
    shown = [0, 1, 3, 5]
    validation = images(data["target"], "val")
    truths = [encoding.decode_label(p.read_bytes()) for p in sorted((data["target"] / "labels" / "val").iterdir())]
    teacher, student = (jaxuda.load(str(work / "adapt"), network=name) for name in ("teacher", "student"))
    for index, (image, truth, *predicted) in zip(shown, rows, strict=True):
        np.testing.assert_array_equal(image, validation[index])
        np.testing.assert_array_equal(truth, colourise(truths[index], space))
        for cell, network in zip(predicted, (teacher, student), strict=True):
            ids, _ = network.predict(validation[index])
            assert np.mean(np.all(cell == colourise(ids, space), -1)) > 0.999


def arrays(folder: Path) -> dict[str, np.ndarray]:
    saved = checkpoints.Checkpoints(folder / "adapt" / "checkpoints", read_only=True)
    try:
        return saved.read(4)
    finally:
        saved.close()


def assert_same(ours: Path, theirs: Path) -> None:
    """The same states to the last bit, and the same figures."""
    actual, expected = arrays(ours), arrays(theirs)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
    assert (ours / "adapt" / "evaluations.jsonl").read_text() == (theirs / "adapt" / "evaluations.jsonl").read_text()
    timed = {"time", "images_per_s", "input_wait", "log_wait"}
    actual, expected = (
        [{k: v for k, v in row.items() if k not in timed} for row in files.read_json_lines(folder / "metrics.jsonl")]
        for folder in (ours, theirs)
    )
    actual, expected = ([row for row in rows if row["stage"] == "adapt"] for rows in (actual, expected))
    assert actual == expected


def test_pictures_change_nothing(words: list[str], work: Path, folder: Path, monkeypatch) -> None:
    monkeypatch.delattr(noisy_teacher, "pictures")
    recipe.run(parse(words).config, folder)
    assert not (folder / "adapt" / "pictures").exists()
    assert_same(folder, work)


@pytest.mark.slow
def test_a_run_that_continues_has_the_same_pictures(words: list[str], work: Path, folder: Path, monkeypatch) -> None:
    """It is killed after step 3, and has pictures of a step that will run again."""
    save = loop._Loop._save

    def save_and_stop(self, step: int, *arguments) -> None:
        save(self, step, *arguments)
        if self._task.name == "adapt" and step == 3:
            pictures.sheet_path(folder / "adapt", 9, pictures.TRAINING).write_bytes(b"of a step that was never saved")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(parse(words).config, folder)
    recipe.run(parse(words).config, folder)
    assert_same(folder, work)
    ours, theirs = ({p.name: p.read_bytes() for p in (w / "adapt" / "pictures").iterdir()} for w in (folder, work))
    assert ours == theirs


@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_devices_show_the_part_of_the_first(accumulate: int) -> None:
    config = stage_config("plugins.noisy_teacher")
    config.model, config.accumulate = ConfigDict(NETWORK), accumulate
    state, constants, _ = begin(config)
    look = pictures.make_look(methods.load(config.train), make_model(config.model, 5), config)
    found = []
    for count in (1, 2):
        chosen = jax.local_devices()[:count]
        compiled = parallel.compile_step(look, chosen, donate=False)
        given = parallel.replicate(state, chosen), parallel.replicate(constants, chosen)
        batch = parallel.shard(make_batch(), chosen)
        for _ in range(2):  # the state is not donated
            shown = compiled(*given, 0, batch)
        found.append(parallel.first(shown, chosen))
    one, two = found
    assert tuple(one) == tuple(two) == COLUMNS  # in the order of the method
    expected = make_batch()["source"]["image"][::accumulate][:4]  # image n is in part n % parts
    np.testing.assert_allclose(pictures.denormalise(one["source"], "imagenet"), expected, atol=1e-3)
    for name, array in two.items():
        assert len(array) == 4 // accumulate
        assert np.mean(array == one[name][: len(array)]) > 0.999, name


def test_log_table_and_report_show_both_networks(work: Path) -> None:
    evaluations = files.read_json_lines(work / "adapt" / "evaluations.jsonl")
    last = evaluations[-1]
    student = last["other_networks"]["student"]["miou"]
    assert last["network"] == "teacher" and last["miou"] != student
    log = (work / "log.txt").read_text()
    assert f"adapt step 4: mIoU teacher {100 * last['miou']:.2f}, student {100 * student:.2f} on folder" in log
    assert re.search(r"source only  adapt \(teacher\)  adapt \(student\)", log)
    scores = re.search(r"mIoU \(3\) +[\d.]+ +([\d.]+) +([\d.]+)", log).groups()
    assert scores == (f"{100 * last['miou']:.1f}", f"{100 * student:.1f}")
    results = files.read_json(work / "adapt" / "results.json")
    assert results["best_on_val_using_target_labels"]["miou"] == max(row["miou"] for row in evaluations)

    page = report.write([work], work.parent / "page.html").read_text()
    assert page.count("adapt (teacher)") > 2 and page.count("adapt (student)") > 2
    picture = make_gallery(read_run(work), 1).pictures[0]
    assert list(picture.labels) == ["source_only", "adapt", "adapt (student)"]
    for name, network in (("adapt", "teacher"), ("adapt (student)", "student")):
        ids, _ = jaxuda.load(str(work / "adapt"), network=network).predict(picture.image)
        np.testing.assert_array_equal(picture.labels[name], ids)
    assert 'class="sheet"' in page and "adapt, step 2" in page and "adapt, step 4" in page
    assert "Share of confident pixels, in %. adapt: from" in page


def test_a_damaged_sheet_is_left_out(work: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(work, tmp_path / "run")
    pictures.sheet_path(folder / "adapt", 2, pictures.TRAINING).write_bytes(b"damaged")
    page = report.write([folder]).read_text()
    assert page.count('class="sheet"') == 1 and "adapt, step 2" not in page


def summaries(folder: Path) -> dict[tuple[str, int], object]:
    """(tag, step) -> value, of all TensorBoard files in a folder."""
    found = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found |= {(value.tag, event.step): value for value in event.summary.value}
            content = content[16 + length :]
    return found


def test_tensorboard_has_pictures_and_readable_names(work: Path) -> None:
    found = summaries(work / "tensorboard" / "adapt")
    for kind in (pictures.TRAINING, pictures.PREDICTIONS):
        for step in (2, 4):
            content = pictures.sheet_path(work / "adapt", step, kind).read_bytes()
            image = found[f"pictures/{kind}", step].image
            assert image.encoded_image_string == content
            assert (image.height, image.width) == encoding.check_image(content)
    rows = [row for row in files.read_json_lines(work / "metrics.jsonl") if "share" in row]
    assert len(rows) == 4
    for row in rows:
        value = found["share_of_confident_pixels", row["step"]]
        assert value.simple_value == pytest.approx(row["share"])
        assert value.metadata.display_name == "share of confident pixels"
    assert ("val/miou", 4) in found and ("val/student/miou", 4) in found


def test_a_stage_chooses_its_network_on_the_command_line(words: list[str], work: Path, folder: Path) -> None:
    recipe.run(parse([*words, "--config.adapt.evaluation.network=student"]).config, folder)
    ours, theirs = (files.read_json(each / "adapt" / "results.json")["last"] for each in (folder, work))
    assert ours["network"] == "student" and ours["miou"] == theirs["other_networks"]["student"]["miou"]
    assert ours["other_networks"]["teacher"]["miou"] == theirs["miou"]
    # A recipe without that section has it too; the other stages keep the network of the run.
    config = parse(["x", "--config=configs/minent.py:folder", "--config.adapt.evaluation.network=teacher"]).config
    chosen = [stages.resolve(name, config).evaluation.network for name in config.pipeline]
    assert chosen == ["student", "teacher", "student"]
    assert list(stages.resolve("adapt", config).evaluation.size) == [256, 128]
    with pytest.raises(UserError, match=r"config\.evaluation has no field 'netwrok'"):
        parse(["x", "--config=configs/minent.py:folder", "--config.evaluation.netwrok=teacher"])


def test_a_teacher_that_there_is_not(data: dict, tmp_path: Path, capsys) -> None:
    line = tiny.arguments("minent", workdir=tmp_path, **data)
    assert main(["jaxuda", *line, "--config.adapt.evaluation.network=teacher"]) == MISTAKE
    told = capsys.readouterr().err
    assert (
        "the stage 'adapt' cannot be trained: evaluation.network='teacher', but the networks of the method minent"
        in told
    )
    assert not (tmp_path / "source_only").exists()  # nothing was trained


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ({"mixed": np.zeros((2, 4))}, r"'pictures' returns 'mixed' as float32\[2, 4\]: give \(N, H, W, 3\) float"),
        ({"mixed": np.zeros((2, 4, 6, 3), int)}, "returns 'mixed' as int32"),
        ({"a": np.zeros((2, 4, 6)), "b": np.zeros((3, 4, 6))}, r"the same N images, not a \[2, 4, 6\], b \[3, 4, 6\]"),
        ({}, "must return arrays of the same N images, not nothing"),
    ],
)
def test_wrong_pictures_are_named_before_anything_trains(
    words: list[str], tmp_path: Path, shown: dict, message: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(noisy_teacher, "pictures", lambda carry, batch, *, config: shown)
    assert main([*words, f"--workdir={tmp_path}"]) == MISTAKE
    told = capsys.readouterr().err
    assert "the stage 'adapt' cannot be trained" in told and re.search(message, told), told
    assert not (tmp_path / "source_only").exists()


def test_a_control_has_no_teacher(words: list[str]) -> None:
    config = stages.with_control(parse([*words, "--config.control=True"]).config)
    assert config.pipeline == ("source_only", "control", "adapt")
    found = {name: stages.resolve(name, config).evaluation.network for name in config.pipeline}
    assert found == {"source_only": "student", "control": "student", "adapt": "teacher"}


def test_cells_of_a_sheet_have_one_width(space) -> None:
    red, blue = np.full((2, 4, 3), (255, 0, 0), np.uint8), np.full((6, 8, 3), (0, 0, 255), np.uint8)
    sheet = contact_sheet([{"a": red, "b": blue}, {"a": red, "b": red}])
    assert sheet.shape == (HEADING + 6 + 4, 16, 3)
    body = sheet[HEADING:]
    assert (body[:4, :8] == (255, 0, 0)).all() and (body[4:6, :8] == 255).all() and (body[:6, 8:] == (0, 0, 255)).all()
    assert (body[6:, :] == (255, 0, 0)).all()
    # Labels are painted, ignored pixels and unknown classes are black; weights are grey, and are cut to 0 and 1.
    found = {"labels": np.array([[[0, 1], [255, 7]]]), "weights": np.array([[[0.0, 0.5], [2.0, np.nan]]])}
    cell = pictures.training_sheet(found, "imagenet", space)[HEADING:]
    np.testing.assert_array_equal(cell[:, :2], [[space.palette[0], space.palette[1]], np.zeros((2, 3))])
    np.testing.assert_array_equal(cell[:, 2:, 0], [[0, 128], [255, 0]])
