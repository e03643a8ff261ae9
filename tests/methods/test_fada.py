"""Each network of FADA gets its own gradient, and the soft labels have none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxuda.losses.adversarial import SOURCE, TARGET
from jaxuda.methods import fada
from jaxuda.models import Outputs
from jaxuda.models.deeplab import DeepLabV2

MODEL = DeepLabV2(3, "resnet18", "torchvision", width=4)
CONFIG = ConfigDict({"discriminator_width": 4, "align_corners": True, "temperature": 1.8})


@pytest.fixture(scope="module")
def inputs() -> tuple:
    """(discriminator, source features, target features, source logits, target logits)"""
    keys = jax.random.split(jax.random.key(0), 5)
    features = [jax.random.normal(key, (2, 4, 6, 8)) for key in keys[:2]]
    logits = [3 * jax.random.normal(key, (2, 4, 6, 3)) for key in keys[2:4]]
    return fada.make_discriminator(MODEL, CONFIG).init(keys[4], features[0])["params"], *features, *logits


def term(name: str, player, ours, theirs, our_logits, their_logits) -> jax.Array:
    """One of the three terms, as the passes compute it."""
    stop, (features, logits) = (
        jax.lax.stop_gradient,
        (ours, our_logits) if name == "d_source" else (theirs, their_logits),
    )
    player, seen = (stop(player), features) if name == "adv" else (player, stop(features))
    domain = TARGET if name == "d_target" else SOURCE
    outputs, images = Outputs(logits, features), jnp.zeros((2, 32, 48, 3))
    return fada.discriminate(player, seen, outputs, images, domain, MODEL, CONFIG, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adv", (False, False, True, False, False)),
        ("d_source", (True, False, False, False, False)),
        ("d_target", (True, False, False, False, False)),
    ],
)
def test_who_moves(inputs: tuple, name: str, expected: tuple[bool, ...]) -> None:
    gradients = jax.grad(functools.partial(term, name), argnums=range(5))(*inputs)
    assert tuple(any(np.any(leaf) for leaf in jax.tree.leaves(tree)) for tree in gradients) == expected


def test_soft_labels_stop_at_their_cap(inputs: tuple) -> None:
    """Beyond 0.9 a more confident prediction only changes the shares of the other classes."""
    player, ours, theirs, logits, _ = inputs
    sure, surer = (jnp.full_like(logits, -30.0).at[..., 0].set(x) for x in (10.0, 20.0))
    results = [term("d_source", player, ours, theirs, x, x) for x in (sure, surer)]
    assert results[0] == pytest.approx(float(results[1]), rel=1e-6)
    features = fada.make_discriminator(MODEL, CONFIG).apply({"params": player}, ours)
    up = fada.upsample(features, jnp.zeros((2, 32, 48, 3)), CONFIG)
    expected = -0.9 * jnp.mean(jax.nn.log_softmax(up)[..., 0])
    assert results[0] == pytest.approx(float(expected), rel=1e-5)
