"""How time and memory grow with the number of images, from preparing to the report.

    python experiments/benchmarks/growth.py [--counts 100,5000,10000]

Draws a source and a target, each with so many images of 48x32 for training and for validation, and runs the commands of
a user on them with a tiny network, each in its own process. The last stages are added one by one to a finished run, so
each process has one long piece of work besides its start. Printed are processor seconds and the peak of memory; the
last columns are what 1000 images more cost in the last step up, and that over the same of the step before: 1.0 is
linear. Memory is constant where the last step up adds nothing to it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("ground", "box", "sky")
COLOURS = np.array([[90, 90, 90], [200, 60, 40], [60, 120, 230]])
WIDTH, HEIGHT = 48, 32


def draw(folder: Path, count: int, shift: int) -> None:
    """A folder as `jaxuda.prepare folder` reads it: boxes between ground and sky, grainy, `shift` brighter."""
    rng = np.random.default_rng(shift)
    for split in ("train", "val"):
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True), labels.mkdir(parents=True)
        for index in range(count):
            label = np.zeros((HEIGHT, WIDTH), np.uint8)
            label[:12] = 2
            row, column = rng.integers(8, 18), rng.integers(0, 36)
            label[row : row + 10, column : column + 12] = 1
            image = COLOURS[label] + shift + rng.integers(-20, 20, (*label.shape, 3))
            cv2.imwrite(str(images / f"{index}.png"), image.clip(0, 255).astype(np.uint8)[..., ::-1])
            cv2.imwrite(str(labels / f"{index}.png"), label)
    classes = [{"name": name, "ids": [index], "color": [80 * index, 90, 40]} for index, name in enumerate(CLASSES)]
    (folder / "classes.json").write_text(json.dumps({"name": folder.name, "classes": classes}))


def commands(root: Path) -> dict[str, list[str]]:
    """Name -> words after `python -m`, in their order."""
    data = f"--config.data_dir={root / 'tfds'}"
    prepare = ["jaxuda.prepare", "folder", f"--data_dir={root / 'tfds'}"]
    fields = [data, "--config.model.width=8", "--config.model.blocks=(1, 1, 1, 1)"]
    fields += ["--config.source_only.steps=2", "--config.source_only.batch=2"]
    for domain in ("source", "target"):
        fields += [f"--config.{domain}.path={root / domain}", f"--config.{domain}.resize=({WIDTH}, {HEIGHT})"]
    fields.append(f"--config.evaluation.size=({WIDTH}, {HEIGHT})")
    run, ranked = root / "sdca-folder-seed0", root / "intrada-folder-seed0"

    def stages(recipe: str, folder: Path, *names: str) -> list[str]:
        return [
            "jaxuda.main",
            f"--config={recipe}:folder",
            f"--workdir={folder}",
            f"--config.pipeline={names}",
            *fields,
        ]

    evaluate = ["jaxuda.main", "--mode=eval", "--config=sdca:folder"]
    table = ["jaxuda.table", "--configs=sdca", "--benchmarks=folder", f"--runs={root}", *fields]
    return {
        "prepare the source": [*prepare, f"--path={root / 'source'}"],
        "prepare the target": [*prepare, f"--path={root / 'target'}"],
        "train and evaluate": stages("sdca", run, "source_only"),
        "evaluate alone": [*evaluate, f"--checkpoint={run / 'source_only'}", *fields],
        "class statistics": stages("sdca", run, "source_only", "statistics"),
        "train for the ranking": stages("intrada", ranked, "source_only"),
        "ranking": [*stages("intrada", ranked, "source_only", "rank"), "--config.rank.init=source_only"],
        "table": [*table, "--config.pipeline=('source_only', 'statistics')"],
        "report": ["jaxuda.report", f"--workdir={run}"],
    }


def measured(words: list[str]) -> tuple[float, float]:
    """Processor seconds and peak MB of `python -m words`."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, "-m", *words], stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            sys.exit(f"python -m {' '.join(words)}\n{output.read().decode()[-3000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3


def main() -> None:
    """Prints a line per command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="100,5000,10000")
    counts = [int(word) for word in parser.parse_args().counts.split(",")]
    found = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder) / "source", count, 0)
            draw(Path(folder) / "target", count, 30)
            for name, words in commands(Path(folder)).items():
                found.setdefault(name, []).append(measured(words))
    heads = "".join(f"{count:>9}" for count in counts)
    print(f"{'images':20}{'s:':>4}{heads}  s/1000  growth  MB:{heads}")
    for name, rows in found.items():
        seconds, sizes = zip(*rows, strict=True)
        each = np.diff(seconds) / np.diff(counts) * 1000
        times, memory = ("".join(f"{x:{form}}" for x in row) for row, form in ((seconds, "9.1f"), (sizes, "9.0f")))
        print(f"{name:24}{times}{each[-1]:8.2f}{each[-1] / each[-2]:8.2f}     {memory}")


if __name__ == "__main__":
    main()
