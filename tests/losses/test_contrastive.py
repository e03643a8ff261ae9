import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden
from jax import lax

from jaxuda.losses.contrastive import (
    ClassStatistics,
    bank_contrast,
    distribution_contrast,
    empty_bank,
    empty_statistics,
    uniformity,
    update_bank,
    update_statistics,
)
from jaxuda.losses.feature_distance import shrink_labels

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


# SePiCo


def _sepico_loss(arrays, kind):
    """The loss of features with the statistics or the bank of a golden file."""
    tau, labels = float(str(arrays["tau"])), arrays["labels_small"]
    if kind == "bank":
        return lambda features: bank_contrast(features, labels, jnp.asarray(arrays["bank"]), arrays["bank_length"], tau)
    mean = jnp.asarray(arrays["mean"], float)
    stats = ClassStatistics(mean, jnp.asarray(arrays.get("cov", np.zeros_like(mean)), float), jnp.ones(len(mean)))
    return lambda features: distribution_contrast(features, labels, stats, tau, unit=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize("kind", ["proto", "bank", "dist"])
def test_sepico_losses_and_gradients_equal_the_published_ones(kind, case):
    file = golden(f"sepico_{kind}")
    arrays = {key[2:]: value for key, value in file.items() if key.startswith(f"{case}_")}
    labels = shrink_labels(jnp.asarray(arrays["labels"]), int(arrays["label_scale"]), 0.75, 19)
    np.testing.assert_array_equal(labels, arrays["labels_small"])
    for wide, tolerance in ((False, 2e-6), (True, 1e-12)):
        with jax.enable_x64(wide):
            features = jnp.asarray(arrays["features"], float)
            tau, mean = float(str(arrays["tau"])), jnp.asarray(arrays["mean"], float)
            loss = _sepico_loss(arrays, kind)
            reg = functools.partial(uniformity, labels=labels, means=mean, tau=tau)
            for term, value in (("", loss), ("_reg", reg)):
                ours, gradient = jax.value_and_grad(value)(features)
                np.testing.assert_allclose(ours, arrays[f"{term.strip('_') or 'loss'}_f64"], rtol=tolerance)
                expected = arrays[f"grad_features{term}"]
                # At tau = 100 the gradient of reg is the difference of nearly equal numbers.
                close = 1e-6 if wide else 1e-3 if term else 1e-5
                np.testing.assert_allclose(gradient, expected, rtol=close, atol=close * np.abs(expected).max())


@pytest.mark.slow
def test_sepico_statistics_and_bank_equal_the_published_ones():
    arrays = golden("sepico_stats")
    (classes, channels), length = arrays["mean0"].shape, int(arrays["memory_length"])
    for wide, tolerance in ((False, 1e-5), (True, 1e-12)):
        with jax.enable_x64(wide):
            stats, bank = empty_statistics(classes, channels, float), empty_bank(classes, length, channels, float)
            for step in range(3):
                labels = shrink_labels(jnp.asarray(arrays[f"labels{step}"]), int(arrays["label_scale"]), 0.75, classes)
                np.testing.assert_array_equal(labels, arrays[f"labels_small{step}"])
                features = jnp.asarray(arrays[f"features{step}"], float)
                stats, bank = update_statistics(stats, features, labels), update_bank(bank, features, labels)
                np.testing.assert_allclose(stats.mean, arrays[f"mean{step}_f64"], tolerance, 1e-2 * tolerance)
                np.testing.assert_allclose(stats.var, arrays[f"cov{step}_f64"], tolerance, 1e-2 * tolerance)
                np.testing.assert_array_equal(stats.count, arrays[f"amount{step}"])
                np.testing.assert_array_equal(bank.lengths, arrays[f"bank_length{step}"])
                expected = arrays[f"bank{step}_f64"]
                np.testing.assert_allclose(_oldest_first(bank), expected, tolerance, 1e-2 * tolerance)
            assert np.max(bank.count) > length  # a class has lost its first row


def _oldest_first(bank):
    length = bank.rows.shape[1]
    return np.array(
        [
            np.roll(rows, -count if count > length else 0, axis=0)
            for rows, count in zip(np.asarray(bank.rows), np.asarray(bank.count), strict=True)
        ]
    )


def test_one_row_per_class_and_no_variance_are_the_contrast_with_prototypes():
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        features = rng.normal(size=(2, 3, 4, 6))
        features /= np.linalg.norm(features, axis=-1, keepdims=True)
        labels, means = rng.choice([0, 1, 2, 4, 255], (2, 3, 4)), jnp.asarray(rng.normal(size=(CLASSES, 6)))
        scores = jax.nn.log_softmax(features @ means.T / 0.3)
        expected = -np.mean([scores[tuple(place)][labels[tuple(place)]] for place in np.argwhere(labels != 255)])
        stats = ClassStatistics(means, jnp.zeros_like(means), jnp.ones(CLASSES))
        found = distribution_contrast(features, labels, stats, 0.3, unit=False)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        for length in (1, 3):  # rows beyond a class's length do not count
            bank = jnp.full((CLASSES, length, 6), 7.0).at[:, 0].set(means)
            found = bank_contrast(features, labels, bank, jnp.ones(CLASSES, jnp.int32), 0.3)
            np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("tau", [0.001, 100.0])
def test_bank_contrast_stays_finite(tau):
    """The published formula has exp(1 / tau)."""
    rng = np.random.default_rng(4)
    features = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 20)]
    bank = np.eye(5, 4, dtype=np.float32)[:, None].repeat(3, 1)
    loss = functools.partial(
        bank_contrast, labels=rng.integers(0, 5, 20), bank=jnp.asarray(bank), lengths=np.full(5, 2), tau=tau
    )
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(features))
    assert np.isfinite(value) and value > 0 and np.isfinite(gradient).all() and np.any(gradient)


def test_without_labelled_pixels_sepico_is_zero():
    features, labels = jnp.ones((3, 4)), np.full(3, 255)
    bank, means = empty_bank(CLASSES, 2, 4), jnp.ones((CLASSES, 4))
    for loss in (
        lambda f: bank_contrast(f, labels, bank.rows, bank.lengths, 0.1),
        lambda f: uniformity(f, labels, means, 0.1),
    ):
        value, gradient = jax.value_and_grad(loss)(features)
        assert value == 0 and not np.any(gradient)
    after = update_bank(bank, features, labels)
    jax.tree.map(np.testing.assert_array_equal, after, bank)


def test_sepico_on_devices_together_equals_one_device():
    rng = np.random.default_rng(5)
    labels = rng.choice([0, 1, 2, 255], (DEVICES, 6, 7))
    labels[1], labels[2, :2] = 255, 4
    with jax.enable_x64(True):
        features, means = rng.normal(size=(DEVICES, 6, 7, 3)), jnp.asarray(rng.normal(size=(CLASSES, 3)))
        start = empty_bank(CLASSES, 2, 3, "float64")

        def loss(features, labels, axis_name=None):
            bank = update_bank(start, features, labels, axis_name)
            value = bank_contrast(features, labels, bank.rows, bank.lengths, 0.5, axis_name)
            return value + uniformity(features, labels, means, 0.5, axis_name), bank

        (value, bank), gradient = jax.value_and_grad(loss, has_aux=True)(features, labels)
        step = jax.value_and_grad(functools.partial(loss, axis_name="device"), has_aux=True)
        (values, banks), gradients = jax.pmap(step, axis_name="device")(features[:, None], labels[:, None])
        np.testing.assert_allclose(values, np.full(DEVICES, value), rtol=1e-12)
        # Each device has the gradient of the sum of all devices' values.
        np.testing.assert_allclose(gradients[:, 0] / DEVICES, gradient, rtol=1e-10, atol=1e-14)
        for ours, expected in zip(banks, bank, strict=True):
            np.testing.assert_allclose(ours, np.broadcast_to(expected, ours.shape), rtol=1e-12)


def test_memory_of_bank_contrast_stays_below_pixels_times_all_rows():
    pixels, classes, rows, channels = 4096, 19, 50, 64
    features, labels = jax.ShapeDtypeStruct((pixels, channels), "float32"), jax.ShapeDtypeStruct((pixels,), "int32")
    bank = empty_bank(classes, rows, channels)
    gradient = jax.jit(jax.grad(lambda f, y: bank_contrast(f, y, bank.rows, bank.lengths, 1.0)))
    used = gradient.lower(features, labels).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * pixels * (4 * channels + 6 * classes + 6 * rows)
