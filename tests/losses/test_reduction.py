"""The rule of reduction: N devices give the value and, after one pmean, the gradient of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxuda.losses.adversarial import domain_bce
from jaxuda.losses.depth import berhu
from jaxuda.losses.entropy import entropy_loss
from jaxuda.losses.feature_distance import feature_distance
from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import cross_entropy, lovasz_softmax, weighted_cross_entropy

DEVICES = 4
CLASSES = 5


def softmaxed(loss):
    return lambda logits, labels, **axis: loss(jax.nn.softmax(logits), labels, **axis)


LOSSES = {
    "cross_entropy": cross_entropy,
    "cross_entropy of weighted classes": functools.partial(cross_entropy, weights=(1.0, 4.0, 0.5, 2.0, 9.0)),
    "weighted_cross_entropy": lambda logits, labels, **axis: weighted_cross_entropy(
        logits, labels, jnp.where(labels == 1, 0.3, 1.0), **axis
    ),
    "feature_distance": lambda logits, labels, **axis: feature_distance(logits, 0.1, labels == 1, **axis),
    "lovasz_softmax": softmaxed(lovasz_softmax),
    "entropy_loss": softmaxed(lambda probs, _, **axis: entropy_loss(probs, **axis)),
    "domain_bce": lambda logits, _, **axis: domain_bce(logits, 1, **axis),
    "berhu": lambda logits, labels, **axis: berhu(logits[..., :1], 0.01 * labels, **axis),
}


@pytest.fixture
def batch():
    """Uneven labels: one image without labels, one with a class that no other has."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 255], (DEVICES, 6, 7))
    labels[1] = 255
    labels[2, :2] = 4
    return rng.normal(size=(DEVICES, 6, 7, 3)), labels


@pytest.mark.parametrize("name", LOSSES)
def test_devices_together_equal_one_device(name, batch):
    with jax.enable_x64(True):
        images, labels = batch
        weight = np.random.default_rng(1).normal(size=(3, CLASSES))

        def loss(weight, images, labels, axis_name=None):
            return LOSSES[name](jnp.tanh(images @ weight), labels, axis_name=axis_name)

        value, gradient = jax.value_and_grad(loss)(weight, images, labels)

        def step(images, labels):
            local = functools.partial(loss, axis_name="device")
            value, gradient = jax.value_and_grad(local)(weight, images, labels)
            return value, lax.pmean(gradient, "device")

        values, gradients = jax.pmap(step, axis_name="device")(images[:, None], labels[:, None])
        np.testing.assert_allclose(values, np.full(DEVICES, value), rtol=1e-12)
        np.testing.assert_allclose(gradients, np.tile(gradient, (DEVICES, 1, 1)), rtol=1e-10, atol=1e-14)


def test_masked_mean_counts_exactly_and_survives_an_empty_mask():
    values = jnp.arange(6.0).reshape(2, 3)
    assert masked_mean(values, values > 2) == 4
    assert masked_mean(values) == 2.5
    value, gradient = jax.value_and_grad(masked_mean)(values, jnp.zeros((2, 3), bool))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))
