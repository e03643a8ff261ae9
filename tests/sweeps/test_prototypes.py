import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import random_variables
from ml_collections import ConfigDict

from jaxuda.artifacts.prototypes import FILE, read_prototypes
from jaxuda.data.labels import make_label_space
from jaxuda.data.records import Domains
from jaxuda.data.transforms import resize_image, resize_nearest
from jaxuda.errors import UserError
from jaxuda.losses.contrastive import class_centres, nearest_prototype_labels
from jaxuda.methods import cfcontra
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.heads import ProjectionHead
from jaxuda.models.layers import normalise, resize_labels
from jaxuda.sweeps import prototypes

CLASSES = ("road", "car", "train", "sky")
MODEL = DeepLabV2(len(CLASSES), "resnet18", "torchvision", width=8, blocks=(1, 1, 1, 1))
CONFIG = ConfigDict(
    {
        "preprocess": "imagenet",
        "label_space": "",
        "seed": 0,
        "source": {"resize": (48, 32)},
        "target": {"resize": (40, 40)},
        "evaluation": {"batch": 4, "size": (48, 32)},
        "projection": "mlp",
        "margin": 0.01,
        "normalise_for_labels": True,
        "source_images": 5,
        "target_images": 100,
    }
)


class _Records(list):
    label_space = make_label_space("four", dict.fromkeys(CLASSES, (0, 0, 0)))
    labelled = True

    def __init__(self, name, records):
        super().__init__(records)
        self.name = name

    def ids(self):
        return [record["id"] for record in self]

    def images_only(self):
        return _Records(self.name, [{k: v for k, v in record.items() if k != "label"} for record in self])


@functools.cache
def _domains() -> Domains:
    """Labelled images of two sizes, nine and six; no image has a train."""
    rng = np.random.default_rng(0)
    lists = []
    for name, count in (("a tiny source", 9), ("a tiny target", 6)):
        records = []
        for index in range(count):
            shape = (64, 96) if index % 2 else (32, 48)
            label = rng.choice(np.array([0, 1, 3, 255], np.uint8), (4, 6))
            label = label.repeat(shape[0] // 4, 0).repeat(shape[1] // 6, 1)
            records.append({"image": rng.integers(0, 256, (*shape, 3), np.uint8), "label": label, "id": str(index)})
        lists.append(_Records(name, records))
    return Domains(*lists)


@functools.cache
def _variables():
    return jax.tree.map(np.asarray, random_variables(MODEL, jnp.zeros((1, 32, 48, 3))))


def _run(folder, devices=1, **changes):
    told, config = [], CONFIG.copy_and_resolve_references()
    config.update(changes)
    prototypes.run(
        _variables(), _domains(), folder, model=MODEL, method=None, config=config,
        devices=jax.devices()[:devices], say=told.append,
    )  # fmt: skip
    return *read_prototypes(folder, config.projection, MODEL, 64, CLASSES), told


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prototypes")
    return folder, *_run(folder)


def _features(records, size, projection):
    images = np.stack([resize_image(record["image"], size) for record in records])
    outputs = MODEL.apply(_variables(), normalise(images, "imagenet"))
    return ProjectionHead("mlp").apply({"params": projection}, outputs.features), outputs.main


@pytest.mark.slow
def test_memories_are_those_of_the_definition(once):
    folder, memories, projection, told = once
    source, target = _domains()[:2]
    chosen = prototypes.choose(source, 5, seed=0)
    assert len(chosen) == 5 and set(chosen.ids()) < set(source.ids())
    features, logits = _features(list(chosen), (48, 32), projection)
    labels = np.stack([resize_labels(resize_nearest(r["label"], (48, 32)), logits.shape[1:3]) for r in chosen])
    right = np.where(np.argmax(logits, -1) == labels, labels, 255)
    expected, present = class_centres(features, right, 4)
    assert 0 < present.sum() < 4
    np.testing.assert_allclose(memories.source, expected, rtol=1e-4, atol=1e-5)

    features, _ = _features(target, (40, 40), projection)
    pseudo = nearest_prototype_labels(features, memories.source, 0.01, normalise=True)
    assert 0 < np.mean(pseudo == 255) < 1
    expected, _ = class_centres(features, pseudo, 4)
    np.testing.assert_allclose(memories.target, expected, rtol=1e-3, atol=1e-3)
    assert "5 images of a tiny source" in told[0] and "no such pixel of" in told[1] and "train" in told[1]
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_devices_do_not_matter(once, tmp_path):
    _, one, _, _ = once
    two, _, _ = _run(tmp_path, devices=2)
    for ours, expected in zip(two, one, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batches", [1, 3])
def test_an_interrupted_pass_goes_on(once, tmp_path, monkeypatch, batches):
    """Killed after one batch of the source, and in the middle of the target: nothing is read twice."""
    _, uninterrupted, head, _ = once
    monkeypatch.setattr(prototypes, "SAVE_EVERY", 1)
    read, sweep_batches = [], prototypes.data.sweep_batches

    def recorded(*arguments):
        for batch in sweep_batches(*arguments):
            read.append(batch["id"])
            yield batch

    def dying(*arguments):
        for batch in recorded(*arguments):
            if len(read) > batches:
                read.pop()
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(prototypes.data, "sweep_batches", dying)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path)
    monkeypatch.setattr(prototypes.data, "sweep_batches", recorded)
    memories, projection, _ = _run(tmp_path)
    assert [len(ids) for ids in read] == [4, 1, 4, 2]
    jax.tree.map(np.testing.assert_array_equal, (memories, projection), (uninterrupted, head))


def test_no_pixel_passes_a_large_margin(tmp_path):
    memories, projection, told = _run(tmp_path, margin=3.0, projection="none", source_images=1)
    assert projection == {} and not np.any(memories.target) and np.any(memories.source)
    assert "0.0% of the pixels are given a pseudo-label" in " ".join(told)
    assert "no such pixel of road, car, train, sky" in told[-1]


def test_no_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="source_images"):
        _run(tmp_path, source_images=0)


def _init(folder, **changes):
    batch = {"source": {"image": np.zeros((2, 32, 48, 3), np.float32)}}
    config = ConfigDict({**CONFIG.to_dict(), **changes})
    return cfcontra.init(jax.random.key(0), model=MODEL, batch=batch, config=config, artifacts={"prototypes": folder})


def test_training_starts_from_the_file(once, tmp_path):
    folder, memories, projection, _ = once
    params, extra, _ = _init(folder)
    jax.tree.map(np.testing.assert_array_equal, (params["projection"], extra), (projection, memories))
    params, empty, _ = _init(tmp_path, projection="linear")
    assert jax.tree.map(np.shape, params) == {"projection": {"linear0": {"kernel": (1, 1, 64, 64), "bias": (64,)}}}
    assert jax.tree.map(np.shape, empty) == jax.tree.map(np.shape, memories) and not np.any(empty)
    assert _init(tmp_path, projection="none")[0] == {}
    with pytest.raises(UserError, match=r"projection = 'cubic' is unknown.*mlp, linear, none"):
        _init(tmp_path, projection="cubic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": MODEL.clone(width=16)}, "prototypes of another network: resnet18 torchvision, width 8, .* width 16"),
        ({"channels": 128}, "64 channels, against .* 128 channels"),
        ({"classes": ("road", "car", "sky", "train")}, "another label space.*road, car, sky, train"),
        ({"kind": "linear"}, "projection='mlp', but this stage has projection='linear': set the same"),
    ],
)
def test_prototypes_of_something_else_are_refused(once, change, message):
    fitting = {"kind": "mlp", "model": MODEL, "channels": 64, "classes": CLASSES}
    with pytest.raises(UserError, match=message):
        read_prototypes(once[0], **(fitting | change))


def test_missing_and_damaged_files_are_explained(tmp_path):
    with pytest.raises(UserError, match="there are no prototypes in"):
        read_prototypes(tmp_path, "mlp", MODEL, 64)
    (tmp_path / FILE).write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(UserError, match=r"is corrupt .*: delete it"):
        read_prototypes(tmp_path, "mlp", MODEL, 64)
