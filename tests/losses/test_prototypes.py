"""The losses and memories of CFContra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden
from jax import lax

from jaxuda.losses.contrastive import class_centres, nearest_prototype_labels, prototype_contrast, update_memory

DEVICES = 4
CLASSES = 5
TEMPERATURE = 0.07


def _unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _memory(rng, channels=3, unseen=()):
    memory = _unit(rng.normal(size=(CLASSES, channels)))
    memory[list(unseen)] = 0
    return memory


def _close(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("call", ["call0", "call1"])
def test_loss_gradient_and_memory_equal_the_published_ones(call):
    arrays = {key[6:]: value for key, value in golden("cfcontra_memory").items() if key.startswith(f"{call}_")}
    for wide in (False, True):
        with jax.enable_x64(wide):
            dtype = jnp.float64 if wide else jnp.float32
            features, memory = (jnp.asarray(arrays[name], dtype) for name in ("features", "memory_before"))
            loss = functools.partial(
                prototype_contrast, labels=arrays["labels"], memory=memory, temperature=TEMPERATURE
            )
            value, gradient = jax.value_and_grad(loss)(features)
            # The published softmax has another 1e-6 in its denominator.
            np.testing.assert_allclose(value, arrays["loss_f64"], rtol=3e-8 if wide else 1e-6)
            _close(gradient, arrays["grad_features"], 1e-6)
            centres, present = class_centres(features, arrays["labels"], len(memory))
            _close(centres, arrays["center"], 1e-6)
            np.testing.assert_array_equal(present, np.any(arrays["center"] != 0, axis=1))
            _close(update_memory(memory, centres, present, 0.9), arrays["memory_after"], 1e-6)


def test_four_terms_together():
    """The gradients are those with fixed memories; the published ones differ by 3 to 5% (see CFContra)."""
    arrays = {key[6:]: value for key, value in golden("cfcontra_memory").items() if key.startswith("joint_")}
    with jax.enable_x64(True):
        source, target, memory_s, memory_t = (
            jnp.asarray(arrays[name], jnp.float64)
            for name in ("src_features", "trg_features", "src_memory0", "trg_memory0")
        )
        y, q = arrays["src_labels"], arrays["trg_labels"]

        def loss(features):
            source, target = features
            terms = {
                "s": prototype_contrast(source, y, memory_s, TEMPERATURE),
                "t": prototype_contrast(target, q, memory_t, TEMPERATURE),
                "t2s": prototype_contrast(target, q, memory_s, TEMPERATURE),
                "s2t": prototype_contrast(source, y, memory_t, TEMPERATURE),
            }
            return float(arrays["weight"]) * sum(terms.values()), terms

        gradients, terms = jax.grad(loss, has_aux=True)((source, target))
        for name, value in terms.items():
            np.testing.assert_allclose(value, arrays[f"loss_{name}"], rtol=1e-6)
        for gradient, domain in zip(gradients, ("src", "trg"), strict=True):
            _close(gradient, arrays[f"grad_{domain}_features_frozenmem"], 1e-6)
            published = arrays[f"grad_{domain}_features"]
            assert 0.01 < np.abs(gradient - published).max() / np.abs(published).max() < 0.1

        centres = {"src": class_centres(source, y, 19), "trg": class_centres(target, q, 19)}
        for memory, domain, order in ((memory_s, "src", ("trg", "src")), (memory_t, "trg", ("src", "trg"))):
            for origin in order:
                memory = update_memory(memory, *centres[origin], 0.9)
            _close(memory, arrays[f"{domain}_memory1"], 1e-6)


@pytest.mark.parametrize("case", ["a", "b"])
def test_pseudo_labels_and_centres_equal_the_published_ones(case):
    arrays = {key[2:]: value for key, value in golden("cfcontra_pseudo").items() if key.startswith(f"{case}_")}
    labels = nearest_prototype_labels(arrays["features"], arrays["src_center"], arrays["threshold"])
    assert labels.dtype == jnp.int32
    np.testing.assert_array_equal(labels, arrays["pseudo_labels"])
    nearest = nearest_prototype_labels(arrays["features"], arrays["src_center"], 0.0)
    np.testing.assert_array_equal(nearest, np.argmin(arrays["distances"], axis=-1))
    for name in ("pseudo", "labels"):
        chosen = labels if name == "pseudo" else arrays["labels"]
        centres, _ = class_centres(arrays["features"], chosen, 19)
        # Their means divide by a count that is too large by 1e-6 of the image's positions. That cancels for a
        # single image; between the two of case b it shifts weights by some 1e-5.
        _close(centres, arrays[f"center_from_{name}"], 1e-6 if case == "a" else 2e-5)


def test_distances_survive_long_features():
    """Features are a thousand times longer than the differences that matter."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        memory = _unit(np.ones((1, 8)) + 1e-3 * rng.normal(size=(CLASSES, 8)))
        features = 1e3 * rng.normal(size=(200, 8))
        distances = np.sort(np.linalg.norm(features[:, None] - memory, axis=-1), axis=-1)
        margin = np.median(distances[:, 1] - distances[:, 0])
        exact = nearest_prototype_labels(features, memory, margin)
        assert 0.3 < np.mean(exact == 255) < 0.7
    ours = nearest_prototype_labels(features.astype(np.float32), memory.astype(np.float32), np.float32(margin))
    assert np.mean(np.asarray(ours) == np.asarray(exact)) > 0.97


def test_normalised_labels_do_not_depend_on_length():
    rng = np.random.default_rng(0)
    memory, features = _memory(rng).astype(np.float32), rng.normal(size=(50, 3)).astype(np.float32)
    label = functools.partial(nearest_prototype_labels, memory=memory, margin=0.2, normalise=True)
    np.testing.assert_array_equal(label(features), label(8 * features))
    np.testing.assert_array_equal(label(features), nearest_prototype_labels(_unit(features), memory, 0.2))
    assert np.any(label(features) != nearest_prototype_labels(8 * features, memory, 0.2))


def test_gradient_equals_finite_differences():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        features, direction = rng.normal(size=(2, 7, 3))
        loss = functools.partial(
            prototype_contrast,
            labels=np.array([0, 1, 255, 4, 2, 0, 3]),
            memory=jnp.asarray(_memory(rng, unseen=[3])),
            temperature=0.3,
        )
        expected = (loss(features + 1e-6 * direction) - loss(features - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(np.sum(jax.grad(loss)(features) * direction), expected, rtol=1e-6)


def test_a_class_that_was_never_seen_does_not_exist():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 3)), rng.choice([0, 1, 2, 3, 4, 255], 60)
    memory, kept = _memory(rng, unseen=[2]), [0, 1, 3, 4]
    with jax.enable_x64(True):
        # The same without the class: its pixels ignored, the later classes renumbered.
        fewer = np.select([labels == 255, labels == 2, labels > 2], [255, 255, labels - 1], labels)
        for temperature in (0.07, 1.0):
            ours = prototype_contrast(features, labels, memory, temperature)
            np.testing.assert_allclose(ours, prototype_contrast(features, fewer, memory[kept], temperature), rtol=1e-12)
        ours = nearest_prototype_labels(features, memory, 0.1)
        theirs = np.asarray(nearest_prototype_labels(features, memory[kept], 0.1))
        np.testing.assert_array_equal(ours, np.where(theirs == 255, 255, np.array(kept)[np.minimum(theirs, 3)]))

        centres, present = class_centres(features, labels, CLASSES)
        moved = update_memory(jnp.asarray(memory), centres, present, 0.9)
        np.testing.assert_allclose(moved[2], centres[2], rtol=1e-12)  # first seen: the centre as it is


@pytest.mark.parametrize("features", [np.ones((4, 3)), np.zeros((4, 3))])
@pytest.mark.parametrize("label", [0, 255])
@pytest.mark.parametrize("seen", [[], [0], [3]])
def test_nothing_seen_and_nothing_labelled_is_finite(features, label, seen):
    labels, memory = np.full(4, label), np.zeros((CLASSES, 3), np.float32)
    memory[seen] = [0, 1, 0]
    loss = lambda f: prototype_contrast(f, labels, memory, TEMPERATURE)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(value, 0, atol=2e-6)  # a softmax over one class, or no pixel at all
    assert np.isfinite(gradient).all()
    # With one candidate no pixel is labelled either: all would get its label.
    np.testing.assert_array_equal(nearest_prototype_labels(features, memory, 0.0), np.full(4, 255))
    centres, present = class_centres(features, labels, CLASSES)
    np.testing.assert_array_equal(present, np.arange(CLASSES) == label)
    moved = update_memory(jnp.asarray(memory), centres, present, 0.9)
    assert np.isfinite(moved).all()
    np.testing.assert_array_equal(moved[1:], memory[1:])


def test_no_pixel_is_left_by_a_large_margin():
    rng = np.random.default_rng(0)
    features, memory = rng.normal(size=(2, 4, 5, 3)), _memory(rng)
    labels = nearest_prototype_labels(features, memory, 1e3)
    assert labels.shape == (2, 4, 5) and np.all(labels == 255)
    assert prototype_contrast(features, labels, memory, TEMPERATURE) == 0
    assert not np.any(class_centres(features, labels, CLASSES)[1])


def test_images_count_alike_in_centres():
    features = np.array([[[[1.0, 0.0]] * 3], [[[0.0, 1.0]] * 3]])
    labels = np.array([[[0, 0, 0]], [[255, 0, 1]]])
    centres, present = class_centres(features, labels, 3)
    np.testing.assert_allclose(centres, [[0.5**0.5, 0.5**0.5], [0, 1], [0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(present, [True, True, False])


def test_devices_together_equal_one_device():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 255], (DEVICES, 6, 7))
    labels[1] = 255
    labels[2, :2] = 4
    with jax.enable_x64(True):
        images, weight = rng.normal(size=(DEVICES, 6, 7, 3)), rng.normal(size=(3, 3))
        memory = jnp.asarray(_memory(rng, unseen=[4]))

        def loss(weight, images, labels, axis_name=None):
            features = jnp.tanh(images @ weight)
            moved = update_memory(memory, *class_centres(features, labels, CLASSES, axis_name), 0.9)
            return prototype_contrast(features, labels, memory, TEMPERATURE, axis_name), moved

        (value, moved), gradient = jax.value_and_grad(loss, has_aux=True)(weight, images, labels)

        def step(images, labels):
            local = functools.partial(loss, axis_name="device")
            result, gradient = jax.value_and_grad(local, has_aux=True)(weight, images, labels)
            return result, lax.pmean(gradient, "device")

        (values, all_moved), gradients = jax.pmap(step, axis_name="device")(images[:, None], labels[:, None])
        np.testing.assert_allclose(values, np.full(DEVICES, value), rtol=1e-12)
        np.testing.assert_allclose(gradients, np.tile(gradient, (DEVICES, 1, 1)), rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(all_moved, np.broadcast_to(moved, all_moved.shape), rtol=1e-12)
        assert np.any(moved[4])


def test_memories_and_labels_carry_no_gradient():
    rng = np.random.default_rng(1)
    features, memory = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(_memory(rng))
    assert not np.any(jax.grad(lambda m: prototype_contrast(features, jnp.arange(4), m, 1.0))(memory))
    centre = lambda f: jnp.sum(update_memory(memory, *class_centres(f, jnp.arange(4), CLASSES), 0.9))  # noqa: E731
    assert not np.any(jax.grad(centre)(features))


def test_memory_grows_with_pixels_times_classes_at_most():
    classes, channels = 19, 64
    memory = jnp.zeros((classes, channels))

    def temporary(pixels):
        shapes = jax.ShapeDtypeStruct((pixels, channels), "float32"), jax.ShapeDtypeStruct((pixels,), "int32")
        compiled = [
            jax.jit(jax.grad(prototype_contrast)).lower(*shapes, memory, 0.07).compile(),
            jax.jit(nearest_prototype_labels).lower(shapes[0], memory, 0.05).compile(),
            jax.jit(class_centres, static_argnums=2).lower(*shapes, classes).compile(),
        ]
        return max(part.memory_analysis().temp_size_in_bytes for part in compiled)

    assert temporary(4096) < 4 * 4096 * (4 * channels + 8 * classes)
    assert temporary(16384) < 4.5 * temporary(4096)
