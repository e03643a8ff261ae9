import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden
from jax import lax

from jaxuda.losses.contrastive import ClassStatistics, distribution_contrast, empty_statistics, update_statistics

DEVICES = 4
CLASSES = 5


def _statistics(rng, channels=3):
    return ClassStatistics(
        jnp.asarray(rng.normal(size=(CLASSES, channels))),
        jnp.asarray(rng.random((CLASSES, channels))),
        jnp.asarray([4.0, 0.0, 10.0, 3.0, 2.0]),
    )


def test_three_updates_equal_the_published_estimator():
    arrays = golden("sdca_estimator")
    stats = empty_statistics(*arrays["mean0"].shape)
    for step in range(3):
        stats = jax.jit(update_statistics)(stats, arrays[f"features{step}"], arrays[f"labels{step}"])
        np.testing.assert_allclose(stats.mean, arrays[f"mean{step}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.var, arrays[f"cov{step}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(stats.count, arrays[f"amount{step}"])


def test_updates_pool():
    """Any split into batches gives the mean and the biased variance of all pixels."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(90, 6)), rng.choice([0, 1, 3, 255], 90)
    with jax.enable_x64(True):
        stats = empty_statistics(CLASSES, 6, "float64")
        for part in np.split(np.arange(90), [7, 8, 40]):
            stats = update_statistics(stats, jnp.asarray(features[part]), labels[part])
        for c in (0, 1, 3):
            np.testing.assert_allclose(stats.mean[c], features[labels == c].mean(0), rtol=1e-12)
            np.testing.assert_allclose(stats.var[c], features[labels == c].var(0), rtol=1e-12)
            assert stats.count[c] == (labels == c).sum()
        for never in (2, 4):
            assert not np.any(stats.mean[never]) and not np.any(stats.var[never]) and stats.count[never] == 0


def test_variance_survives_a_large_mean():
    features = 1e4 + np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    stats = update_statistics(empty_statistics(1, 4), features, np.zeros(2000, np.int32))
    np.testing.assert_allclose(stats.var[0], features.astype(np.float64).var(0), rtol=1e-3)


@pytest.mark.parametrize("case", ["a", "b"])
def test_loss_and_gradient_equal_the_published_ones(case):
    arrays = {key[2:]: value for key, value in golden("sdca_loss").items() if key.startswith(f"{case}_")}
    for wide, tolerance in ((False, 1e-5), (True, 1e-6)):
        with jax.enable_x64(wide):
            dtype = jnp.float64 if wide else jnp.float32
            features, mean, var = (jnp.asarray(arrays[name], dtype) for name in ("features", "mean", "cov"))
            stats = ClassStatistics(mean, var, jnp.ones(len(mean), dtype))
            tau = float(arrays["tau"])
            value, gradient = jax.value_and_grad(distribution_contrast)(features, arrays["labels"], stats, tau)
            np.testing.assert_allclose(value, arrays["loss_f64"], rtol=1e-12 if wide else 1e-6)
            scale = np.abs(arrays["grad_features"]).max()
            np.testing.assert_allclose(gradient, arrays["grad_features"], rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("tau", [0.3, 100.0])
def test_gradient_equals_finite_differences(tau):
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        features, direction = rng.normal(size=(2, 7, 3))
        labels, stats = np.array([0, 1, 255, 4, 2, 0, 3]), _statistics(rng)
        loss = functools.partial(distribution_contrast, labels=labels, stats=stats, tau=tau)
        expected = (loss(features + 1e-6 * direction) - loss(features - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(np.sum(jax.grad(loss)(features) * direction), expected, rtol=1e-5)


def test_devices_together_equal_one_device():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 255], (DEVICES, 6, 7))
    labels[1] = 255
    labels[2, :2] = 4
    with jax.enable_x64(True):
        images, weight, stats = rng.normal(size=(DEVICES, 6, 7, 3)), rng.normal(size=(3, 3)), _statistics(rng)

        def loss(weight, images, labels, axis_name=None):
            features = jnp.tanh(images @ weight)
            moved = update_statistics(stats, features, labels, axis_name)
            return distribution_contrast(features, labels, moved, 0.5, axis_name), moved

        (value, moved), gradient = jax.value_and_grad(loss, has_aux=True)(weight, images, labels)

        def step(images, labels):
            local = functools.partial(loss, axis_name="device")
            result, gradient = jax.value_and_grad(local, has_aux=True)(weight, images, labels)
            return result, lax.pmean(gradient, "device")

        (values, all_moved), gradients = jax.pmap(step, axis_name="device")(images[:, None], labels[:, None])
        np.testing.assert_allclose(values, np.full(DEVICES, value), rtol=1e-12)
        np.testing.assert_allclose(gradients, np.tile(gradient, (DEVICES, 1, 1)), rtol=1e-10, atol=1e-14)
        for ours, expected in zip(all_moved, moved, strict=True):
            np.testing.assert_allclose(ours, np.broadcast_to(expected, ours.shape), rtol=1e-12)


def test_statistics_carry_no_gradient():
    stats, features = _statistics(np.random.default_rng(1)), jnp.ones((4, 3))
    labels = jnp.arange(4)
    gradient = jax.grad(lambda f: jnp.sum(update_statistics(stats, f, labels).var))(features)
    assert not np.any(gradient)
    by_mean = jax.grad(lambda m: distribution_contrast(features, labels, stats._replace(mean=m), 1.0))(stats.mean)
    assert not np.any(by_mean)


@pytest.mark.parametrize("features", [np.ones((3, 4)), np.zeros((3, 4))])
@pytest.mark.parametrize("label", [0, 255])
def test_nothing_seen_and_nothing_labelled_is_finite(features, label):
    labels, stats = np.full(3, label), empty_statistics(CLASSES, 4)
    loss = lambda f: distribution_contrast(f, labels, stats, 0.1)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(value, np.log(CLASSES) if label == 0 else 0, rtol=1e-6)
    assert np.isfinite(gradient).all()
    moved = update_statistics(stats, features, labels)
    assert all(np.isfinite(leaf).all() for leaf in moved)


def test_memory_stays_below_pixels_times_classes_times_channels():
    pixels, classes, channels = 4096, 19, 64
    shapes = jax.ShapeDtypeStruct((pixels, channels), "float32"), jax.ShapeDtypeStruct((pixels,), "int32")
    stats = empty_statistics(classes, channels)
    update = jax.jit(update_statistics).lower(stats, *shapes).compile()
    loss = jax.jit(jax.grad(distribution_contrast), static_argnums=3).lower(*shapes, stats, 100.0).compile()
    for compiled in (update, loss):
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * pixels * (4 * channels + 6 * classes)
