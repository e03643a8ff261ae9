"""A dataset that is one file outside jaxuda: prepared, read, joined, trained on, scored and reported."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from jaxuda.cli import MISTAKE
from jaxuda.data import load
from jaxuda.errors import UserError
from jaxuda.main import main
from jaxuda.prepare import main as prepare

RECIPE = Path(__file__).with_name("toydata_recipe.py")


def draw(folder: Path) -> Path:
    """Six images of 48x32 for each config and split."""
    rng = np.random.default_rng(0)
    for name, light in (("day", 1.0), ("night", 0.4)):
        for split in ("train", "val"):
            (folder / name / split).mkdir(parents=True)
            for index in range(6):
                ids = np.full((32, 48), 1, np.uint8)
                ids[:12], ids[-1] = 9, 0
                row, column = rng.integers(8, 18), rng.integers(0, 36)
                ids[row : row + 10, column : column + 12] = 4
                image = rng.normal(light * 20 * ids[..., None], 8, (32, 48, 3)).clip(0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / name / split / f"{index}.png"), image)
                cv2.imwrite(str(folder / name / split / f"{index}_ids.png"), ids)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where the toy dataset is prepared."""
    top = tmp_path_factory.mktemp("toydata")
    assert prepare(["plugins.toydata", "--manual_dir", str(draw(top / "drawn")), "--data_dir", str(top)]) == 0
    return top


def run(data_dir: Path, workdir: Path, *words: str) -> int:
    return main(["jaxuda", f"--config={RECIPE}", f"--workdir={workdir}", f"--config.data_dir={data_dir}", *words])


def test_it_is_read_in_its_own_classes(data_dir):
    assert sorted(path.name for path in (data_dir / "plugins.toydata").iterdir()) == ["day", "night"]
    day = load("plugins.toydata/day", "train", data_dir=data_dir)
    assert day.label_space.classes == ("ground", "box", "sky") and day.name == "plugins.toydata/day train"
    assert np.unique(day[0]["label"]).tolist() == [0, 1, 2, 255]
    assert (day.class_pixels()[:, 3] == 48).all() and day.class_pixels().sum() == 6 * 32 * 48
    with pytest.raises(UserError, match=r"plugins.toydata has no labels for bicycle, building"):
        load("plugins.toydata/day", "train", data_dir=data_dir, label_space="cityscapes19")


def test_mistakes_are_named(data_dir, tmp_path, capsys):
    with pytest.raises(UserError, match=r"python -m jaxuda.prepare plugins.toydata --manual_dir DIR --data_dir"):
        load("plugins.toydata/day", "train", data_dir=tmp_path)
    with pytest.raises(UserError, match=r"choose from plugins.toydata/day, plugins.toydata/night"):
        load("plugins.toydata", "train", data_dir=data_dir)
    with pytest.raises(UserError, match=r"dataset='plugins.nothing' cannot be imported"):
        load("plugins.nothing", "train", data_dir=data_dir)
    with pytest.raises(UserError, match=r"dataset='plugins.signum' does not define `DATASET`"):
        load("plugins.signum", "train", data_dir=data_dir)
    assert run(tmp_path, tmp_path / "run") == MISTAKE
    message = capsys.readouterr().err
    assert "plugins.toydata/day and plugins.toydata/night are not prepared" in message or "python -m" in message


def test_a_module_without_a_package(tmp_path):
    (tmp_path / "alone.py").write_text(Path(__file__).with_name("toydata.py").read_text())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "alone.py").write_text((tmp_path / "alone.py").read_text())
    draw(tmp_path / "drawn")
    command = [sys.executable, "-m", "jaxuda.prepare", "mine.alone/night", "--manual_dir", "drawn", "--data_dir", "."]
    root = str(RECIPE.parents[2])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": root})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine.alone" / "night" / "1.0.0" / "prepared.json").exists()


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A work folder of the recipe."""
    workdir = tmp_path_factory.mktemp("run") / "toydata"
    assert run(data_dir, workdir) == 0
    return workdir


@pytest.mark.slow
def test_it_is_trained_on_and_scored(data_dir, finished, capsys):
    results = json.loads((finished / "results.json").read_text())
    assert results["classes"] == ["ground", "box", "sky"]
    assert results["data"]["source"]["name"] == "plugins.toydata/day train + plugins.toydata/night train"
    assert results["validation"] == "plugins.toydata/night val"
    assert [each["name"] for each in results["also"]] == ["plugins.toydata/day val"]
    rows = [json.loads(line) for line in (finished / "adapt" / "evaluations.jsonl").read_text().splitlines()]
    beside = rows[-1]["beside"]["plugins.toydata/day val"]["miou"]
    assert 0 <= beside <= 1 and results["stages"]["adapt"]["last"]["beside"].keys() == {"plugins.toydata/day val"}
    assert f"adapt {100 * beside:.1f}" in (finished / "log.txt").read_text()
    assert "mIoU, plugins.toydata/day val" in (finished / "report.html").read_text()
    identity = json.loads((finished / "adapt" / "stage.json").read_text())["identity"]
    assert len(identity["data"]["evaluation"]) == 2 and identity["evaluation"]["also"] == ["plugins.toydata/day:val"]

    assert run(data_dir, finished) == 0  # there is nothing left to do
    capsys.readouterr()
    assert run(data_dir, finished, "--mode=eval", f"--checkpoint={finished / 'adapt'}") == 0
    printed = capsys.readouterr().out
    assert printed.index("on plugins.toydata/night val") < printed.index("on plugins.toydata/day val")
    assert f"{100 * beside:.1f}" in printed.partition("on plugins.toydata/day val")[2]


def test_a_work_folder_runs_no_code(finished):
    code = "from pathlib import Path; from jaxuda.report.runs import read_run, open_split\n"
    code += f"open_split(read_run(Path({str(finished)!r})).config, 'source')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=RECIPE.parents[2])
    assert "a work folder alone must not run it" in done.stderr


def test_a_domain_that_no_stage_reads_may_be_absent(data_dir, finished, tmp_path, capsys):
    assert run(data_dir, tmp_path / "run", "--config.target.name=") == MISTAKE
    assert "the stage 'adapt' reads the target (config.adapt.domains)" in capsys.readouterr().err
    alone = ("--config.pipeline=('source_only',)", "--config.source_only.steps=1")
    assert run(data_dir, tmp_path / "source", "--config.target.name=", *alone) == 0
    results = json.loads((tmp_path / "source" / "results.json").read_text())
    assert results["validation"] == "plugins.toydata/day val" and results["data"]["target"] is None
    assert (tmp_path / "source" / "report.html").exists()
    on_target = ("--config.source.name=", "--config.source_only.domains=('target',)", *alone)
    assert run(data_dir, tmp_path / "target", *on_target) == 0
    results = json.loads((tmp_path / "target" / "results.json").read_text())
    assert results["data"]["source"] is None and results["classes"] == ["ground", "box", "sky"]
    assert run(data_dir, tmp_path / "none", "--config.source.name=", *alone) == MISTAKE
    assert "the stage 'source_only' reads the source" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("also", "expected"),
    [
        ("plugins.toydata/night:val", "but the run is evaluated on it already"),
        ("plugins.toydata/day", "must be DATASET:SPLIT"),
        ("folder:val", "must be DATASET:SPLIT"),
        ("plugins.toydata/day:test", "plugins.toydata/day has no split 'test'"),
        ("camvid/day:val", "python -m jaxuda.prepare camvid --manual_dir DIR"),
    ],
)
def test_sets_that_cannot_be_scored_on(data_dir, tmp_path, capsys, also, expected):
    assert run(data_dir, tmp_path, f"--config.evaluation.also=('{also}',)") == MISTAKE
    assert expected in capsys.readouterr().err
