"""How fast `prepare` reads and writes Cityscapes, against copying the same files and against decoding them.

    python experiments/benchmarks/prepare_speed.py [--images 200] [--folder DIR]

Draws images of 2048x1024 with labels, as large on disk as the real ones, below DIR (default: a temporary folder), in
the published layout; a few images under many names. Copying reads and writes every byte once, as preparing must; both
are timed until everything is on disk. The files to read are cached in memory, so the disk is only written. If other
programs use the processor, its time per image is more reliable than images per second.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from jaxuda.prepare import prepare

DIFFERENT = 20  # images


def draw(root: Path, count: int) -> None:
    """Writes images of smooth noise with a little grain (PNG of 2 to 3 MB), and labels of many regions."""
    rng, drawn = np.random.default_rng(0), {}
    for split, number in (("train", count), ("val", 1)):
        for index in range(number):
            files = [
                root / kind / split / "city" / f"city_{index:06d}_000019_{ending}.png"
                for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"))
            ]
            for file in files:
                file.parent.mkdir(parents=True, exist_ok=True)
            if index >= DIFFERENT:
                for file, same in zip(files, drawn[index % DIFFERENT], strict=True):
                    os.link(same, file)
                continue
            coarse = rng.integers(0, 256, (32, 64, 3), np.uint8)
            image = cv2.resize(coarse, (2048, 1024), interpolation=cv2.INTER_CUBIC)
            image += rng.integers(0, 3, image.shape, np.uint8) // 2
            label = cv2.resize(rng.integers(0, 34, (64, 128), np.uint8), (2048, 1024), interpolation=cv2.INTER_NEAREST)
            for file, pixels in zip(files, (image, label), strict=True):
                cv2.imwrite(str(file), pixels)
            drawn.setdefault(index, files)


def main() -> None:
    """Prints images per second and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = Path(folder) / "source"
        draw(source, arguments.images)
        files = list(source.rglob("*.png"))
        size = sum(file.stat().st_size for file in files) / 2**20

        def timed(work) -> tuple[float, float]:
            os.sync()
            start = time.perf_counter(), time.process_time()
            work()
            os.sync()
            return time.perf_counter() - start[0], time.process_time() - start[1]

        def decode() -> None:
            for file in files:
                cv2.imread(str(file), cv2.IMREAD_UNCHANGED)

        seconds = {
            "copy": timed(lambda: shutil.copytree(source, Path(folder) / "copy")),
            "prepare": timed(lambda: prepare("cityscapes", manual_dir=source, data_dir=Path(folder) / "data")),
            "decode": timed(decode),
        }
    print(f"{arguments.images + 1} images and labels, {size:.0f} MiB")
    for name, (wall, processor) in seconds.items():
        speed = f"{(arguments.images + 1) / wall:6.1f} images/s, {size / wall:5.0f} MiB/s"
        each = f"{1000 * processor / (arguments.images + 1):5.1f} ms of processor time per image"
        print(f"{name:8} {speed}, {wall / seconds['copy'][0]:5.2f} times the time of copying, {each}")


if __name__ == "__main__":
    main()
