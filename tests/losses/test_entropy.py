import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden

from jaxuda.losses.entropy import adaptive_entropy, entropy_loss, entropy_map


def check(actual, expected):
    assert np.abs(np.asarray(actual) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", "ab")
def test_entropy_matches_golden(case):
    arrays = {k[2:]: v for k, v in golden("entropy").items() if k.startswith(case)}
    loss, gradient = jax.value_and_grad(lambda z: entropy_loss(jax.nn.softmax(z)))(arrays["logits"])
    check(loss, arrays["loss_f64"])
    check(gradient, arrays["grad_logits"])

    mapped, pullback = jax.vjp(lambda z: entropy_map(jax.nn.softmax(z)), jnp.asarray(arrays["logits"]))
    check(mapped, arrays["map"])
    check(pullback(jnp.asarray(arrays["map_cotangent"]))[0], arrays["map_grad_logits"])


def test_uniform_is_one_and_certain_is_zero():
    assert entropy_loss(jnp.full((1, 2, 2, 7), 1 / 7)) == pytest.approx(1, rel=1e-6)
    value, gradient = jax.value_and_grad(entropy_loss)(jax.nn.one_hot(jnp.zeros((1, 2, 2), int), 7))
    assert abs(value) < 1e-6
    assert np.isfinite(gradient).all()


def test_adaptive_entropy_counts_what_is_above_its_margin():
    """Two positions, three classes, by hand: the margin is `opening` times the mean of all six entries."""
    probs = jnp.array([[0.98, 0.01, 0.01], [0.5, 0.3, 0.2]])
    entries = np.asarray(-probs * np.log(probs) / np.log(3))
    for opening in (1.0, 0.4, 0.0):
        expected = np.maximum(entries - opening * entries.mean(), 0).sum() / 2
        assert adaptive_entropy(probs, opening) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(adaptive_entropy(probs, 0.0), entropy_loss(probs), rtol=1e-6)
    gradient = jax.grad(lambda p: adaptive_entropy(p, 1.0))(probs)
    # No entry of the sure position is above the margin, all entries of the other are; the margin has no gradient.
    assert not gradient[0].any()
    np.testing.assert_allclose(gradient[1], -(np.log(probs[1]) + 1) / np.log(3) / 2, rtol=1e-5)


def test_adaptive_entropy_at_its_ends_is_finite():
    for probs in (jnp.full((1, 2, 2, 7), 1 / 7), jax.nn.one_hot(jnp.zeros((1, 2, 2), int), 7)):
        for opening in (0.0, 1.0):
            value, gradient = jax.value_and_grad(lambda p, o=opening: adaptive_entropy(p, o))(probs)
            assert np.isfinite(value) and np.isfinite(gradient).all()
