"""Complete recipes on tiny data: sweeps and trainings in a row, killed in each stage and continued."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny

from jaxuda.cli import MISTAKE
from jaxuda.data import encoding
from jaxuda.main import main

pytestmark = pytest.mark.slow  # all need the finished recipes
ROOT = Path(__file__).parents[1]
RECIPES = {
    name: importlib.import_module(f"configs.{name}").get_config("folder").pipeline
    for name in ("sdca", "intrada", "cfcontra")
}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> dict[str, Path]:
    """A finished work folder for each recipe."""
    os.chdir(ROOT)
    folders = {}
    for recipe in RECIPES:
        folders[recipe] = tmp_path_factory.mktemp(recipe) / "run"
        assert main(["jaxuda", *tiny.arguments(recipe, workdir=folders[recipe], **data)]) == 0
    return folders


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_training_is_in_the_table(finished: dict[str, Path], recipe: str) -> None:
    results = json.loads((finished[recipe] / "results.json").read_text())
    assert tuple(results["stages"]) == RECIPES[recipe]
    heads = [name.replace("_", " ") for name, result in results["stages"].items() if result]
    log = (finished[recipe] / "log.txt").read_text()
    assert any(all(head in line for head in heads) for line in log.splitlines()) and len(heads) == 4


def test_sdca_artifacts(finished: dict[str, Path], data: dict) -> None:
    workdir = finished["sdca"]
    assert (workdir / "statistics" / "artifacts" / "class_statistics.npz").exists()
    thresholds = json.loads((workdir / "pseudo_labels" / "artifacts" / "thresholds.json").read_text())
    assert set(thresholds) == set(tiny.CLASSES) and all(0 <= value <= 0.9 for value in thresholds.values())
    labels = sorted((workdir / "pseudo_labels" / "artifacts" / "labels").iterdir())
    images = sorted((data["target"] / "images" / "train").iterdir())
    assert [path.stem for path in labels] == [path.stem for path in images]


def test_cfcontra_tells_how_good_its_pseudo_labels_are(finished: dict[str, Path]) -> None:
    artifacts = finished["cfcontra"] / "prototypes" / "artifacts"
    assert [path.name for path in artifacts.iterdir()] == ["prototypes.npz"]
    rows = [json.loads(line) for line in (finished["cfcontra"] / "metrics.jsonl").read_text().splitlines()]
    adapted = [row for row in rows if row["stage"] == "adapt" and "loss" in row]
    for figure in ("pseudo_accuracy_using_target_labels", "pseudo_kept", "drift_source", "cosine_target"):
        assert len(adapted) == 6 and all(-1 <= row[figure] <= 1 for row in adapted)


def test_pseudo_labels_carry_the_palette(finished: dict[str, Path]) -> None:
    for recipe, allowed in (("sdca", {0, 1, 2, 255}), ("intrada", {0, 1, 2})):
        for path in (finished[recipe] / "pseudo_labels" / "artifacts" / "labels").iterdir():
            ids = encoding.read_label_file(path.read_bytes())
            assert ids.shape == (32, 48) and set(np.unique(ids)) <= allowed
            colours = cv2.imread(str(path))[..., ::-1]
            np.testing.assert_array_equal(colours[ids == 2], np.broadcast_to([160, 90, 40], ((ids == 2).sum(), 3)))


def test_intrada_splits_the_target(finished: dict[str, Path]) -> None:
    folder = finished["intrada"] / "rank" / "artifacts"
    easy, hard = ((folder / name).read_text().split() for name in ("easy.txt", "hard.txt"))
    assert len(easy) == 4 and len(hard) == 2 and sorted(easy + hard) == [str(index) for index in range(6)]
    rows = dict(line.split(",") for line in (folder / "scores.csv").read_text().splitlines()[1:])
    assert max(float(rows[name]) for name in easy) <= min(float(rows[name]) for name in hard)


def test_damaged_artifacts_are_refused(finished: dict[str, Path], data: dict, tmp_path, capsys) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished["sdca"], workdir)
    shutil.rmtree(workdir / "self_train")
    next((workdir / "pseudo_labels" / "artifacts" / "labels").iterdir()).unlink()
    words = ["jaxuda", *tiny.arguments("sdca", workdir=workdir, **data)]
    assert main(words) == MISTAKE
    assert "--from_stage pseudo_labels" in capsys.readouterr().err
    assert main([*words, "--from_stage=pseudo_labels"]) == 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_empty_parts_are_refused(finished: dict[str, Path], data: dict, tmp_path, capsys, share: float) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished["intrada"], workdir)
    words = tiny.arguments("intrada", workdir=workdir, **data)
    assert main(["jaxuda", *words, f"--config.rank.easy_share={share}", "--from_stage=rank"]) == MISTAKE
    assert "both are needed" in capsys.readouterr().err


def test_no_confident_pixel_is_harmless(data: dict, tmp_path) -> None:
    """No pixel reaches a confidence of 1.1: the contrast on the target is 0, not NaN."""
    words = tiny.arguments("sdca", workdir=tmp_path / "run", **data)
    assert main(["jaxuda", *words, "--config.adapt.confidence=1.1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    adapted = [row for row in rows if row["stage"] == "adapt" and "loss" in row]
    assert adapted and all(row["confident"] == 0 and row["features_target"] == 0 for row in adapted)


@pytest.mark.parametrize(
    ("recipe", "stage"),
    [
        *(("sdca", stage) for stage in ("statistics", "adapt", "pseudo_labels", "self_train")),
        *(("intrada", stage) for stage in ("inter", "rank", "pseudo_labels", "intra")),
        *(("cfcontra", stage) for stage in ("prototypes", "adapt")),
    ],
)
def test_killed_in_each_stage(finished: dict[str, Path], data: dict, tmp_path, recipe: str, stage: str) -> None:
    """Finished stages are not run again, and the result is the same."""
    workdir, stages = tmp_path / "run", RECIPES[recipe]
    shutil.copytree(finished[recipe], workdir)
    # The state of a run that was killed as soon as `stage` had begun.
    for later in stages[stages.index(stage) :]:
        shutil.rmtree(workdir / later)
    words = [sys.executable, "-m", "jaxuda.main", *tiny.arguments(recipe, workdir=workdir, **data)]
    trains = "train" in importlib.import_module(f"configs.{recipe}").get_config("folder")[stage]
    tiny.kill_at(f"{stage} 3/6" if trains else "  results in", words)
    kept = {name: (workdir / name / "stage.json").stat().st_mtime_ns for name in stages[: stages.index(stage)]}
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert kept == {name: (workdir / name / "stage.json").stat().st_mtime_ns for name in kept}
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (workdir, finished[recipe]))
    assert ours == theirs
