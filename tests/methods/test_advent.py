"""Each network of AdvEnt gets its own gradient and nothing of the other's."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxuda.losses.adversarial import SOURCE
from jaxuda.methods.advent import discriminate, make_discriminator, target_terms
from jaxuda.models.deeplab import DeepLabV2

MODEL = DeepLabV2(3, "resnet18", "torchvision", width=4)
CONFIG = ConfigDict({"discriminator_width": 4})


def adversarial_terms(player, source, target) -> dict:
    """The terms of both passes."""
    adv, d_target = target_terms(MODEL, CONFIG, player, target, None)
    d_source = discriminate(MODEL, CONFIG, player, jax.lax.stop_gradient(source), SOURCE, None)
    return {"adv": adv, "d_source": d_source, "d_target": d_target}


@pytest.fixture(scope="module")
def inputs() -> tuple:
    keys = jax.random.split(jax.random.key(0), 3)
    source, target = (jax.random.uniform(key, (2, 32, 64, 3)) for key in keys[:2])
    return make_discriminator(MODEL, CONFIG).init(keys[2], source)["params"], source, target


def gradients(inputs: tuple, term: str) -> tuple:
    """The gradients of one term with respect to the discriminator's parameters and both maps."""
    return jax.grad(lambda *args: adversarial_terms(*args)[term], argnums=(0, 1, 2))(*inputs)


def moves(tree) -> bool:
    return any(np.any(leaf) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("term", "expected"),
    [("adv", (False, False, True)), ("d_source", (True, False, False)), ("d_target", (True, False, False))],
)
def test_who_moves(inputs: tuple, term: str, expected: tuple[bool, ...]) -> None:
    """(discriminator, source predictions, target predictions)"""
    assert tuple(moves(gradient) for gradient in gradients(inputs, term)) == expected


def test_players_pull_apart(inputs: tuple) -> None:
    """A step along the segmenter's gradient raises what the discriminator lowers on the target."""
    player, source, target = inputs
    push = gradients(inputs, "adv")[2]
    before = adversarial_terms(player, source, target)
    after = adversarial_terms(player, source, target - 1e-2 * push / np.abs(push).max())
    assert after["adv"] < before["adv"] and after["d_target"] > before["d_target"]
