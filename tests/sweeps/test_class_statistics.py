import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import random_variables
from ml_collections import ConfigDict

from jaxuda.artifacts.statistics import FILE, read_statistics
from jaxuda.data.labels import make_label_space
from jaxuda.data.records import Domains
from jaxuda.data.transforms import resize_image, resize_nearest
from jaxuda.errors import UserError
from jaxuda.methods import sdca
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.layers import normalise, resize_labels
from jaxuda.sweeps import class_statistics

CLASSES = ("road", "car", "train", "sky")
MODEL = DeepLabV2(len(CLASSES), "resnet18", "torchvision", width=8, blocks=(1, 1, 1, 1))
CONFIG = ConfigDict(
    {
        "preprocess": "imagenet",
        "label_space": "",
        "source": {"resize": (48, 32)},
        "evaluation": {"batch": 4, "size": (48, 32)},
    }
)


class _Source(list):
    name = "a tiny source"
    label_space = make_label_space("four", dict.fromkeys(CLASSES, (0, 0, 0)))


@functools.cache
def _source() -> _Source:
    """Seven labelled images of two sizes; no image has a train."""
    rng = np.random.default_rng(0)
    records = _Source()
    for index in range(7):
        shape = (64, 96) if index % 2 else (32, 48)
        label = rng.choice(np.array([0, 1, 3, 255], np.uint8), (4, 6)).repeat(shape[0] // 4, 0).repeat(shape[1] // 6, 1)
        records.append({"image": rng.integers(0, 256, (*shape, 3), np.uint8), "label": label, "id": str(index)})
    return records


@functools.cache
def _variables():
    return jax.tree.map(np.asarray, random_variables(MODEL, jnp.zeros((1, 32, 48, 3))))


def _collect(folder, devices=1):
    told = []
    class_statistics.run(
        _variables(),
        Domains(_source(), None),
        folder,
        model=MODEL,
        method=None,
        config=CONFIG,
        devices=jax.devices()[:devices],
        say=told.append,
    )
    return read_statistics(folder, MODEL, 64, CLASSES), told


def _expected():
    """Features, logits and labels of all pixels, from the images at their final size."""
    features, logits, labels = [], [], []
    for record in _source():
        image = resize_image(record["image"], (48, 32))[None]
        outputs = MODEL.apply(_variables(), normalise(image, "imagenet"))
        grid = outputs.main.shape[1:3]
        labels.append(resize_labels(resize_nearest(record["label"], (48, 32)), grid).reshape(-1))
        features.append(np.asarray(outputs.features, np.float64).reshape(-1, outputs.features.shape[-1]))
        logits.append(np.asarray(outputs.main, np.float64).reshape(-1, len(CLASSES)))
    return np.concatenate(features), np.concatenate(logits), np.concatenate(labels)


def test_one_pass_gives_the_statistics_of_all_pixels(tmp_path):
    statistics, told = _collect(tmp_path)
    *levels, labels = _expected()
    for stats, values in zip(statistics, levels, strict=True):
        for c in range(len(CLASSES)):
            chosen = values[labels == c]
            assert stats.count[c] == len(chosen)
            if c != CLASSES.index("train"):
                scale = np.abs(values).max()
                np.testing.assert_allclose(stats.mean[c], chosen.mean(0), rtol=1e-4, atol=1e-5 * scale)
                np.testing.assert_allclose(stats.var[c], chosen.var(0), rtol=1e-3, atol=1e-5 * scale**2)
            else:
                assert not np.any(stats.mean[c]) and not np.any(stats.var[c])
    assert len(told) == 1 and "no pixel of train" in told[0]


def test_devices_do_not_matter(tmp_path):
    one, two = (_collect(tmp_path, devices)[0] for devices in (1, 2))
    for ours, expected in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_training_starts_from_the_file(tmp_path):
    statistics, _ = _collect(tmp_path)
    batch = {"source": {"image": np.zeros((2, 32, 48, 3), np.float32)}}
    init = functools.partial(sdca.init, jax.random.key(0), model=MODEL, batch=batch, config=CONFIG)
    extra = init(artifacts={"source_only": tmp_path / "nothing", "statistics": tmp_path}).extra
    jax.tree.map(np.testing.assert_array_equal, tuple(extra), tuple(statistics))
    empty = init(artifacts={}).extra
    assert jax.tree.map(np.shape, empty) == jax.tree.map(np.shape, extra)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(empty))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": MODEL.clone(width=16)}, "another network: resnet18 torchvision, width 8, .* width 16"),
        ({"model": MODEL.clone(variant="caffe")}, "another network.*caffe"),
        ({"channels": 128}, "64 channels, against .* 128 channels"),
        ({"model": MODEL.clone(num_classes=5), "classes": None}, "another label space: 4 classes .* against 5 here"),
        ({"classes": ("road", "car", "sky", "train")}, "another label space.*road, car, sky, train"),
    ],
)
def test_statistics_of_something_else_are_refused(tmp_path, change, message):
    _collect(tmp_path)
    fitting = {"model": MODEL, "channels": 64, "classes": CLASSES}
    read_statistics(tmp_path, **fitting)
    with pytest.raises(UserError, match=message) as error:
        read_statistics(tmp_path, **(fitting | change))
    assert FILE in str(error.value) and "--from_stage" in str(error.value)


def test_missing_and_damaged_files_are_explained(tmp_path):
    with pytest.raises(UserError, match="there are no class statistics in"):
        read_statistics(tmp_path, MODEL, 64)
    (tmp_path / FILE).write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(UserError, match=r"is corrupt .*: delete it"):
        read_statistics(tmp_path, MODEL, 64)
    np.savez(tmp_path / FILE, classes=np.array([{}], object))
    with pytest.raises(UserError, match="is corrupt"):
        read_statistics(tmp_path, MODEL, 64)
