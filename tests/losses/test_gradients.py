"""The gradient of every loss equals central differences of its value, in float64.

What is constant in a loss (a margin, a threshold, the contrast of similarities) is constant in the differences too:
by an entry that does not change, or by a copy of the loss with the constant.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

import dense_association
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_softmax, softmax

from jaxuda import losses
from jaxuda.losses.adversarial import class_domain_ce, domain_bce
from jaxuda.losses.association import aggregate, cycle_association, smoothness
from jaxuda.losses.contrastive import (
    ClassStatistics,
    bank_contrast,
    distribution_contrast,
    prototype_contrast,
    uniformity,
)
from jaxuda.losses.depth import berhu
from jaxuda.losses.entropy import adaptive_entropy, entropy_loss, entropy_map
from jaxuda.losses.feature_distance import feature_distance
from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import cross_entropy, lovasz_softmax, weighted_cross_entropy
from jaxuda.models.layers import gradient_reversal

SHAPE = (2, 3, 4, 5)
RNG = np.random.default_rng(0)
LABELS = RNG.choice([0, 1, 2, 3, 255], SHAPE[:3])
ROWS = RNG.normal(size=(5, SHAPE[-1]))
UNIT = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
STATS = ClassStatistics(ROWS, RNG.random((5, SHAPE[-1])), np.ones(5))
OTHER = RNG.normal(size=SHAPE)
BANK = np.stack([ROWS, ROWS[::-1]], axis=1)  # two rows per class
SOFT = RNG.random((*SHAPE[:3], SHAPE[-1] // 2 + 1))
START = RNG.normal(size=SHAPE)
FAR = np.zeros(SHAPE[:3])
FAR[0, 0, 0] = 1e3  # the largest error, which sets the threshold of berhu, belongs to an entry that does not change


def _constant_margin(x: jax.Array) -> jax.Array:
    margin = 0.7 * jnp.mean(entropy_map(softmax(START)))
    return jnp.mean(jnp.sum(jax.nn.relu(entropy_map(softmax(x)) - margin), -1))


def _constant_level(x: jax.Array) -> jax.Array:
    level = lambda z: -jnp.mean(log_softmax(z), -1)  # noqa: E731
    return jnp.mean((level(START) / 10 - 1) * level(x))


def _constant_contrast(dense: Callable) -> Callable:
    """A function of `dense_association` in which the means and deviations of similarities stay those at START."""
    kept: list[tuple] = []

    def keep(s: jax.Array) -> jax.Array:
        kept.append((np.mean(s, 1, keepdims=True), np.std(s, 1, keepdims=True, ddof=1)))
        return normalise(s)

    normalise = dense_association.normalise

    def with_statistics(x: jax.Array) -> jax.Array:
        with pytest.MonkeyPatch.context() as patch:
            if not kept:
                patch.setattr(dense_association, "normalise", keep)
                dense(jnp.asarray(START))
            again = iter(kept)

            def replay(s: jax.Array) -> jax.Array:
                mean, deviation = next(again)
                return (s - mean) / deviation

            patch.setattr(dense_association, "normalise", replay)
            return dense(x)

    return with_statistics


def _dense_aggregate(x: jax.Array) -> jax.Array:
    mixed = [dense_association.aggregate(image.reshape(-1, SHAPE[-1]), "cosine", 0.5) for image in x]
    return jnp.sum(OTHER * jnp.stack(mixed).reshape(SHAPE))


# Name -> loss of an array of SHAPE, and another function whose differences its gradient must equal (None: the loss).
CASES = {
    "cross_entropy": (lambda x: cross_entropy(x, LABELS), None),
    "weighted_cross_entropy": (lambda x: weighted_cross_entropy(x, LABELS, SOFT[..., 0]), None),
    "lovasz_softmax": (lambda x: lovasz_softmax(softmax(x), LABELS), None),
    "entropy_loss": (lambda x: entropy_loss(softmax(x)), None),
    "entropy_map": (lambda x: jnp.sum(OTHER * entropy_map(softmax(x))), None),
    "adaptive_entropy": (lambda x: adaptive_entropy(softmax(x), 0.7), _constant_margin),
    "domain_bce": (lambda x: domain_bce(x, 0) + 2 * domain_bce(x, 1), None),
    "class_domain_ce": (lambda x: class_domain_ce(jnp.concatenate([x, x[..., :1]], -1), SOFT, 1), None),
    "berhu": (lambda x: berhu(x[..., 0] * (FAR == 0), FAR), None),
    "feature_distance": (lambda x: feature_distance(x, OTHER, LABELS == 1), None),
    "distribution_contrast": (lambda x: distribution_contrast(x, LABELS, STATS, 0.3), None),
    "prototype_contrast": (lambda x: prototype_contrast(x, LABELS, UNIT, 0.3), None),
    "cycle_association": (
        lambda x: cycle_association(x, jnp.asarray(OTHER), LABELS, block=5),
        _constant_contrast(lambda x: dense_association.loss(x, jnp.asarray(OTHER), jnp.asarray(LABELS))),
    ),
    "cycle_association of the target": (
        lambda x: cycle_association(jnp.asarray(OTHER), x, LABELS, block=3),
        _constant_contrast(lambda x: dense_association.loss(jnp.asarray(OTHER), x, jnp.asarray(LABELS))),
    ),
    "cycle_association, kl": (
        lambda x: cycle_association(softmax(x), softmax(jnp.asarray(OTHER)), LABELS, "kl", block=5),
        _constant_contrast(
            lambda x: dense_association.loss(softmax(x), softmax(jnp.asarray(OTHER)), jnp.asarray(LABELS), "kl")
        ),
    ),
    "aggregate": (lambda x: jnp.sum(OTHER * aggregate(x, block=5)), _constant_contrast(_dense_aggregate)),
    "aggregate, kl": (lambda x: jnp.sum(OTHER * aggregate(softmax(x), "kl", block=5)), None),
    "smoothness": (lambda x: smoothness(x), _constant_level),
    "smoothness without threshold": (lambda x: smoothness(x, 0.0), None),
    "bank_contrast": (lambda x: bank_contrast(x, LABELS, BANK, np.array([2, 1, 2, 1, 2]), 0.5), None),
    "uniformity": (lambda x: uniformity(x, LABELS, ROWS, 0.5), None),
    "masked_mean": (lambda x: masked_mean(jnp.square(x), LABELS[..., None] == 1), None),
    "gradient_reversal": (lambda x: jnp.sum(OTHER * jnp.tanh(gradient_reversal(x, 0.3))), None),
}
# The other functions in the modules of losses: they have no gradient, or are parts of those above.
NO_LOSSES = {
    *("class_centres", "cycle", "empty_bank", "empty_statistics", "global_max", "global_sum", "image_means"),
    *("nearest_prototype_labels", "positive", "shrink_labels", "update_bank", "update_memory", "update_statistics"),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_finite_differences(name: str) -> None:
    loss, held = CASES[name]
    sign = -0.3 if name == "gradient_reversal" else 1.0
    with jax.enable_x64(True):
        start, direction = jnp.asarray(START), np.random.default_rng(1).normal(size=SHAPE)
        value = held or jax.jit(loss)
        step = 1e-6
        numeric = (value(start + step * direction) - value(start - step * direction)) / (2 * step)
        exact = jnp.vdot(jax.jit(jax.grad(loss))(start), direction)
        assert exact.dtype == np.float64 and abs(exact) > 1e-6
        np.testing.assert_allclose(exact, sign * numeric, rtol=1e-6)


def test_every_loss_is_among_them() -> None:
    public = set()
    for module in pkgutil.iter_modules(losses.__path__):
        loaded = importlib.import_module(f"jaxuda.losses.{module.name}")
        functions = inspect.getmembers(loaded, inspect.isfunction)
        public |= {name for name, f in functions if f.__module__ == loaded.__name__ and not name.startswith("_")}
    assert public == NO_LOSSES | {name.split()[0].rstrip(",") for name in CASES} - {"gradient_reversal"}
