"""SDCA's step, beyond the contract that every method keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import random_variables
from ml_collections import ConfigDict
from updates import begin, update

from configs import sdca as config_file
from jaxuda.methods import sdca
from jaxuda.methods.sdca import confident_labels
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.optimizers import make_optimizer
from jaxuda.training.state import TrainState

MODEL = DeepLabV2(4, "resnet18", "torchvision", width=8, blocks=(1, 1, 1, 1))


def _config(**changes) -> ConfigDict:
    config = config_file.get_config("streets")
    stage = config.adapt
    stage.update({"optim": config.optim.to_dict(), "schedule_steps": 10, "label_space": "", **changes})
    return stage


@functools.cache
def _batch() -> dict:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 4, 6)).repeat(8, 1).repeat(8, 2).astype(np.int32)
    images = rng.normal(size=(2, 2, 32, 48, 3)).astype(np.float32)
    return {"source": {"image": images[0], "label": labels}, "target": {"image": images[1]}}


def _step(config: ConfigDict) -> tuple[TrainState, TrainState, dict]:
    variables = random_variables(MODEL, jnp.zeros((1, 32, 48, 3)))
    tx = make_optimizer(config, MODEL)
    extra = begin(sdca, MODEL, config, _batch()).extra
    state = TrainState.create({"model": variables["params"]}, tx, variables["batch_stats"], extra)
    after, metrics = jax.jit(update(sdca, MODEL, tx, config))(state, _batch())
    return state, after, metrics


@pytest.mark.slow
def test_without_a_confident_target_pixel_only_the_source_counts() -> None:
    before, after, metrics = _step(_config(confidence=1.1))
    assert metrics["confident"] == metrics["features_target"] == metrics["logits_target"] == 0
    assert metrics["features_source"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert np.any(after.params["model"]["head"]["kernel0"] != before.params["model"]["head"]["kernel0"])


def test_statistics_move_with_the_source_alone_and_before_they_are_used() -> None:
    _, after, metrics = _step(_config(confidence=0.0))
    assert metrics["confident"] == 1
    labels = _batch()["source"]["label"][:, ::8, ::8]
    for stats in after.extra:
        np.testing.assert_array_equal(stats.count, np.bincount(labels.reshape(-1), minlength=4))
        assert not np.any(stats.mean[3]) and np.any(stats.mean[0])
    # With empty statistics the contrast would be exactly log C.
    assert abs(metrics["features_source"] - np.log(4)) > 1e-4


@pytest.mark.parametrize(("confidence", "expected"), [(0.0, [0, 1]), (0.7, [255, 1]), (0.9, [255, 255])])
def test_confident_labels(confidence: float, expected: list[int]) -> None:
    logits = jnp.log(jnp.array([[[[0.6, 0.4], [0.2, 0.8]]]]))
    labels = confident_labels(logits, confidence)
    assert labels.dtype == jnp.int32
    np.testing.assert_array_equal(labels[0, 0], expected)
