"""What `prepare folder` shows of the user's own data: warnings, a table of the classes, a sheet of overlays.

Nothing here is an error: a folder that gets this far can be trained on.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from jaxuda.data import encoding
from jaxuda.data.checking import Item
from jaxuda.data.labels import IGNORE, colourise
from jaxuda.data.names import plain
from jaxuda.data.records import Records

PREVIEW = "preview.png"
RARE = 100  # a rare class has this many times fewer pixels than the most common one
_MOSTLY = 0.5  # of the pixels
_PALETTES_READ = 16
_IMAGES = 6  # of each split on the sheet
_WIDTH = 320  # of a picture on the sheet, in pixels
_LINE = 20  # height of a line of text there, in pixels


def warnings(
    items: Mapping[str, Sequence[Item]], counts: Mapping[str, np.ndarray], classes: Mapping[str, Any] | None
) -> list[str]:
    """Common mistakes that these data show, one sentence each.

    Args:
      items: the files of each split.
      counts: labelled split -> the pixels of each raw id in each label, (n, 256).
      classes: as returned by `folder.read_classes`; None without labels.
    """
    found = _other_names(items) + _duplicates(items)
    pixels = {split: count.sum(0, dtype=np.int64) for split, count in counts.items()}
    if classes and pixels:
        labels = [item.label for split in counts for item in items[split]]
        found += _masks(labels, np.concatenate(list(counts.values())), classes)
        found += _ids(sum(pixels.values()), classes) + _classes(pixels, classes) + _palettes(items, classes)
    return found


def class_weights(pixels: np.ndarray) -> np.ndarray:
    """Weights (C,) for the cross-entropy from the pixels (C,) of each class; the most common class has 1.

    1 / ln(1.02 + share), as for ENet (Paszke et al., arXiv 1606.02147, sec. 5.2): a rare class gets at most some 35
    times the weight of a class that is everywhere. A class without pixels gets 1.
    """
    weights = 1 / np.log(1.02 + pixels / max(pixels.sum(), 1))
    weights = weights / weights[pixels.argmax()]
    return np.where(pixels > 0, weights, 1).round(2)


def table(data: Mapping[str, Records], classes: Mapping[str, Any]) -> str:
    """Classes, their share of the pixels and the number of images that show them, by split, and weights.

    Args:
      data: the labelled splits, at least one, with the classes of the folder.
      classes: as for `warnings`.
    """
    counts = {split: records.class_pixels() for split, records in data.items()}
    weights = class_weights(next(iter(counts.values()))[:, :-1].sum(0))
    names = [entry["name"] for entry in classes["classes"]]
    wide = max(map(len, [*names, "class", "ignored"]))
    head = "".join(f"{split + ' pixels':>15}{'images':>8}" for split in counts)
    lines = [f"{'class':<{wide}}{head}{'weight':>9}   ids"]
    for index, entry in enumerate(classes["classes"]):
        cells = "".join(_cells(count, index) for count in counts.values())
        lines.append(f"{entry['name']:<{wide}}{cells}{weights[index]:>9.2f}   {', '.join(map(str, entry['ids']))}")
    lines.append(f"{'ignored':<{wide}}{''.join(_cells(count, -1) for count in counts.values())}")
    return "\n".join(lines)


def _cells(counts: np.ndarray, index: int) -> str:
    return f"{counts[:, index].sum() / counts.sum():>15.2%}{np.count_nonzero(counts[:, index]):>8}"


def preview(data: Mapping[str, Records]) -> bytes:
    """A PNG sheet: for some images of each labelled split the image, its label laid over it, and the label alone.

    Each image is the one that shows the most classes which the earlier ones lack. Ignored pixels are black.
    """
    space = next(iter(data.values())).label_space
    rows = [_legend(space.classes, space.palette)]
    for records in data.values():
        for index in _chosen(records.class_pixels()[:, :-1] > 0):
            record = records[index]
            height = max(1, round(record["image"].shape[0] * _WIDTH / record["image"].shape[1]))
            image = cv2.resize(record["image"], (_WIDTH, height), interpolation=cv2.INTER_AREA)
            label = cv2.resize(record["label"], (_WIDTH, height), interpolation=cv2.INTER_NEAREST)
            colours = colourise(label, space)
            laid_over = cv2.addWeighted(image, 0.45, colours, 0.55, 0)
            rows.append(_text(f"{records.name}: {record['id']}", 3 * _WIDTH))
            rows.append(np.concatenate([image, laid_over, colours], 1))
    return encoding.encode_image(np.concatenate(rows))


def _chosen(shown: np.ndarray) -> list[int]:
    """Indices of `_IMAGES` rows of (n, C) bool, or of all rows if there are fewer, in order."""
    missing, chosen = shown.copy(), []
    while len(chosen) < min(_IMAGES, len(shown)):
        best = int(missing.sum(1).argmax())
        if not missing[best].any():  # all classes are shown: spread the remaining images evenly
            even = np.linspace(0, len(shown) - 1, _IMAGES).astype(int).tolist()
            left = [index for index in [*even, *range(len(shown))] if index not in chosen]
            return sorted(chosen + list(dict.fromkeys(left))[: min(_IMAGES, len(shown)) - len(chosen)])
        chosen.append(best)
        missing[:, shown[best]] = False
    return sorted(chosen)


def _legend(names: Sequence[str], palette: np.ndarray) -> np.ndarray:
    """The names of the classes beside their colours, four in a line."""
    columns, width = 4, 3 * _WIDTH
    sheet = np.full((-(-len(names) // columns) * _LINE + 4, width, 3), 255, np.uint8)
    for index, (name, colour) in enumerate(zip(names, palette, strict=True)):
        x, y = index % columns * (width // columns) + 4, index // columns * _LINE + 4
        cv2.rectangle(sheet, (x, y), (x + 14, y + 12), colour.tolist(), -1)
        cv2.rectangle(sheet, (x, y), (x + 14, y + 12), (90, 90, 90), 1)
        _write(sheet, name[:28], (x + 20, y + 11))
    return sheet


def _text(text: str, width: int) -> np.ndarray:
    strip = np.full((_LINE, width, 3), 255, np.uint8)
    _write(strip, text[-130:], (4, _LINE - 6))
    return strip


def _write(sheet: np.ndarray, text: str, place: tuple[int, int]) -> None:
    plain = text.encode("ascii", "replace").decode()  # OpenCV draws only ASCII
    cv2.putText(sheet, plain, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (20, 20, 20), 1, cv2.LINE_AA)


def _of_classes(pixels: np.ndarray, classes: Mapping[str, Any]) -> np.ndarray:
    """The pixels of each class, (C,), from those of each raw id."""
    return np.array([pixels[entry["ids"]].sum() for entry in classes["classes"]])


def _ids(pixels: np.ndarray, classes: Mapping[str, Any]) -> list[str]:
    """Warnings that the ids of the files may not be those of classes.json; pixels (256,)."""
    names = {raw: entry["name"] for entry in classes["classes"] for raw in entry["ids"]}
    low, high = min(names), max(names)
    found, total = [], pixels.sum()
    others = total - pixels[list(names)].sum()
    if low < high and not pixels[low] and pixels[high]:
        found.append(
            f"no pixel has the id {low} ({names[low]}), the lowest in classes.json: do the labels count from "
            f"{low + 1}? Then each class has the name of its neighbour"
        )
    if low and pixels[low - 1] and not pixels[high]:
        found.append(
            f"no pixel has the id {high} ({names[high]}), the highest in classes.json, but "
            f"{pixels[low - 1] / total:.0%} have {low - 1}, which is ignored: do the labels count from {low - 1}?"
        )
    if others > _MOSTLY * total:
        found.append(f'{others / total:.0%} of the pixels belong to no class (255, or "ignore" in classes.json)')
    if not others:
        found.append(
            "255 is unused, every pixel has a class: correct if every class is certain; otherwise (borders, things of "
            "no class) use 255, which training and scores ignore"
        )
    return found


def _masks(labels: Sequence[Path], counts: np.ndarray, classes: Mapping[str, Any]) -> list[str]:
    """Warnings of masks of 0 and 255, also if other labels are of 0 and 1; counts (n, 256), of each label.

    A label that shows one id and 255 may be a mask of that kind. It is none where there are several classes and other
    labels show 255 beside more of them, as where 255 marks borders.
    """
    shown = np.count_nonzero(counts[:, :IGNORE], axis=1)
    holds_255 = counts[:, IGNORE] > 0
    masks = np.flatnonzero(holds_255 & (shown == 1))
    if (
        len(classes["classes"]) < 2
        or not len(masks)
        or (len(classes["classes"]) > 2 and (holds_255 & (shown > 1)).any())
    ):
        return []
    names = {raw: entry["name"] for entry in classes["classes"] for raw in entry["ids"]}
    raw = int(counts[masks[0], :IGNORE].argmax())
    alone = np.count_nonzero(counts[:, :IGNORE].any(0)) == 1
    which = "the labels" if alone else f"{len(masks)} of {len(labels)} labels, such as {labels[masks[0]]},"
    return [
        f"{which} only hold {names.get(raw, raw)} and 255, and 255 always means 'ignored': if they are masks of 0 and "
        "255, save the 255 as the id of its class"
    ]


def _other_names(items: Mapping[str, Sequence[Item]]) -> list[str]:
    """A warning that images and labels of different names were taken for pairs."""
    pairs = [(item.image, item.label) for found in items.values() for item in found if item.label is not None]
    others = [(image, label) for image, label in pairs if plain(image.stem) != plain(label.stem)]
    if not others:
        return []
    image, label = others[0]
    return [f"{len(others)} labels are named otherwise than their images, such as {image} and {label}: is this a pair?"]


def _classes(pixels: Mapping[str, np.ndarray], classes: Mapping[str, Any]) -> list[str]:
    """Warnings of classes that are missing or rare; pixels: split -> (256,)."""
    names = [entry["name"] for entry in classes["classes"]]
    counts = {split: _of_classes(raw, classes) for split, raw in pixels.items()}
    total = sum(counts.values())
    found = []
    if never := [name for name, count in zip(names, total, strict=True) if not count]:
        found.append(f"classes.json names classes that no label shows: {', '.join(never)}")
    for split, count in counts.items():
        absent = [name for name, own, all_ in zip(names, count, total, strict=True) if all_ and not own]
        if absent:
            effect = "cannot be learned" if split == "train" else "cannot be scored"
            found.append(f"no label of {split} shows {', '.join(absent)}, which {effect} there")
    first = next(iter(counts.values()))
    rare = [name for name, count in zip(names, first, strict=True) if 0 < count * RARE < first.max()]
    if rare:
        weights = ", ".join(f"{w:g}" for w in class_weights(first))
        found.append(
            f"{', '.join(rare)}: less than a {RARE}th of the pixels of {names[first.argmax()]}; such classes are "
            f'learned late or not at all. Weight them, --config.class_weights="({weights},)", or draw images with them '
            "more often, --config.source_only.order=class_balanced (and in other stages)"
        )
    return found


def _palettes(items: Mapping[str, Sequence[Item]], classes: Mapping[str, Any]) -> list[str]:
    """Warnings of palette labels that show a class in another one's colour, as when colours were numbered anew."""
    colours = {tuple(entry["color"]): entry for entry in classes["classes"]}
    named = {raw: entry for entry in classes["classes"] for raw in entry["ids"]}
    labels = [item.label for found in items.values() for item in found if item.label is not None]
    for index in np.unique(np.linspace(0, len(labels) - 1, _PALETTES_READ).astype(int)):
        with Image.open(labels[index]) as picture:
            if picture.mode != "P":
                continue
            palette = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
            ids = np.unique(np.asarray(picture))
        for raw in ids[ids < len(palette)].tolist():
            shown = colours.get(tuple(palette[raw].tolist()))
            if raw in named and shown is not None and shown is not named[raw] and shown["color"] != named[raw]["color"]:
                return [
                    f"{labels[index]}: its palette shows the id {raw} in the colour of {shown['name']}, but in "
                    f"classes.json {raw} is {named[raw]['name']}: were the colours numbered anew when it was saved?"
                ]
    return []


def _duplicates(items: Mapping[str, Sequence[Item]]) -> list[str]:
    """Warnings of images that are there twice, byte by byte: in two splits they make scores too high."""
    sizes = Counter(item.image.stat().st_size for found in items.values() for item in found)
    places = defaultdict(list)
    for split, found in items.items():
        for item in found:
            size = item.image.stat().st_size
            if sizes[size] > 1:  # files of other sizes differ
                places[size, hashlib.sha256(item.image.read_bytes()).digest()].append((split, item.image))
    twice = [place for place in places.values() if len(place) > 1]
    across = [place for place in twice if len({split for split, _ in place}) > 1]
    found = []
    if across:
        (_, one), (_, other) = across[0][0], next(p for p in across[0] if p[0] != across[0][0][0])
        found.append(
            f"the same image in more than one split ({len(across)} times), such as {one} and {other}: scores on "
            "training images mean little"
        )
    if within := len(twice) - len(across):
        example = next(place for place in twice if place not in across)
        found.append(f"the same image twice ({within} times), such as {example[0][1]} and {example[1][1]}")
    return found
