"""Tiny copies of CamVid and of users' own folders, and the messages of `prepare` when it refuses them."""

import json

import numpy as np
from PIL import Image

from jaxuda.prepare import main

CLASSES = {
    "name": "My Town",
    "classes": [
        {"name": "road", "ids": [0, 7], "color": [128, 64, 128]},
        {"name": "sky", "id": 2, "color": [70, 130, 180]},
        {"name": "lantern", "id": 4, "color": [1, 2, 3]},
    ],
    "ignore": [9],
}


def image(file, size=(8, 6), seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(array).save(file)
    return array


def label(file, ids=(0, 7, 2, 4, 9, 255), size=(8, 6), palette=False):
    file.parent.mkdir(parents=True, exist_ok=True)
    array = np.resize(np.array(ids, np.uint8), size[::-1])
    picture = Image.fromarray(array)
    if palette:
        picture = Image.fromarray(array, "P")
        picture.putpalette(list(range(256)) * 3)
    picture.save(file)
    return array


def folder(root, splits=("train", "val"), classes=CLASSES):
    for split in splits:
        for index in range(3):
            image(root / "images" / split / f"{index}.png", seed=index)
            label(root / "labels" / split / f"{index}.png", palette=index == 1)
    if classes:
        (root / "classes.json").write_text(json.dumps(classes))
    return root


def camvid(root):
    names = {
        "train": ["0006R0_1", "0016E5_1", "0001TP_1", "0001TP_2"],
        "val": ["0016E5_7"],
        "test": ["Seq05VD_1", "0001TP_9"],
    }
    for split, stems in names.items():
        for seed, stem in enumerate(stems):
            image(root / split / f"{stem}.jpg", seed=seed)
            label(root / f"{split}annot" / f"{stem}.png", range(12))
    return root


def fails(capsys, *arguments):
    """Runs the command line, which must fail as users see it; returns the message."""
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def fails_on(capsys, root, tmp_path):
    """The message for a bad folder; nothing may be left of it."""
    message = fails(capsys, "folder", "--path", root, "--data_dir", tmp_path / "data")
    assert not list((tmp_path / "data").glob("folder/*"))
    assert not list((tmp_path / "data").glob("folder/.*"))
    return message
