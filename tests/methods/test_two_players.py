"""The two players of adversarial methods: each gets its own gradient and nothing of the other's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import make_batch, setup, stage_config

from jaxuda import methods
from jaxuda.optim import make_optimizer
from jaxuda.train import _to_float, make_model
from jaxuda.train_state import TrainState

ADVERSARIAL = ["advent"]


def gradients(method: str, **weights: float) -> dict:
    """Gradients of both players: with plain descent of rate 1 a step moves the parameters by minus them."""
    config = stage_config(method)
    config.update(weights)
    start, _ = setup(method)
    tx = optax.sgd(1.0)
    state = TrainState.create(start.params, tx, start.batch_stats)
    model = make_model(config, 5)
    step = methods.load(method).train_step
    batch = _to_float(make_batch(), config.preprocess)
    after, _ = jax.jit(lambda s, b: step(s, b, jax.random.key(0), model=model, tx=tx, config=config))(state, batch)
    return jax.device_get(jax.tree.map(lambda a, b: a - b, start.params, after.params))


@pytest.mark.parametrize("method", ADVERSARIAL)
def test_discriminator_terms_do_not_reach_the_segmenter(method: str) -> None:
    """Without the adversarial term the segmenter's gradient does not depend on the discriminator at all."""
    off = {"lambda_adversarial": 0.0}
    before = gradients(method, **off)["model"]
    start, _ = setup(method)
    scaled = jax.tree.map(lambda x: 3 * x + 0.1, start.params["discriminator"])
    original = start.params["discriminator"]
    start.params["discriminator"] = scaled
    try:
        after = gradients(method, **off)["model"]
    finally:
        start.params["discriminator"] = original
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("method", ADVERSARIAL)
def test_adversarial_term_reaches_the_segmenter_alone(method: str) -> None:
    weak, strong = (gradients(method, lambda_adversarial=weight) for weight in (0.0, 10.0))
    jax.tree.map(np.testing.assert_array_equal, weak["discriminator"], strong["discriminator"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), weak["model"]["head"], strong["model"]["head"])
    assert any(jax.tree.leaves(moved))


def test_discriminators_learn_by_adam() -> None:
    """The first step of Adam moves each weight by the learning rate, whatever the gradient's size."""
    config = stage_config("advent")
    tx = make_optimizer(config)
    start, _ = setup("advent")
    grads = jax.tree.map(lambda x: jnp.full_like(x, 7.0), start.params)
    moved = TrainState.create(start.params, tx, {}).apply_gradients(grads, tx, axis_name=None)
    for before, after in zip(*(jax.tree.leaves(s.params["discriminator"]) for s in (start, moved)), strict=True):
        np.testing.assert_allclose(before - after, config.discriminator_lr, rtol=1e-2)
