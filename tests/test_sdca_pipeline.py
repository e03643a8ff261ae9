"""The whole SDCA recipe on tiny data: sweeps and trainings in a row, killed in each and continued."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny

from jaxuda import prepare
from jaxuda.main import MISTAKE, main

ROOT = Path(__file__).parents[1]
STAGES = ("source_only", "statistics", "adapt", "pseudo_labels", "self_train", "oracle")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sdca_data")
    source = tiny.draw_folder(folder / "source", "tiny_source", 0)
    target = tiny.draw_folder(folder / "target", "tiny_target", 30)
    for path in (source, target):
        prepare.prepare("folder", path=str(path), data_dir=folder / "tfds")
    return {"source": source, "target": target, "data_dir": folder / "tfds"}


@pytest.fixture(autouse=True)
def at_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("sdca_finished") / "run"
    os.chdir(ROOT)
    assert main(["jaxuda", *tiny.arguments("sdca", workdir=workdir, **data)]) == 0
    return workdir


def test_every_stage_leaves_what_it_promises(finished: Path, data: dict) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert tuple(results["stages"]) == STAGES
    assert (finished / "statistics" / "artifacts" / "class_statistics.npz").exists()
    thresholds = json.loads((finished / "pseudo_labels" / "artifacts" / "thresholds.json").read_text())
    assert set(thresholds) == set(tiny.CLASSES) and all(0 <= value <= 0.9 for value in thresholds.values())
    labels = sorted((finished / "pseudo_labels" / "artifacts" / "labels").iterdir())
    images = sorted((data["target"] / "images" / "train").iterdir())
    assert [path.stem for path in labels] == [path.stem for path in images]
    table = (finished / "log.txt").read_text()
    assert "source only      adapt  self train     oracle" in table


def test_pseudo_labels_carry_the_palette(finished: Path) -> None:
    from jaxuda.data import encoding

    for path in (finished / "pseudo_labels" / "artifacts" / "labels").iterdir():
        ids = encoding.read_label_file(path.read_bytes())
        assert ids.shape == (32, 48) and set(np.unique(ids)) <= {0, 1, 2, 255}
        colours = cv2.imread(str(path))[..., ::-1]
        np.testing.assert_array_equal(colours[ids == 2], np.broadcast_to([160, 90, 40], ((ids == 2).sum(), 3)))


def test_damaged_artefacts_are_refused(finished: Path, data: dict, tmp_path, capsys) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "self_train")
    next((workdir / "pseudo_labels" / "artifacts" / "labels").iterdir()).unlink()
    words = ["jaxuda", *tiny.arguments("sdca", workdir=workdir, **data)]
    assert main(words) == MISTAKE
    assert "--from_stage pseudo_labels" in capsys.readouterr().err
    assert main([*words, "--from_stage=pseudo_labels"]) == 0


def test_no_confident_pixel_is_told_and_harmless(data: dict, tmp_path, capsys) -> None:
    """Nothing reaches a confidence of 1.1: the contrast on the target and its loss are 0, not NaN."""
    words = tiny.arguments("sdca", workdir=tmp_path / "run", **data)
    assert main(["jaxuda", *words, "--config.adapt.confidence=1.1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    adapted = [row for row in rows if row["stage"] == "adapt" and "loss" in row]
    assert all(row["confident"] == 0 and row["features_target"] == 0 for row in adapted)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["statistics", "adapt", "pseudo_labels", "self_train"])
def test_killed_in_each_stage(finished: Path, data: dict, tmp_path, stage: str) -> None:
    """Nothing finished is done again, and the end is the same."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    # The state of a run that was killed as soon as `stage` had begun.
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(workdir / later)
    words = [sys.executable, "-m", "jaxuda.main", *tiny.arguments("sdca", workdir=workdir, **data)]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wanted = f"{stage} 3/6" if stage in ("adapt", "self_train") else "  results in"
    for line in run.stdout:
        if line.startswith(wanted):
            run.send_signal(signal.SIGKILL)
            break
    run.wait()
    assert run.returncode == -signal.SIGKILL
    kept = {name: (workdir / name / "stage.json").stat().st_mtime_ns for name in STAGES[: STAGES.index(stage)]}
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert kept == {name: (workdir / name / "stage.json").stat().st_mtime_ns for name in kept}
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (workdir, finished))
    assert ours == theirs
