"""The contract of every method. A method is tested if it exists and some config has a stage with it."""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import random_variables
from ml_collections import ConfigDict

from jaxuda import methods
from jaxuda.models import make_model
from jaxuda.optimizers import make_optimizer
from jaxuda.pipeline.stages import SHARED
from jaxuda.training.checkpoints import Checkpoints
from jaxuda.training.start import method_start, new_state
from jaxuda.training.state import TrainState
from jaxuda.training.step import make_step, to_float

CLASSES = 5
BATCH = 8
TOY = "plugins.noisy_teacher"  # a method with a teacher, noise, a bank, constants and two phases
METHODS = [*methods.names(), TOY]
# DAFormer's step with all terms of its recipes, and labels of some of which the teacher is confident.
ALL_TERMS = {"lambda_mask": 1.0, "mask_block": 8, "threshold": 0.7}
ALL_TERMS |= {"lambda_features": 0.1, "feature_classes": (1, 3), "weights": ("imagenet",)}
# SePiCo's contrast from the first step on, with a bank that soon overflows.
CONTRAST = {"contrast_start": 0, "contrast": "bank", "bank": 2, "channels": 8, "reg_weight": 0.1, "threshold": 0.3}
# Stages that no config has: a method, and its fields.
STAND_INS = {
    "control": ("minent", {}),
    "daformer": ("daformer", ALL_TERMS),
    "sepico": ("sepico", CONTRAST),
    TOY: ("minent", {"noise": 0.1, "alpha": 0.9, "target_starts": 0}),
}


def stage_config(method: str, **changes) -> ConfigDict:
    """The first stage that trains with `method` in any config, on a network of a few thousand weights."""
    like, fields = STAND_INS.get(method, (method, {}))
    for file in sorted((Path(__file__).parents[2] / "configs").glob("*.py")):
        if file.stem in ("__init__", "common"):
            continue
        config = importlib.import_module(f"configs.{file.stem}").get_config("streets")
        for name in config.pipeline:
            if config[name].get("train") == like:
                resolved = ConfigDict({field: config[field] for field in SHARED}, convert_dict=True)
                resolved.update({**config[name].to_dict(), **fields, "train": method})
                resolved.schedule_steps = 10
                resolved.model.update({"width": 8, "blocks": (1, 1, 1, 1)} | changes)
                if "discriminator_width" in resolved:
                    resolved.discriminator_width = 8
                return resolved
    raise AssertionError(f"no config has a stage with train='{method}'")


def make_batch(seed: int = 0, ignored: bool = False) -> dict:
    rng = np.random.default_rng(seed)
    shape = (BATCH, 32, 48)
    labels = rng.integers(0, CLASSES, (BATCH, 4, 6)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    labels[:, :3] = 255
    image = lambda: rng.integers(0, 256, (*shape, 3), np.uint8)  # noqa: E731
    source = {
        "image": image(),
        "label": np.full_like(labels, 255) if ignored else labels,
        "depth": rng.random(shape, np.float32),
    }
    return {"source": source, "target": {"image": image()}}


def begin(config: ConfigDict) -> tuple:
    """(state before the first step, the method's constants, its step) of a stage, on the host.

    Networks in float64 keep their parameters in float64 too."""
    model, method = make_model(config.model, CLASSES), methods.load(config.train)
    tx, batch = make_optimizer(config, model), to_float(make_batch(), "imagenet")
    stored = jnp.promote_types(config.model.dtype, jnp.float32)
    store = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, stored))
    variables = store(random_variables(model, jnp.zeros((1, 32, 48, 3))))

    @jax.jit
    def start(key: jax.Array, variables: dict) -> methods.Start:
        return method_start(method, key, model, batch, config, {}, None, variables)  # ImageNet weights are zeros

    given = start(jax.random.key(1), variables)
    state = new_state(variables, given._replace(params=store(given.params)), tx)
    return *jax.device_get((state, given.constants)), make_step(method, model, tx, config)


@functools.cache
def setup(method: str, dtype: str = "float32", norm: str = "batch", accumulate: int = 1) -> tuple:
    """(initial state, step(state, batch), the method's constants, the whole step) of a method."""
    config = stage_config(method, dtype=dtype, norm=norm)
    config.accumulate = accumulate
    state, constants, step = begin(config)

    def bound(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        return step(state, constants, config.seed, batch)

    return state, bound, constants, step


@functools.cache
def compiled(method: str, dtype: str = "float32") -> tuple:
    """(initial state, compiled step(state, batch)); the step only takes what has the types of that state."""
    start, step, *_ = setup(method, dtype)
    return start, jax.jit(step).lower(start, make_batch()).compile()


def assert_close(ours: TrainState, theirs: TrainState, rtol: float) -> None:
    paths = jax.tree_util.tree_leaves_with_path(theirs)
    for (path, expected), actual in zip(paths, jax.tree.leaves(ours), strict=True):
        # Relative to the tensor: single entries near zero have the rounding error of the whole tensor.
        scale = max(np.abs(expected).max(), 1e-12)
        error = np.abs(np.asarray(actual, np.float64) - expected).max() / scale
        assert error <= rtol, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_finite_moving_repeatable_and_traced_once(method: str) -> None:
    start, step = compiled(method)  # one program for all steps: it refuses a state of other types or shapes
    state = start
    for index in range(3):
        state, metrics = step(state, make_batch(index))
        assert all(np.isfinite(value) for value in metrics.values()), metrics
        assert "loss" in metrics
    again = start
    for index in range(3):
        again, _ = step(again, make_batch(index))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(state))  # bit by bit
    assert state.step == 3
    for player, tree in start.params.items():
        for part, leaves in tree.items():
            moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), leaves, state.params[player][part])
            assert all(jax.tree.leaves(moved)), f"{player}.{part} has parameters that did not move"


@pytest.mark.parametrize("method", METHODS)
def test_all_labels_ignored(method: str) -> None:
    start, step = compiled(method)
    state, metrics = step(start, make_batch(ignored=True))
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_computes_and_float32_keeps(method: str) -> None:
    """A step in bfloat16 is a rounded step in float32, and no part of the state is kept in bfloat16."""
    (start, low), (_, full) = compiled(method, "bfloat16"), compiled(method)
    assert "bf16" in low.as_text()
    (state, metrics), (_, expected) = (step(start, make_batch()) for step in (low, full))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: np.asarray(x).dtype, start)
    assert not any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves((state, metrics)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=0.02)


def test_seeds_draw_differently() -> None:
    start, _, constants, step = setup(TOY)
    seeded = jax.jit(step)
    first, again, other = (seeded(start, constants, seed, make_batch())[1]["ce"] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("method", METHODS)
def test_step_after_restore_is_the_same_step(method: str, tmp_path: Path) -> None:
    start, step = compiled(method)
    before = jax.device_get(step(start, make_batch(0))[0])
    saved = Checkpoints(tmp_path)
    saved.save(1, before)
    restored = saved.restore(saved.newest(), start)
    saved.close()
    after, again = (step(state, make_batch(1))[0] for state in (before, restored))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), jax.device_get(again))
