"""The input pipeline against PyTorch's DataLoader with the same decoding and the same transforms.

    python experiments/benchmarks/input_pipeline.py                    # threads of this process; DataLoader: none
    python experiments/benchmarks/input_pipeline.py --workers 2        # two worker processes each

Both read the same PNG files of 1024x512 (drawn into a temporary folder), resize them to 512x256, crop, flip and jitter
them, and make batches. They take turns; timing of a turn starts when the workers run and the buffers are empty.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxuda.data import build_transform, make_input

TRANSFORM = {"resize": (512, 256), "crop": (384, 192), "flip": 0.5, "jitter": (0.3, 0.3, 0.3, 0.1)}
WARM_UP = 8


class Files(Sequence):
    """Decoded records of a folder."""

    def __init__(self, folder: str, count: int):
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        name = f"{self.folder}/{index}"
        image = cv2.cvtColor(cv2.imread(f"{name}.png"), cv2.COLOR_BGR2RGB)
        return {"image": image, "label": cv2.imread(f"{name}_label.png", cv2.IMREAD_UNCHANGED), "id": str(index)}


class Transformed(Dataset):
    """The same records for a DataLoader."""

    def __init__(self, files: Files):
        self.files, self.transform = files, build_transform(TRANSFORM)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        record = self.transform(self.files[index], np.random.default_rng(index))
        return torch.from_numpy(record["image"].copy()), torch.from_numpy(record["label"].copy())


def draw(folder: str, count: int) -> Files:
    """Writes smooth images with grain, and labels in blocks."""
    rng = np.random.default_rng(0)
    for index in range(count):
        image = cv2.resize(rng.integers(0, 256, (32, 64, 3), np.uint8), (1024, 512), interpolation=cv2.INTER_CUBIC)
        image += rng.integers(0, 2, image.shape, np.uint8)
        label = rng.integers(0, 19, (32, 64), np.uint8).repeat(16, 0).repeat(16, 1)
        cv2.imwrite(f"{folder}/{index}.png", image)
        cv2.imwrite(f"{folder}/{index}_label.png", label)
    return Files(folder, count)


def seconds(batches: Iterator, count: int) -> float:
    """Seconds for `count` batches, after the batches that empty the buffers."""
    for _ in range(WARM_UP):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - start


def ours(files: Files, options: argparse.Namespace) -> float:
    """Seconds of jaxuda.data."""
    steps, transform = WARM_UP + options.batches, build_transform(TRANSFORM)
    with make_input(
        files, batch=options.batch, steps=steps, source_transform=transform, num_workers=options.workers
    ) as batches:
        return seconds(batches, options.batches)


def theirs(files: Files, options: argparse.Namespace) -> float:
    """Seconds of a DataLoader, over one long epoch."""
    loader = DataLoader(
        ConcatDataset([Transformed(files)] * (1 + (WARM_UP + options.batches) * options.batch // len(files))),
        options.batch,
        shuffle=True,
        num_workers=options.workers,
    )
    return seconds(iter(loader), options.batches)


def main() -> None:
    """Prints images per second and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: threads of this one, DataLoader: none")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=30, help="timed at a time")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = draw(folder, 64)
        median = np.median([[run(files, options) for run in (ours, theirs)] for _ in range(options.repeats)], axis=0)
    print(f"{options.workers} worker processes, {os.cpu_count()} cores")
    for name, value in zip(("ours", "DataLoader"), median, strict=True):
        rate = options.batch * options.batches / value
        print(f"{name:12}{rate:8.1f} images/s, time ratio {value / median[1]:.2f}")


if __name__ == "__main__":
    main()
