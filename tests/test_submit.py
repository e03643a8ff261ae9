"""Predictions for test servers: what is packed, and what is named."""

import io
import zipfile
from pathlib import Path

import layouts
import numpy as np
import pytest
from PIL import Image

from jaxuda.data import servers
from jaxuda.data.datasets import cityscapes
from jaxuda.data.labels import label_space
from jaxuda.submit import main
from jaxuda.sweeps.predict import write_predictions

SIZE = (32, 16)  # in place of the published ones, see `small`
FOLDERS = {
    "cityscapes": [""],
    "acdc": ["labelTrainIds"],
    "darkzurich": ["confidence", "labelTrainIds", "labelTrainIds_invalid"],
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, server in servers.SERVERS.items():
        monkeypatch.setitem(servers.SERVERS, name, server._replace(size=SIZE))


def draw(name: str, root: Path) -> str:
    """A tiny copy of a dataset, and the pattern of its test images."""
    patterns = {
        "cityscapes": "leftImg8bit/test/*/*.png",
        "acdc": "rgb_anon/*/test/*/*.png",
        "darkzurich": "rgb_anon/test/night/*/*.png",
    }
    getattr(layouts, name)(root, SIZE)
    return f"{root}/{patterns[name]}"


def predict(pattern: str, folder: Path, space: str = "cityscapes19") -> dict[str, np.ndarray]:
    """Random train ids for each image of a pattern, written as `--mode predict` writes them."""
    rng, classes = np.random.default_rng(0), label_space(space).num_classes
    images = sorted(Path("/").glob(pattern.lstrip("/")))
    found = {file.stem: rng.integers(0, classes, SIZE[::-1], np.uint8) for file in images}
    write_predictions(found.items(), folder, label_space(space))
    return found


def words(name: str, pattern: str, tmp_path: Path) -> list[str]:
    out = ["--out", str(tmp_path / "out.zip")]
    return [name, "--predictions", str(tmp_path / "predictions"), "--images", pattern, *out]


def unpacked(file: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        return {name: np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_packed(tmp_path, capsys, name):
    pattern = draw(name, tmp_path / "source")
    predicted = predict(pattern, tmp_path / "predictions")
    assert main(words(name, pattern, tmp_path)) == 0
    count = len(predicted)
    assert f"warning: these are {count} images; the test set of {name} has " in capsys.readouterr().out
    packed = unpacked(tmp_path / "out.zip")
    assert sorted({file.rpartition("/")[0] for file in packed}) == FOLDERS[name]
    assert len(packed) == count * len(FOLDERS[name])
    for stem, ids in predicted.items():
        if name == "cityscapes":
            np.testing.assert_array_equal(packed[f"{stem}.png"], np.array([*cityscapes.CLASSES])[ids])
            continue
        np.testing.assert_array_equal(packed[f"labelTrainIds/{stem}.png"], ids)
        if name == "darkzurich":
            np.testing.assert_array_equal(packed[f"labelTrainIds_invalid/{stem}.png"], ids)
            confidence = packed[f"confidence/{stem}.png"]
            assert confidence.dtype == np.uint16 and (confidence == 65535).all()
    first = (tmp_path / "out.zip").read_bytes()
    assert main(words(name, pattern, tmp_path)) == 2
    assert "out.zip exists already" in capsys.readouterr().err
    (tmp_path / "out.zip").unlink()
    assert main(words(name, pattern, tmp_path)) == 0 and (tmp_path / "out.zip").read_bytes() == first


def test_fewer_classes_keep_their_meaning(tmp_path):
    """Train ids of 16 classes differ from those of 19 from terrain on."""
    pattern = draw("acdc", tmp_path / "source")
    predicted = predict(pattern, tmp_path / "predictions", "synthia16")
    assert main(words("acdc", pattern, tmp_path)) == 0
    sixteen, nineteen = (label_space(name).classes for name in ("synthia16", "cityscapes19"))
    table = np.array([nineteen.index(name) for name in sixteen])
    packed = unpacked(tmp_path / "out.zip")
    for stem, ids in predicted.items():
        np.testing.assert_array_equal(packed[f"labelTrainIds/{stem}.png"], table[ids])


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_wrong_is_named_and_nothing_is_packed(tmp_path, capsys, name):
    pattern = draw(name, tmp_path / "source")
    predict(pattern, tmp_path / "predictions")
    folder = tmp_path / "predictions" / "cityscapes_ids"
    missing, size, ids, *_ = sorted(folder.iterdir()) if name != "cityscapes" else [*sorted(folder.iterdir()), None]
    missing.unlink()
    layouts.grey(size, layouts.ids((7, 8), (16, 8)))
    expected = [f"{missing}: is missing", f"{size}: is 16x8, not 32x16"]
    if ids:
        layouts.grey(ids, layouts.ids((7, 0, 14), SIZE))
        expected.append(f"{ids}: has ids that are none of the classes of Cityscapes: 0, 14")
    assert main(words(name, pattern, tmp_path)) == 2
    message = capsys.readouterr().err
    assert all(text in message for text in expected) and message.count("\n") == len(expected) + 1
    assert not list(tmp_path.glob("*.zip")) and not list(tmp_path.glob(".*"))


def test_images_of_another_dataset_and_unknown_servers(tmp_path, capsys):
    pattern = draw("acdc", tmp_path / "source")
    predict(pattern, tmp_path / "predictions")
    assert main(words("cityscapes", pattern, tmp_path)) == 2
    assert "test images of cityscapes are named *_leftImg8bit.png" in capsys.readouterr().err
    assert main(words("bdd", pattern, tmp_path)) == 2
    assert "unknown server 'bdd'; choose one of: cityscapes, acdc, darkzurich" in capsys.readouterr().err
    (tmp_path / "predictions" / "cityscapes_ids").rename(tmp_path / "elsewhere")
    assert main(words("acdc", pattern, tmp_path)) == 2
    assert capsys.readouterr().err.count("is missing") == 8
