"""A tiny dataset like a user's own folder, and the command line that trains on it within seconds."""

import importlib
import json
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

from jaxuda import prepare

CLASSES = ("ground", "box", "sky")


def draw_folder(folder: Path, name: str, shift: int, images: int = 6, labelled: bool = True) -> Path:
    """images/{train,val}, labels/{train,val} and classes.json: coloured boxes between ground and sky."""
    rng = np.random.default_rng(shift)
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        if labelled:
            (folder / "labels" / split).mkdir(parents=True)
        for index in range(images):
            label = np.zeros((32, 48), np.uint8)
            label[:12] = 2
            row, column = rng.integers(8, 18), rng.integers(0, 36)
            label[row : row + 10, column : column + 12] = 1
            colours = np.array([[90, 90, 90], [200, 60, 40], [60, 120, 230]]) + shift
            image = (colours[label] + rng.normal(0, 8, (*label.shape, 3))).clip(0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / "images" / split / f"{index}.png"), image[..., ::-1])
            if labelled:
                cv2.imwrite(str(folder / "labels" / split / f"{index}.png"), label)
    if labelled:
        classes = [{"name": c, "ids": [i], "color": [80 * i, 90, 40]} for i, c in enumerate(CLASSES)]
        (folder / "classes.json").write_text(json.dumps({"name": name, "classes": classes}))
    return folder


def prepare_domains(folder: Path) -> dict[str, Path]:
    """Draws and prepares a source and a target; returns the data arguments of `arguments`."""
    source = draw_folder(folder / "source", "tiny_source", 0)
    target = draw_folder(folder / "target", "tiny_target", 30)
    for path in (source, target):
        prepare.prepare("folder", path=str(path), data_dir=folder / "tfds")
    return {"source": source, "target": target, "data_dir": folder / "tfds"}


def arguments(config: str, source: Path, target: Path, data_dir: Path, workdir: Path, *more: str) -> list[str]:
    """Words after `python -m jaxuda.main` for a run of a few steps."""
    recipe = importlib.import_module(f"configs.{config}").get_config("folder")
    stages = [name for name in recipe.pipeline if "train" in recipe[name]]
    return [
        f"--config=configs/{config}.py:folder",
        f"--workdir={workdir}",
        f"--config.source.path={source}",
        f"--config.target.path={target}",
        f"--config.data_dir={data_dir}",
        "--config.source.resize=(48, 32)",
        "--config.target.resize=(48, 32)",
        "--config.evaluation.size=(48, 32)",
        "--config.model.width=8",
        "--config.model.blocks=(1, 1, 1, 1)",
        "--config.log_every=1",
        "--config.eval_every=3",
        "--config.checkpoint_every=2",
        *(f"--config.{stage}.{field}" for stage in stages for field in ("steps=6", "batch=2")),
        *more,
    ]


def kill_at(line: str, words: list[str], environment: Mapping[str, str] | None = None) -> None:
    """Runs a command in the project's folder, and kills it (-9) as soon as a line of its output begins with `line`."""
    root = Path(__file__).parents[1]
    run = subprocess.Popen(words, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    for found in run.stdout:
        if found.startswith(line):
            run.send_signal(signal.SIGKILL)
            break
    assert run.wait() == -signal.SIGKILL
