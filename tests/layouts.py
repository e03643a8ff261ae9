"""Tiny folders in the layouts and file formats in which the benchmarks are published."""

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from jaxuda.data.datasets.mapillary import CATEGORIES
from jaxuda.data.datasets.mapillary2 import CATEGORIES as CATEGORIES_2

SIZE = (16, 8)  # width, height


def image(file: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """Writes noise as PNG or JPEG, as the file's name says; large images are tiles of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tile = np.random.default_rng(seed).integers(0, 256, (min(32, size[1]), min(32, size[0]), 3), np.uint8)
    array = np.tile(tile, (-(-size[1] // len(tile)), -(-size[0] // tile.shape[1]), 1))[: size[1], : size[0]]
    Image.fromarray(array).save(file)
    return array


def ids(names: range | tuple[int, ...], size: tuple[int, int] = SIZE) -> np.ndarray:
    """(H, W) uint8 with all of the given ids in turn."""
    return np.resize(np.array(names, np.uint8), size[::-1])


def grey(file: Path, label: np.ndarray) -> np.ndarray:
    """Writes ids as 8-bit grey PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(file)
    return label


def palette(file: Path, label: np.ndarray) -> np.ndarray:
    """Writes ids as palette PNG, in colours that are unrelated to them; some are transparent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(label, "P")
    picture.putpalette(np.random.default_rng(9).integers(0, 256, 768, np.uint8).tobytes())
    picture.save(file, transparency=bytes([0, 128, 255]))
    return label


def classes_and_instances(file: Path, label: np.ndarray, channels: int) -> np.ndarray:
    """Writes a 16-bit PNG: ids in the first channel, instances in the second; 2 (grey and alpha) or 3 channels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    instances = np.arange(label.size, dtype=np.uint16).reshape(label.shape) * 37
    if channels == 3:
        array = np.stack([np.zeros_like(instances), instances, label.astype(np.uint16)], -1)  # OpenCV: BGR
        assert cv2.imwrite(str(file), array)
        return label
    return _grey_alpha(file, label, instances)


def _grey_alpha(file: Path, label: np.ndarray, instances: np.ndarray) -> np.ndarray:
    # Neither Pillow nor OpenCV writes 16-bit grey with alpha.
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = np.stack([label, instances], -1).astype(">u2").reshape(len(label), -1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", label.shape[1], label.shape[0], 16, 4, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return label


def depth(file: Path, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Writes 16-bit depth."""
    file.parent.mkdir(parents=True, exist_ok=True)
    array = (np.arange(size[0] * size[1], dtype=np.uint16) * 331).reshape(size[::-1])
    assert cv2.imwrite(str(file), array)
    return array


def gta5(root: Path, count: int = 3) -> Path:
    """images, labels; the last image and its label differ in size."""
    for index in range(1, count + 1):
        image(root / "images" / f"{index:05d}.png", seed=index)
        palette(root / "labels" / f"{index:05d}.png", ids(range(35), (12, 8) if index == count else SIZE))
    return root


def synthia(root: Path, count: int = 3, parsed: bool = False) -> Path:
    """RAND_CITYSCAPES with 16-bit labels of three channels, the first one of two; or the other accepted layout."""
    top = root if parsed else root / "RAND_CITYSCAPES"
    for index in range(count):
        name = f"{index:07d}.png"
        image(top / "RGB" / name, seed=index)
        if parsed:
            grey(top / "parsed_LABELS" / name, ids(range(23)))
            depth(top / "Depth" / name)
        else:
            classes_and_instances(top / "GT" / "LABELS" / name, ids(range(23)), 3 if index else 2)
            depth(top / "Depth" / "Depth" / name)
    return root


def cityscapes(root: Path, size: tuple[int, int] = SIZE) -> Path:
    """Two cities per split; gtFine has its other files too, and test labels that are all void."""
    cities = {"train": ("aachen", "ulm"), "val": ("frankfurt", "munster"), "test": ("berlin",)}
    for split, names in cities.items():
        for seed, city in enumerate(names):
            for frame in (19, 39):
                stem = f"{city}_000000_{frame:06d}"
                image(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", size, seed + frame)
                label = ids(range(34), size) if split != "test" else ids((0,), size)
                grey(root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", label)
                palette(root / "gtFine" / split / city / f"{stem}_gtFine_color.png", label)
                grey(root / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", label)
                (root / "gtFine" / split / city / f"{stem}_gtFine_polygons.json").write_text("{}")
    return root


def crosscity(root: Path, city: str = "Rome") -> Path:
    """One city, with JPEG and PNG images."""
    for index in range(3):
        image(root / city / "Images" / "Train" / f"pano_{index}.jpg", seed=index)
    for index, suffix in enumerate(("png", "jpg")):
        image(root / city / "Images" / "Test" / f"pano_t{index}.{suffix}", seed=index)
        grey(root / city / "Labels" / "Test" / f"pano_t{index}_eval.png", ids((*range(34), 255)))
    return root


def mapillary(root: Path) -> Path:
    """Images of several sizes and config_v1.2.json."""
    return _mapillary(root, "labels", "v1.2", CATEGORIES)


def mapillary2(root: Path) -> Path:
    """The same images with the labels of v2.0, and config_v2.0.json."""
    return _mapillary(root, "v2.0/labels", "v2.0", CATEGORIES_2)


def _mapillary(root: Path, labels: str, version: str, categories: tuple[str, ...]) -> Path:
    for folder in ("training", "validation"):
        for index, size in enumerate(((20, 10), (9, 16), (16, 12))):
            image(root / folder / "images" / f"{folder}{index}.jpg", size, index)
            palette(root / folder / labels / f"{folder}{index}.png", ids(range(len(categories)), size))
    readable = [{"name": "x--y", "readable": name.title()} for name in categories]
    (root / f"config_{version}.json").write_text(json.dumps({"labels": readable}))
    return root


ACDC = ("fog", "night", "rain", "snow")
TRAIN_IDS = (*range(19), 255)


def acdc(root: Path, size: tuple[int, int] = SIZE, swapped: bool = False) -> Path:
    """Two sequences of each condition per split, with the other published files beside; or SPLIT/CONDITION."""
    for condition in ACDC:
        for split in ("train", "val", "test"):
            place = f"{split}/{condition}" if swapped else f"{condition}/{split}"
            for index, sequence in enumerate(("GOPR0001", "GP010001")):
                stem = f"{sequence}_frame_{ACDC.index(condition):03d}{len(split):03d}"
                image(root / "rgb_anon" / place / sequence / f"{stem}_rgb_anon.png", size, index)
                if split != "test":
                    night_labels(root / "gt" / place / sequence / stem, size)
                    reference = root / "rgb_anon" / condition / f"{split}_ref" / sequence / f"{stem}_rgb_ref_anon.png"
                    if not swapped:
                        image(reference, size, index)
    return root


def night_labels(stem: Path, size: tuple[int, int] = SIZE) -> None:
    """The label files of ACDC and Dark Zurich of one image."""
    grey(stem.with_name(f"{stem.name}_gt_labelTrainIds.png"), ids(TRAIN_IDS, size))
    grey(stem.with_name(f"{stem.name}_gt_labelIds.png"), ids(range(34), size))
    image(stem.with_name(f"{stem.name}_gt_labelColor.png"), size)
    grey(stem.with_name(f"{stem.name}_gt_invIds.png"), ids((0, 1), size))


def acdc_flat(root: Path) -> Path:
    """The images and labels of `acdc` as self-training repositories copy them: all of a split in one folder."""
    acdc(root.with_name(f"{root.name}-whole"))
    for kind, ending in (("rgb_anon", "_rgb_anon.png"), ("gt", "_gt_labelTrainIds.png")):
        for split in ("train", "val"):
            (root / kind / split).mkdir(parents=True)
            for file in root.with_name(f"{root.name}-whole").glob(f"{kind}/*/{split}/*/*{ending}"):
                file.rename(root / kind / split / file.name)
    return root


def darkzurich(root: Path, size: tuple[int, int] = SIZE) -> Path:
    """Two sequences per split; by day one image for two of the night; twilight is not read."""
    rows = []
    for sequence in ("GOPR0351", "GOPR0376"):
        for split in ("train", "val", "test"):
            for frame in (1, 2):
                stem = f"{sequence}_frame_{frame:06d}"
                image(root / "rgb_anon" / split / "night" / sequence / f"{stem}_rgb_anon.png", size, frame)
        for frame in (1, 2):
            night_labels(root / "gt" / "val" / "night" / sequence / f"{sequence}_frame_{frame:06d}", size)
            rows.append(f"train/night/{sequence}/{sequence}_frame_{frame:06d},train/day/GOPR0345/GOPR0345_frame_000090")
        image(root / "rgb_anon" / "train" / "twilight" / sequence / f"{sequence}_frame_000009_rgb_anon.png", size)
    image(root / "rgb_anon" / "train" / "day" / "GOPR0345" / "GOPR0345_frame_000090_rgb_anon.png", size, 90)
    table = root / "corresp" / "train" / "night" / "GOPR0351.csv"
    table.parent.mkdir(parents=True)
    table.write_text("\n".join(rows) + "\n")
    return root
