"""PLCA's step, beyond the contract that every method keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import random_variables
from ml_collections import ConfigDict
from updates import begin, update

from configs import lfass
from configs import plca as config_file
from jaxuda.errors import UserError
from jaxuda.losses.association import aggregate
from jaxuda.methods import plca
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.optimizers import make_optimizer
from jaxuda.training.state import TrainState

MODEL = DeepLabV2(4, "resnet18", "torchvision", width=8, blocks=(1, 1, 1, 1))


def stage(**changes) -> ConfigDict:
    config = config_file.get_config("streets")
    fields = {"optim": config.optim.to_dict(), "schedule_steps": 10, "label_space": "", **changes}
    config.adapt.update(fields)
    return config.adapt


def batch(images: int = 2, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (images, 4, 6)).repeat(8, 1).repeat(8, 2).astype(np.int32)
    source = rng.normal(size=(images, 32, 48, 3)).astype(np.float32)
    return {
        "source": {"image": source, "label": labels},
        "target": {"image": 2 * rng.normal(size=(images, 24, 56, 3)).astype(np.float32) + 1},
    }


def start(config: ConfigDict, model: DeepLabV2 = MODEL) -> TrainState:
    variables = random_variables(model, jnp.zeros((1, 32, 48, 3)))
    config.model = {"norm": model.norm}
    extra = begin(plca, model, config, batch(), variables=variables).extra
    tx = make_optimizer(config, model)
    return TrainState.create({"model": variables["params"]}, tx, variables["batch_stats"], extra)


def step(config: ConfigDict, data: dict, model: DeepLabV2 = MODEL) -> tuple[TrainState, TrainState, dict]:
    before = start(config, model)
    after, metrics = jax.jit(update(plca, model, make_optimizer(config, model), config))(before, data)
    return before, after, metrics


@pytest.mark.slow
def test_terms_and_maps_of_different_sizes() -> None:
    """Target images and source images of different sizes, and the weights of a config."""
    config = stage()
    _, _, metrics = step(config, batch())
    expected = metrics["ce"] + config.lambda_lovasz * metrics["lovasz"] + config.lambda_smooth * metrics["smooth"]
    expected += config.lambda_features * metrics["features"] + config.lambda_probs * metrics["probs"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    assert metrics["features"] > 0 and metrics["probs"] > 0
    # Class 3 is in no source image.
    assert metrics["out_of_class/3"] in (0, 0.5, 1) and 0 <= metrics["out_of_class"] <= 1


@pytest.mark.slow
def test_lfass_has_features_alone() -> None:
    config = lfass.get_config("streets").adapt
    assert config.train == "plca" and config.align_corners
    config.update({"optim": stage().optim.to_dict(), "schedule_steps": 10, "label_space": ""})
    _, _, metrics = step(config, batch())
    assert "features" in metrics and "probs" not in metrics and "smooth" not in metrics


@pytest.mark.slow
def test_parts_are_accumulated() -> None:
    """Two equal parts give the gradient of one; statistics are updated twice, in the order target, source."""
    one = batch()
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), one)  # image n in part n % 2
    _, after_one, metrics_one = step(stage(), one)
    before, after_two, metrics_two = step(stage(accumulate=2), twice)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), metrics_one, metrics_two)
    for a, b, c in zip(*(jax.tree.leaves(s.params) for s in (before, after_one, after_two)), strict=True):
        np.testing.assert_allclose(c - a, b - a, atol=1e-3 * np.abs(b - a).max() + 1e-7)
    assert after_two.step == 1
    stem = lambda state: np.asarray(state.batch_stats["backbone"]["bn1"]["mean"])  # noqa: E731
    # Both parts see the same images, so one move by 0.1 towards the target's and the source's mean follows another.
    first, second = stem(after_one) - 0.81 * stem(before), stem(after_two) - 0.81 * stem(after_one)
    np.testing.assert_allclose(second, first, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_statistics_of_the_domains_are_kept_apart() -> None:
    together, apart = (step(stage(separate_norm=flag), batch()) for flag in (False, True))
    # Training uses the batch statistics, so the gradients are the same.
    jax.tree.map(np.testing.assert_array_equal, together[1].params, apart[1].params)
    (before, after, _), moved = apart, lambda old, new: jax.tree.map(lambda a, b: b - 0.9 * a, old, new)
    target, source = moved(before.batch_stats, after.batch_stats), moved(before.extra, after.extra).batch_stats
    chained = jax.tree.map(lambda t, s, b: 0.9 * (0.9 * b + t) + s, target, source, before.batch_stats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), chained, together[1].batch_stats)
    with pytest.raises(UserError, match=r"model\.norm=batch"):
        start(stage(separate_norm=True), MODEL.clone(norm="frozen"))


@pytest.mark.slow
def test_blocks_computed_twice_change_nothing() -> None:
    (_, plain, _), (_, again, _) = step(stage(), batch()), step(stage(), batch(), MODEL.clone(remat=True))
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), plain.params, again.params)


@pytest.mark.slow
def test_prediction_with_and_without_aggregation() -> None:
    variables = random_variables(MODEL, jnp.zeros((1, 32, 48, 3)))
    images = batch()["source"]["image"]
    outputs = MODEL.apply(variables, images)
    plain = plca.predict(variables, images, model=MODEL, config=stage(test_aggregation=0.0))
    np.testing.assert_allclose(plain, jax.nn.softmax(outputs.main), atol=1e-6)
    found = plca.predict(variables, images, model=MODEL, config=stage(test_aggregation=0.5))
    np.testing.assert_allclose(jnp.sum(found, axis=-1), np.ones(found.shape[:3]), rtol=1e-5)
    # The head is linear, so it can also be applied before the aggregation of its inputs at each position.
    assert found.shape == plain.shape and np.abs(found - plain).max() > 1e-4
    spread = [float(jnp.mean(jnp.std(x, axis=(1, 2)))) for x in (found, plain)]
    assert spread[0] < spread[1]  # it draws positions together
    np.testing.assert_allclose(aggregate(plain, "kl", 0.0), plain)
