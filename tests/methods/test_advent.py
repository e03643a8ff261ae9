"""Each player of AdvEnt gets its own gradient and nothing of the other's."""

import jax
import numpy as np
import pytest

from jaxuda.methods.advent import adversarial_terms
from jaxuda.models.discriminator import FCDiscriminator

DISCRIMINATOR = FCDiscriminator(4)


@pytest.fixture(scope="module")
def inputs() -> tuple:
    keys = jax.random.split(jax.random.key(0), 3)
    source, target = (jax.random.uniform(key, (2, 32, 64, 3)) for key in keys[:2])
    return DISCRIMINATOR.init(keys[2], source)["params"], source, target


def gradients(inputs: tuple, term: str) -> tuple:
    """Of one term, with respect to the discriminator's parameters and both maps."""
    return jax.grad(lambda *args: adversarial_terms(DISCRIMINATOR, *args, None)[term], argnums=(0, 1, 2))(*inputs)


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
    before = adversarial_terms(DISCRIMINATOR, player, source, target, None)
    after = adversarial_terms(DISCRIMINATOR, player, source, target - 1e-2 * push / np.abs(push).max(), None)
    assert after["adv"] < before["adv"] and after["d_target"] > before["d_target"]
