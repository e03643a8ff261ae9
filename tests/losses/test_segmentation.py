import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden

from jaxuda.losses.segmentation import cross_entropy, lovasz_softmax, weighted_cross_entropy


def check(actual, expected, tolerance=1e-5):
    assert np.abs(np.asarray(actual) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("case", "abc")
def test_cross_entropy_matches_golden(case):
    arrays = {k[2:]: v for k, v in golden("ce").items() if k.startswith(case)}
    loss, gradient = jax.jit(jax.value_and_grad(cross_entropy))(arrays["logits"], arrays["labels"])
    check(loss, arrays["loss_f64"])
    check(gradient, arrays["grad_logits"])


def test_class_weights_of_the_cross_entropy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 3, 5)).astype(np.float32), rng.choice([0, 1, 2, 3, 4, 255], (4, 3))
    weights = np.array([1, 4, 0.5, 2, 9])
    losses = -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    rows = [(weights[y], row[y]) for row, y in zip(losses.reshape(-1, 5), labels.ravel(), strict=True) if y != 255]
    expected = sum(w * loss for w, loss in rows) / sum(w for w, _ in rows)
    check(cross_entropy(logits, labels, weights=weights), expected)
    check(cross_entropy(logits, labels, weights=(3.0,) * 5), cross_entropy(logits, labels))
    assert cross_entropy(logits, np.full((4, 3), 255), weights=weights) == 0


@pytest.mark.parametrize("case", "abc")
def test_weighted_cross_entropy_matches_golden(case):
    with jax.enable_x64(True):
        arrays = {k[2:]: v for k, v in golden("pseudo_weight").items() if k.startswith(case)}
        logits, label, weight = arrays["student_logits"].astype(np.float64), arrays["label"], arrays["pixel_weight"]
        assert (label == 255).any()
        both = jax.jit(jax.value_and_grad(weighted_cross_entropy))
        for given, name in ((weight, ""), (None, "unweighted_")):
            loss, gradient = both(logits, label, given)
            check(loss, arrays[f"{name}loss_f64"], 1e-9)
            check(gradient, arrays[f"{name}grad_student_logits"], 1e-6)


@pytest.mark.parametrize("case", "abc")
def test_lovasz_matches_golden(case):
    arrays = {k[2:]: v for k, v in golden("lovasz").items() if k.startswith(case)}
    labels = arrays["labels"]
    loss, gradient = jax.jit(jax.value_and_grad(lovasz_softmax))(arrays["probs"], labels)
    check(loss, arrays["loss_f64"])
    check(gradient, arrays["grad_probs"])
    loss, gradient = jax.value_and_grad(lambda z: lovasz_softmax(jax.nn.softmax(z), labels))(arrays["logits"])
    check(loss, arrays["loss_f64"])
    check(gradient, arrays["grad_logits"])


def test_lovasz_of_hard_predictions_is_the_mean_jaccard_loss():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, (2, 3, 5, 7))
    labels[0, :2] = 255
    losses = []
    for c in range(4):
        hit, said = labels == c, (predictions == c) & (labels != 255)
        losses.append(1 - (hit & said).sum() / (hit | said).sum())
    loss = lovasz_softmax(jax.nn.one_hot(predictions, 4), labels)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-6)


def test_lovasz_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        logits = rng.normal(size=(1, 4, 5, 3))
        labels = rng.choice([0, 1, 2, 255], (1, 4, 5))
        direction = rng.normal(size=logits.shape)
        loss = jax.jit(lambda z: lovasz_softmax(jax.nn.softmax(z), labels))
        step = 1e-6
        numeric = (loss(logits + step * direction) - loss(logits - step * direction)) / (2 * step)
        np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(logits), direction), numeric, rtol=1e-7)


@pytest.mark.parametrize("loss", [cross_entropy, lovasz_softmax, weighted_cross_entropy])
def test_no_label_at_all_gives_zero_and_no_gradient(loss):
    logits = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    labels = jnp.full((2, 3, 4), 255, jnp.uint8)
    value, gradient = jax.jit(jax.value_and_grad(lambda z: loss(jax.nn.softmax(z), labels)))(logits)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("loss", [cross_entropy, lovasz_softmax, weighted_cross_entropy])
def test_bfloat16_input_and_flat_positions(loss):
    x = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 3, 4, 5)))
    labels = np.random.default_rng(0).integers(0, 5, (2, 3, 4)).astype(np.uint8)
    flat = loss(x.reshape(-1, 5), labels.reshape(-1))
    np.testing.assert_allclose(flat, loss(x, labels), rtol=1e-6)
    low = loss(x.astype(jnp.bfloat16), labels)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, flat, rtol=2e-2)
