"""The max-min game of CrCDA: which parameters ascend, which descend, and by how much."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_weights import random_variables
from ml_collections import ConfigDict
from updates import begin, update

from configs import crcda as config_file
from jaxuda.artifacts.relations import Relations, class_relations, describe, write_relations
from jaxuda.errors import UserError
from jaxuda.losses.entropy import entropy_loss, entropy_map
from jaxuda.methods import Carry, Keys, crcda
from jaxuda.methods.supervised import forward, upsample
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.training.state import TrainState

CLASSES, SIZE, STEPS = 4, 2, 10
WEIGHTS = {"pixels": 0.3, "aux": 0.2, "regions": 0.5}
MODEL = DeepLabV2(CLASSES, "resnet18", "torchvision", width=8, blocks=(1, 1, 1, 1), aux=True, dtype="float64")


def stage_config(**changes) -> ConfigDict:
    stage = config_file.get_config("streets").adapt
    stage.update({"schedule_steps": STEPS, "label_space": "", "region_sizes": (SIZE,), **changes})
    return stage


def weighted(factor: float, **changes) -> ConfigDict:
    weights = {"lambda_pixels": WEIGHTS["pixels"], "lambda_pixels_aux": WEIGHTS["aux"]}
    weights["lambda_regions"] = WEIGHTS["regions"]
    return stage_config(**{name: factor * value for name, value in weights.items()}, **changes)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def batch() -> dict:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 4, 6)).repeat(8, 1).repeat(8, 2).astype(np.int32)
    labels[:, :, :16] = 1
    images = rng.normal(size=(2, 2, 32, 48, 3))
    return {"source": {"image": images[0], "label": labels}, "target": {"image": images[1]}}


@functools.cache
def start() -> TrainState:
    """The state at step 0, with classifiers far enough from zero to make clear predictions."""
    variables = random_variables(MODEL, jnp.zeros((1, 32, 48, 3)))
    players, extra, _ = begin(crcda, MODEL, stage_config(), batch())
    params = {"model": variables["params"], "regions": jax.tree.map(lambda x: 10 * np.asarray(x), players["regions"])}
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)  # noqa: E731
    return TrainState.create(wide(params), optax.sgd(1.0), wide(variables["batch_stats"]), extra)


@functools.cache
def compiled(factor: float, adaptive: bool = True):
    config = weighted(factor, adaptive=adaptive)
    return jax.jit(update(crcda, MODEL, optax.sgd(1.0), config))


def step(factor: float, state: TrainState, adaptive: bool = True) -> tuple[dict, dict]:
    """The gradients, as one step of plain descent shows them, and the metrics."""
    after, metrics = compiled(factor, adaptive)(state, batch())
    return jax.tree.map(lambda a, b: np.asarray(a - b), state.params, after.params), metrics


@functools.cache
def base_margins() -> dict[str, float]:
    return {name: jnp.mean(entropy_map(probs)) for name, probs in predictions(start().params).items()}


@jax.jit
def predictions(params: dict) -> dict[str, jax.Array]:
    """Probabilities of all classifiers on the target, as the first step sees them."""
    target = batch()["target"]["image"]
    carry = Carry(start().batch_stats, (), {}, {})
    keys = Keys(jax.random.key(0), jnp.arange(len(target)))
    outputs, _ = forward(MODEL, params["model"], carry, target, keys=keys, use="target", axis_name=None)
    name = crcda.name_of(SIZE)
    relations = class_relations(CLASSES)
    regions = crcda.region_logits(MODEL, params["regions"][name], outputs.features, relations, SIZE)
    levels = {level: upsample(getattr(outputs, level), target, stage_config()) for level in ("main", "aux")}
    return jax.tree.map(jax.nn.softmax, {"pixels": levels["main"], "aux": levels["aux"], "regions": regions})


@jax.jit
def entropies(params: dict) -> jax.Array:
    """Weighted sum of the adaptive entropies at step 0, with constant margins."""
    total = 0.0
    for name, probs in predictions(params).items():
        excess = jnp.maximum(entropy_map(probs) - base_margins()[name], 0)
        total += WEIGHTS[name] * jnp.mean(jnp.sum(excess, -1))
    return total


def split(tree: dict) -> tuple[list, list]:
    """Leaves of the extractor, leaves of all classifiers."""
    model = tree["model"]
    heads = {part: leaves for part, leaves in model.items() if part != "backbone"}
    assert set(heads) == {"head", "aux_head"}
    return jax.tree.leaves(model["backbone"]), jax.tree.leaves([heads, tree["regions"]])


@pytest.mark.slow
def test_classifiers_climb_what_the_extractor_descends() -> None:
    """With the entropy terms, gradients change by +gradient for the extractor, by -gradient for every classifier."""
    state = start()
    base_margins()
    with_game, _ = step(1.0, state)
    supervised, _ = step(0.0, state)
    entropy = jax.grad(entropies)(state.params)
    for sign, ours, theirs, expected in zip((1, -1), split(with_game), split(supervised), split(entropy), strict=True):
        assert all(np.abs(leaf).max() > 0 for leaf in expected)
        for a, b, c in zip(ours, theirs, expected, strict=True):
            np.testing.assert_allclose(a - b, sign * c, rtol=1e-7, atol=1e-9 * np.abs(b).max() + 1e-12)


def test_finite_differences_of_the_whole_loss() -> None:
    """The extractor descends `loss`; the classifiers descend `loss` - 2 * the weighted entropies."""
    state = start()
    base_margins()
    grads, metrics = step(1.0, state)
    names = {"pixels": "entropy", "aux": "entropy_aux", "regions": f"entropy_{crcda.name_of(SIZE)}"}
    found = sum(WEIGHTS[name] * metrics[metric] for name, metric in names.items())
    np.testing.assert_allclose(found, entropies(state.params), rtol=1e-12)

    rng = np.random.default_rng(0)
    for player, sign in (("extractor", 1), ("classifiers", -1)):

        def masked(path, leaf, player=player):
            ours = (path[0].key, path[1].key) == ("model", "backbone")
            return 0.01 * rng.normal(size=leaf.shape) * (ours == (player == "extractor"))

        direction = jax.tree_util.tree_map_with_path(masked, state.params)

        def value(distance: float, sign=sign, direction=direction) -> float:
            params = optax.apply_updates(state.params, optax.tree.scale(distance, direction))
            # Without the game the loss is the supervised part; the margins stay where they are.
            return step(0.0, state.replace(params=params))[1]["loss"] + sign * entropies(params)

        slope = (value(1e-4) - value(-1e-4)) / 2e-4
        expected = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
        assert abs(expected) > 1e-6
        np.testing.assert_allclose(slope, expected, rtol=1e-4)


@pytest.mark.parametrize(("at", "opening"), [(0, 1.0), (5, 0.5**0.9), (STEPS, 0.0)])
def test_margin_closes(at: int, opening: float) -> None:
    """At step 0 only entries above the mean entropy count, at the last step all do."""
    _, metrics = step(1.0, start().replace(step=jnp.asarray(at, jnp.int32)))
    for name, metric in (("pixels", "entropy"), ("regions", f"entropy_{crcda.name_of(SIZE)}")):
        probs = predictions(start().params)[name]
        excess = jnp.maximum(entropy_map(probs) - opening * base_margins()[name], 0)
        np.testing.assert_allclose(metrics[metric], jnp.mean(jnp.sum(excess, -1)), rtol=1e-6)
        if at == STEPS:
            np.testing.assert_allclose(metrics[metric], entropy_loss(probs), rtol=1e-9)
        else:
            assert 0 < metrics[metric] < 0.9 * entropy_loss(probs)


def test_without_adaptation_there_is_no_margin() -> None:
    _, metrics = step(1.0, start(), adaptive=False)
    np.testing.assert_allclose(metrics["entropy"], entropy_loss(predictions(start().params)["pixels"]), rtol=1e-9)


def test_pixels_alone() -> None:
    """No region size: no region classifier, in the parameters or in the loss."""
    config = stage_config(region_sizes=())
    assert begin(crcda, MODEL, config, batch()) == ({}, {}, ())
    state = start().replace(params={"model": start().params["model"]}, extra={})
    _, metrics = jax.eval_shape(update(crcda, MODEL, optax.sgd(1.0), config), state, batch())
    assert set(metrics) == {"loss", "ce", "ce_aux", "entropy", "entropy_aux"}


def relations_of_blocks() -> Relations:
    region = np.ones((2, 8, 8), np.uint8)
    region[1, :, :4] = 0
    return Relations(describe(region, CLASSES), np.full(2, 0.15, np.float32))


def test_init_reads_what_the_sweep_left(tmp_path: Path) -> None:
    write_relations(tmp_path, {1: class_relations(CLASSES), 2: relations_of_blocks()}, ("a", "b", "c", "d"))
    config = stage_config(region_sizes=(1, 2))
    found = {"context_relations": tmp_path}
    params, extra, _ = begin(crcda, MODEL, config, batch(), found)
    assert {name: head["kernel0"].shape[-1] for name, head in params["regions"].items()} == {
        "regions1": 4,
        "regions2": 2,
    }
    np.testing.assert_array_equal(extra["regions2"].prototypes, relations_of_blocks().prototypes)


def test_relations_of_another_label_space(tmp_path: Path) -> None:
    write_relations(tmp_path, {2: class_relations(3)}, ("a", "b", "c"))
    with pytest.raises(UserError, match=r"another label space: 3 classes \(a, b, c\), against 4 here"):
        begin(crcda, MODEL, stage_config(), batch(), {"found": tmp_path})


def test_images_smaller_than_a_region() -> None:
    with pytest.raises(UserError, match="6x4 feature cells are smaller than a region of 5x5"):
        begin(crcda, MODEL, stage_config(region_sizes=(5,)), batch())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_region_scores_are_means_over_the_regions_of_the_labels(size: int) -> None:
    """A score that is 1 only in the cells of one region is 1 there and 0 elsewhere; incomplete regions are dropped."""
    relations = class_relations(CLASSES)
    model = DeepLabV2(CLASSES, head_bias=False, dtype="float64")
    features = np.zeros((1, 7, 8, 1))
    features[:, size : 2 * size, :size] = 1
    params = {f"kernel{i}": np.zeros((3, 3, 1, CLASSES)) for i in range(4)}
    params["kernel0"][1, 1, 0, 2] = 1
    logits = crcda.region_logits(model, params, features, relations, size)
    assert logits.shape == (1, 7 // size, 8 // size, CLASSES)
    assert logits[0, 1, 0, 2] == 1 and np.sum(logits) == 1
