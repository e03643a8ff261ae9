"""SePiCo with images by day of the same places: labels, class weights, and what a step and its input do with them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden
from layouts import darkzurich
from methods.test_contract import CLASSES, begin
from methods.test_sepico import changed, wide_batch
from ml_collections import ConfigDict
from test_stages import DOMAINS

from configs import sepico as recipe
from jaxuda.data import domain_transform, load, make_input
from jaxuda.errors import UserError
from jaxuda.methods import Keys
from jaxuda.methods import sepico as method
from jaxuda.methods.selftraining import pseudo_labels, pseudo_labels_by_day
from jaxuda.models import make_model
from jaxuda.pipeline.stages import plan
from jaxuda.pipeline.tracing import check_steps
from jaxuda.prepare import prepare
from jaxuda.training.step import to_float

DARK = {"day_ratio": 0.8, "static_classes": (0, 1)}


def test_labels_by_day_are_the_published_ones() -> None:
    file = golden("sepico_dark")
    with jax.enable_x64(True):
        night, day = (jnp.log(jnp.asarray(file[f"{name}_probs"], jnp.float64)) for name in ("night", "day"))
        arguments = {"ratio": float(file["day_ratio"]), "static": recipe.STATIC, "weights": recipe.class_weights(0.05)}
        labels, share, confidence = pseudo_labels_by_day(night, day, 0.968, **arguments)
    np.testing.assert_array_equal(labels, file["labels"])
    np.testing.assert_allclose(confidence, file["mixed_f64"].max(-1), rtol=1e-6)
    np.testing.assert_allclose(confidence, file["confidence"], rtol=1e-6)
    assert share == pytest.approx(np.mean(file["confidence"] >= 0.968))


def test_without_static_classes_and_weights_only_the_night_counts() -> None:
    night, day = jax.random.normal(jax.random.key(0), (2, 1, 6, 8, 5)) * 3
    expected = pseudo_labels(night, 0.5)
    found = pseudo_labels_by_day(night, day, 0.5, ratio=0.8, static=(), weights=())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_class_weights_are_the_published_ones() -> None:
    file = golden("sepico_dark")
    np.testing.assert_array_equal(recipe.SHARES, file["class_frequency_f64"])
    np.testing.assert_allclose(recipe.class_weights(0.05), file["weights_train_f64"], rtol=1e-12)
    np.testing.assert_allclose(recipe.class_weights(0.16), file["weights_test_f64"], rtol=1e-12)
    config = recipe.get_config("darkzurich")
    assert (config.class_weights, config.test.class_weights) == (
        recipe.class_weights(0.05),
        recipe.class_weights(0.16),
    )
    assert config.target.reference and config.adapt.steps == 60_000 and config.target.resize == (1280, 720)
    assert (config.adapt.ignore_top, config.adapt.ignore_bottom, config.source.within) == (0, 0, (1280, 640))
    other = recipe.get_config("acdc")
    assert not other.class_weights and not other.test.class_weights and "reference" not in other.target


def dark_batch() -> dict:
    """With images by day."""
    batch = wide_batch()
    day = np.random.default_rng(100).integers(0, 256, batch["target"]["image"].shape, np.uint8)
    return {**batch, "target": {"image": batch["target"]["image"], "reference": day}}


@pytest.mark.slow
def test_labels_and_crops_of_a_step() -> None:
    """The day changes the labels, unless it shows the same; both images are cropped alike."""
    config = changed(contrast="dist", contrast_start=0, **DARK)
    start, constants, step = begin(config)
    model, batch = make_model(config.model, CLASSES), to_float(dark_batch(), config.preprocess)
    label = jax.jit(lambda teacher, target: method.labelled(teacher, target, model, config, None)[:2])
    teacher, target = start.extra.teacher, batch["target"]
    night = {"image": target["image"]}
    alone, same, different = (label(teacher, each) for each in (night, {**night, "reference": target["image"]}, target))
    for one, other in zip(alone, same, strict=True):
        np.testing.assert_allclose(np.mean(one != other), 0, atol=1e-3)  # rounding
    assert np.mean(alone[0] != different[0]) > 0.01

    keys = Keys(jax.random.key(0), jnp.arange(len(target["image"]), dtype=jnp.int32))
    same = {**batch, "target": {**night, "reference": target["image"]}}
    cut, _ = jax.jit(lambda batch: method.cropped(teacher, batch, model, config, keys, None))(same)
    assert cut["image"].shape == batch["source"]["image"].shape
    np.testing.assert_array_equal(cut["image"], cut["reference"])
    after, _ = jax.eval_shape(step, start, constants, 0, dark_batch())
    assert jax.tree.structure(after) == jax.tree.structure(start)


@pytest.mark.slow
def test_the_recipe_is_checked_with_images_by_day() -> None:
    """As before training, at the published sizes, on a tiny network."""
    config = recipe.get_config("darkzurich")
    config.model.update({"width": 8, "blocks": (1, 1, 1, 1)})
    (stage,) = (stage for stage in plan(config, Path("runs/x"), DOMAINS) if stage.name == "adapt")
    check_steps([stage], 19, depth=False)
    lacking = ConfigDict(config)
    del lacking.adapt["static_classes"]
    (stage,) = (stage for stage in plan(lacking, Path("runs/x"), DOMAINS) if stage.name == "adapt")
    with pytest.raises(UserError, match=r"reads config.adapt.static_classes, which the config lacks"):
        check_steps([stage], 19, depth=False)


def test_input_has_both_images_cut_and_mirrored_alike(tmp_path) -> None:
    """By day and night the layout has noise: make them the same, so that their parts must be."""
    source = darkzurich(tmp_path / "source")
    (day,) = (source / "rgb_anon/train/day").rglob("*.png")
    for night in (source / "rgb_anon/train/night").rglob("*.png"):
        night.write_bytes(day.read_bytes())
    prepare("darkzurich", manual_dir=source, data_dir=tmp_path)
    records = load("darkzurich", "train", data_dir=tmp_path).with_reference()
    labelled = load("darkzurich", "val", data_dir=tmp_path)
    transform = domain_transform({"name": "x", "reference": True, "resize": (12, 8), "crop": (6, 4), "flip": 0.5})
    arguments = {"batch": 4, "steps": 3, "source_transform": transform, "target_transform": transform}
    with make_input(labelled, records, **arguments) as batches:
        for batch in batches:
            assert batch["target"].keys() == {"image", "reference", "id"}
            assert batch["source"].keys() == {"image", "label", "id"}
            np.testing.assert_array_equal(batch["target"]["image"], batch["target"]["reference"])
    assert len(np.unique(batch["target"]["image"].reshape(4, -1), axis=0)) > 1
    with make_input(labelled, load("darkzurich", "train", data_dir=tmp_path), **arguments) as batches:
        assert next(batches)["target"].keys() == {"image", "id"}
    with pytest.raises(UserError, match="has no reference image"):
        load("darkzurich", "val", data_dir=tmp_path).with_reference()[0]
