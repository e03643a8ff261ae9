"""Measures the requirements on the `streets` scenes and draws a sheet of them.

    python -m jaxuda.main --config configs/source_only.py --workdir runs/gap \\
        --config.source_only.steps=1500 --config.oracle.steps=1500 --config.eval_every=500
    python experiments/streets_requirements.py --scenes 200 --sheet streets.png --gap runs/gap

Prints, for each domain, scenes per second on one core, the share of scenes that show each class with the
share of its pixels, and the widths of poles, lights and signs in the label maps; with --gap also how much mIoU the
network of the first command loses from `game` to `camera`. Required are 100 scenes of 256x128 per second, every class
in 10% of the scenes, widths of 3 pixels, a loss of at least 15 mIoU points, and at least 10 points above chance.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxuda.data.datasets.streets import draw_scene
from jaxuda.data.labels import label_space

DOMAINS = ("game", "camera")
THIN = ("pole", "light", "sign")
SPACE = label_space("cityscapes19")

Scene = tuple[np.ndarray, np.ndarray, np.ndarray]


def scenes_per_second(domain: str, count: int) -> float:
    """Scenes per second of processor time, in one thread."""
    draw_scene(domain, "speed", 0)  # fills the tables of noise and colours
    start = time.process_time()
    for index in range(count):
        draw_scene(domain, "speed", index)
    return count / (time.process_time() - start)


def class_shares(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Share of the scenes that show each class (19,), and share of the pixels (19,)."""
    counts = np.array([np.bincount(label.ravel(), minlength=256)[:19] for _, label, _ in scenes])
    return (counts > 0).mean(0), counts.sum(0) / counts.sum()


def widths(scene: Scene, name: str) -> list[int]:
    """Widths in pixels of the objects of a class that nothing hides.

    A pole counts once per row, a light or sign once. An object is hidden if something that touches it is nearer to
    the camera; objects at the border of the picture do not count either.
    """
    _, label, depth = scene
    mask = label == SPACE.classes.index(name)
    # the neighbours of each pixel; the border counts as near
    around = np.pad(depth, 1)
    found = []
    if name == "pole":
        for y in np.flatnonzero(mask.any(1)):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[y].astype(np.int8), [0]])))
            for left, right in edges.reshape(-1, 2):
                within = depth[y, left:right]
                if around[y + 1, left] >= within[0] and around[y + 1, right + 1] >= within[-1]:
                    found.append(int(right - left))
        return found
    count, parts, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    for k in range(1, count):
        part = parts == k
        rim = cv2.dilate(part.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) & ~part
        left, top, width, height = boxes[k, :4]
        inside = left > 0 and top > 0 and left + width < label.shape[1] and top + height < label.shape[0]
        if inside and depth[rim].min() >= depth[part].max():
            found.append(int(width))
    return found


def sheet(domain: str, count: int = 12, columns: int = 3) -> np.ndarray:
    """Pictures next to their label maps, `columns` pairs in a row, RGB."""
    pairs = []
    for index in range(count):
        image, label, _ = draw_scene(domain, "train", index)
        pairs.append(np.concatenate([image, SPACE.palette[label]], 1))
    rows = [np.concatenate(pairs[k : k + columns], 1) for k in range(0, count, columns)]
    return np.concatenate(rows)


def print_gap(workdir: Path) -> None:
    """mIoU on `camera` of a network trained on `game`, of one trained on `camera` labels, and of chance."""
    results = json.loads((workdir / "results.json").read_text())
    last = {stage: result["last"] for stage, result in results["stages"].items()}
    source, oracle = (100 * last[stage]["miou"] for stage in ("source_only", "oracle"))
    # Chance: always the most frequent class.
    counts = np.sum(last["oracle"]["confusion"], 1)
    chance = 100 * counts.max() / counts.sum() / np.count_nonzero(counts)
    print(f"mIoU on camera after {last['oracle']['step']} steps: trained on game {source:.1f}, on camera {oracle:.1f}")
    print(f"  lost {oracle - source:.1f} points; above chance ({chance:.1f}) {source - chance:.1f} points")


def main() -> None:
    """Reads the command line and prints the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=200, help="scenes of each domain to measure")
    parser.add_argument("--sheet", type=Path, help="PNG file to write pictures and label maps to")
    parser.add_argument("--gap", type=Path, help="work folder of the training to report")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    for domain in DOMAINS:
        print(f"{domain}: {scenes_per_second(domain, arguments.scenes):.0f} scenes/s on one core")
        scenes = [draw_scene(domain, "train", index) for index in range(arguments.scenes)]
        present, pixels = class_shares(scenes)
        for name, share, area in zip(SPACE.classes, present, pixels, strict=True):
            print(f"  {name:<10} in {share:6.1%} of scenes, {area:6.2%} of pixels")
        for name in THIN:
            all_widths = np.array([w for scene in scenes for w in widths(scene, name)])
            print(
                f"  {name:<10} width: least {all_widths.min()}, median {np.median(all_widths):.0f}, "
                f"{(all_widths >= 3).mean():.1%} of {len(all_widths)} at least 3 pixels"
            )
    if arguments.gap:
        print_gap(arguments.gap)
    if arguments.sheet:
        arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
        picture = np.concatenate([sheet(domain) for domain in DOMAINS])
        cv2.imwrite(str(arguments.sheet), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        print(f"pictures: {arguments.sheet}")


if __name__ == "__main__":
    main()
