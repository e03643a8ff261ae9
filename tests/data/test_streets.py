"""The drawn scenes are repeatable, and meet `experiments/streets_requirements.py`."""

import functools
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.streets_requirements import DOMAINS, THIN, class_shares, widths
from jaxuda.data import encoding
from jaxuda.data.datasets import streets
from jaxuda.data.datasets.scenes import look
from jaxuda.data.datasets.streets import draw_scene
from jaxuda.data.labels import label_space

SKY, ROAD = 10, 0


@functools.cache
def scenes(domain):
    return [draw_scene(domain, "train", index) for index in range(120)]


def digest(*arguments, **options):
    return hashlib.sha256(b"".join(a.tobytes() for a in draw_scene(*arguments, **options))).hexdigest()


@pytest.mark.parametrize("domain", DOMAINS)
def test_shapes_and_types(domain):
    image, label, depth = scenes(domain)[0]
    assert image.shape == (128, 256, 3) and image.dtype == np.uint8
    assert label.shape == (128, 256) and label.dtype == np.uint8
    assert depth.shape == (128, 256) and depth.dtype == np.uint16
    assert all(s[1].max() <= 18 for s in scenes(domain))


@pytest.mark.parametrize("size", [(128, 64), (320, 200), (1024, 512), (33, 47)])
def test_any_size(size):
    for domain in DOMAINS:
        image, label, depth = draw_scene(domain, "train", 3, size=size)
        assert image.shape == (size[1], size[0], 3)
        assert label.shape == depth.shape == (size[1], size[0])
        assert label.max() <= 18


def test_same_arguments_same_scene():
    first = digest("camera", "train", 5)
    draw_scene("game", "val", 1)  # no state is carried from scene to scene
    assert digest("camera", "train", 5) == first
    code = (
        "import hashlib; from jaxuda.data.datasets.streets import draw_scene;"
        "print(hashlib.sha256(b''.join(a.tobytes() for a in draw_scene('camera', 'train', 5))).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == first


def test_other_arguments_other_scene():
    seen = {
        digest(domain, split, index, seed=seed)
        for domain in DOMAINS for split in ("train", "val") for index in (0, 1) for seed in (0, 1)
    }  # fmt: skip
    assert len(seen) == 16


def test_unknown_domain_is_named():
    with pytest.raises(ValueError, match="game, camera"):
        draw_scene("dusk", "train", 0)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_class_in_a_tenth_of_the_scenes(domain):
    present, _ = class_shares(scenes(domain))
    names = label_space("cityscapes19").classes
    assert not {n: p for n, p in zip(names, present, strict=True) if p < 0.1}


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("name", THIN)
def test_thin_things_are_three_pixels_wide(domain, name):
    found = np.array([w for scene in scenes(domain) for w in widths(scene, name)])
    assert len(found) > 50
    assert (found >= 3).mean() >= 0.95


@pytest.mark.parametrize("domain", DOMAINS)
def test_inverse_depth_follows_from_the_ground_plane(domain):
    for _, label, depth in scenes(domain)[:30]:
        inverse = encoding.inverse_depth(depth)
        assert np.all(inverse[label == SKY] == 1.0)
        assert 65536 / 250_00 < inverse[label == ROAD].max() < 65536 / 1_00
        rows = [y for y in range(128) if (label[y] == ROAD).sum() > 5]
        values = np.array([np.median(inverse[y][label[y] == ROAD]) for y in rows])
        # Affine in the row, since the ground is a plane, except for the rounding to centimetres.
        near = values > 65536 / 30_00
        line = np.polyfit(np.array(rows)[near], values[near], 1)
        assert line[0] > 0
        np.testing.assert_allclose(np.polyval(line, np.array(rows)[near]), values[near], rtol=0.01)


def test_things_stand_where_they_touch_the_ground():
    """The ground below a person's feet has about the same depth."""
    differences = []
    for _, label, depth in scenes("game")[:60]:
        person, below = label[:-1] == 11, np.isin(label[1:], (0, 1, 9))
        y, x = np.nonzero(person & below)
        if len(y):
            foot = y.argmax()
            differences.append(depth[y[foot], x[foot]] / (depth[y[foot] + 1, x[foot]] + 1.0))
    assert abs(np.median(differences) - 1) < 0.05


def test_domains_look_different():
    means = {d: np.mean([image.mean((0, 1)) for image, _, _ in scenes(d)[:40]], 0) for d in DOMAINS}
    colourful = {d: np.mean([np.ptp(image.astype(int), axis=2).mean() for image, _, _ in scenes(d)[:40]])
                 for d in DOMAINS}  # fmt: skip
    assert np.abs(means["game"] - means["camera"]).max() > 5
    assert colourful["game"] > 1.5 * colourful["camera"]


def test_palettes_of_the_domains_can_be_mixed():
    for name, (game, camera) in look._PALETTES.items():
        assert len(game) == len(camera), name


def test_builder(tmp_path, monkeypatch):
    monkeypatch.setattr(streets, "SPLITS", {"train": 3, "val": 2})
    builder = streets.Streets(data_dir=tmp_path, config="camera")
    assert set(streets.Streets.builder_configs) == set(DOMAINS)
    builder.download_and_prepare(file_format="array_record")
    skip = {key: tfds.decode.SkipDecoding() for key in ("image", "label", "depth")}
    for split, count in streets.SPLITS.items():
        source = builder.as_data_source(split, decoders=skip)
        assert len(source) == count
        for index in range(count):
            record = source[index]
            image, label, depth = draw_scene("camera", split, index)
            assert record["id"].decode() == f"camera_{split}_{index:05d}"
            np.testing.assert_array_equal(encoding.decode_image(record["image"]), image)
            np.testing.assert_array_equal(encoding.decode_label(record["label"]), label)
            np.testing.assert_array_equal(encoding.decode_depth(record["depth"]), depth)
    assert "tensorflow" not in sys.modules
