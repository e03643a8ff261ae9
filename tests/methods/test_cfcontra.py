"""CFContra's step, beyond the contract that every method keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import random_variables
from ml_collections import ConfigDict
from updates import begin, update

from configs import cfcontra as config_file
from jaxuda.losses.contrastive import class_centres
from jaxuda.methods import cfcontra
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.layers import resize_labels
from jaxuda.optimizers import make_optimizer
from jaxuda.training.state import TrainState

MODEL = DeepLabV2(4, "resnet18", "torchvision", width=8, blocks=(1, 1, 1, 1))
TERMS = ("source", "target", "target_to_source", "source_to_target")


def _config(**changes) -> ConfigDict:
    config = config_file.get_config("streets")
    stage = config.adapt
    stage.update({"optim": config.optim.to_dict(), "schedule_steps": 10, "label_space": "", "margin": 0.0, **changes})
    return stage


@functools.cache
def _batch() -> dict:
    """A batch in which no image has class 3."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 4, 6)).repeat(8, 1).repeat(8, 2).astype(np.int32)
    images = rng.normal(size=(2, 2, 32, 48, 3)).astype(np.float32)
    return {"source": {"image": images[0], "label": labels}, "target": {"image": images[1]}}


def _memories(seen=(0, 1, 2)) -> cfcontra.Memories:
    rows = np.random.default_rng(1).normal(size=(2, 4, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    rows[:, [c for c in range(4) if c not in seen]] = 0
    return cfcontra.Memories(*map(jnp.asarray, rows))


def _steps(config: ConfigDict, batches: list, memories: cfcontra.Memories) -> tuple[list[TrainState], list[dict]]:
    variables = random_variables(MODEL, jnp.zeros((1, 32, 48, 3)))
    tx = make_optimizer(config, MODEL)
    players = begin(cfcontra, MODEL, config, batches[0]).params
    states = [TrainState.create({"model": variables["params"], **players}, tx, variables["batch_stats"], memories)]
    step, rows = jax.jit(update(cfcontra, MODEL, tx, config)), []
    for batch in batches:
        state, metrics = step(states[-1], batch)
        states.append(state)
        rows.append(metrics)
    return states, rows


def test_memories_fill_from_nothing() -> None:
    """Without a prototype there is neither a pseudo-label nor a contrast; one batch later there are both."""
    empty = jax.tree.map(jnp.zeros_like, _memories())
    states, (first, second) = _steps(_config(), [_batch()] * 2, empty)
    assert first["pseudo_kept"] == 0 and all(first[f"contrast_{term}"] == 0 for term in TERMS)
    assert first["drift_source"] == 0  # there was no prototype that could move
    after = states[1].extra
    # Both memories took the centres of the source as they were.
    np.testing.assert_array_equal(after.source, after.target)
    assert not np.any(after.source[3])
    np.testing.assert_allclose(np.linalg.norm(after.source[:3], axis=1), 1, rtol=1e-5)
    assert second["pseudo_kept"] == 1 and all(second[f"contrast_{term}"] > 0 for term in TERMS)
    assert second["drift_source"] > 0 and -1 <= second["cosine_source"] <= 1


def test_an_unseen_class_is_learnt_when_a_batch_shows_it() -> None:
    batch = _batch()
    shown = {**batch, "source": {**batch["source"], "label": np.full_like(batch["source"]["label"], 3)}}
    states, rows = _steps(_config(), [shown, batch], _memories())
    # All its pixels are ignored with either memory until the memory has its prototype.
    assert rows[0]["contrast_source"] == rows[0]["contrast_source_to_target"] == 0
    for memory in states[1].extra:
        np.testing.assert_allclose(np.linalg.norm(memory[3]), 1, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]))


def test_a_margin_that_no_pixel_passes_is_harmless() -> None:
    states, (row,) = _steps(_config(margin=1e3), [_batch()], _memories())
    assert row["pseudo_kept"] == row["contrast_target"] == row["contrast_target_to_source"] == 0
    assert row["contrast_source"] > 0 and row["contrast_source_to_target"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]))
    assert not np.array_equal(states[1].extra.source, states[0].extra.source)


def test_margin_decays_by_the_poly_rule() -> None:
    """With a schedule of one step the margin is 0 at the second step."""
    _, rows = _steps(_config(margin=1e3, margin_decay=True, schedule_steps=1), [_batch()] * 2, _memories())
    assert [row["pseudo_kept"] for row in rows] == [0, 1]


@pytest.mark.slow
def test_the_head_stays_if_asked_to() -> None:
    for train_head in (False, True):
        states, _ = _steps(_config(train_head=train_head), [_batch()], _memories())
        before, after = (jax.tree.leaves(state.params["projection"]) for state in states)
        assert all(np.array_equal(a, b) != train_head for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_target_labels_give_a_figure_and_nothing_else() -> None:
    batch, rng = _batch(), np.random.default_rng(3)
    label = rng.choice(np.array([0, 1, 2, 255], np.int32), (2, 32, 48))
    labelled = {**batch, "target": {**batch["target"], "label": label}}
    config = _config(projection="none", normalise_for_labels=False)
    states, (row,) = _steps(config, [labelled], _memories())
    without, (other,) = _steps(config, [batch], _memories())
    jax.tree.map(np.testing.assert_array_equal, states[1], without[1])
    accuracy = row.pop("pseudo_accuracy_using_target_labels")
    assert row.keys() == other.keys() and 0 < accuracy < 1
    pseudo = _pseudo_labels(states[0])
    truth = resize_labels(label, pseudo.shape[1:3])
    np.testing.assert_allclose(accuracy, np.mean((pseudo == truth)[truth != 255]), rtol=1e-6)
    # The same pseudo-labels moved the target's memory.
    centres, present = class_centres(_target_features(states[0]), pseudo, 4)
    assert np.all(np.sum(np.asarray(states[1].extra.target) * centres, 1)[present] > 0)


def _target_features(state: TrainState) -> jax.Array:
    variables = {"params": state.params["model"], "batch_stats": state.batch_stats}
    outputs, _ = MODEL.apply(variables, _batch()["target"]["image"], train=True, mutable=["batch_stats"])
    return outputs.features


def _pseudo_labels(state: TrainState) -> np.ndarray:
    distances = np.linalg.norm(
        np.asarray(_target_features(state))[..., None, :] - np.asarray(state.extra.source)[:3], axis=-1
    )
    return np.argmin(distances, -1)
