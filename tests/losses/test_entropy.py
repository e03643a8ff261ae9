import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden

from jaxuda.losses.entropy import entropy_loss, entropy_map


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
