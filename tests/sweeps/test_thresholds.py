import jax
import numpy as np
from golden_weights import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxuda.sweeps.thresholds import BINS, apply_thresholds, class_thresholds, confidence_histogram


def _exact(confidence, labels, classes, cap):
    """The definition: sort, and take the element at round(n / 2)."""
    thresholds = np.zeros(classes)
    for c in range(classes):
        values = np.sort(confidence[labels == c])
        if values.size:
            thresholds[c] = min(cap, values[round(values.size / 2)])
    return thresholds


def test_thresholds_and_labels_equal_the_published_ones():
    arrays = golden("sdca_pseudo")
    probs = np.asarray(jax.nn.softmax(arrays["logits"]))
    # Image by image, as in a sweep.
    histogram = sum(np.asarray(confidence_histogram(image), np.int64) for image in probs)
    np.testing.assert_array_equal(histogram.sum(1), arrays["pixel_counts"])
    thresholds = class_thresholds(histogram, float(arrays["cap"]))
    assert np.all(thresholds <= arrays["thresholds"])
    np.testing.assert_allclose(thresholds, arrays["thresholds"], rtol=0, atol=1 / BINS)

    exact = apply_thresholds(arrays["argmax"], arrays["max_prob"], arrays["thresholds"])
    np.testing.assert_array_equal(exact, arrays["pseudo_labels"])
    # The histogram decides otherwise only for pixels within a bin of their threshold.
    ours = np.asarray(apply_thresholds(arrays["argmax"], arrays["max_prob"], thresholds))
    near = np.abs(arrays["max_prob"] - arrays["thresholds"][arrays["argmax"]]) <= 1 / BINS
    np.testing.assert_array_equal(ours[~near], arrays["pseudo_labels"][~near])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_any_number_of_pixels_agrees_within_the_bin_width(seed, pixels):
    rng = np.random.default_rng(seed)
    probs = np.zeros((40, 4), np.float32)
    probs[:] = rng.dirichlet(np.full(4, 0.3), 40)
    probs[-1] = [0, 1, 0, 0]
    counts = np.arange(40) >= 40 - pixels
    histogram = np.asarray(confidence_histogram(probs, counts))
    assert histogram.sum() == pixels
    kept = probs[counts]
    expected = _exact(kept.max(1), kept.argmax(1), 4, 0.9)
    ours = class_thresholds(histogram, 0.9)
    assert np.all(ours <= expected + 1e-7)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1 / BINS + 1e-7)


def test_half_of_a_class_always_stays():
    """Even if all confidences are high and equal, since none is strictly below its own bin."""
    probs = np.full((5, 2), [0.0, 1.0], np.float32) * np.float32(0.83)
    thresholds = class_thresholds(np.asarray(confidence_histogram(probs)), 0.9)
    assert not np.any(apply_thresholds(probs.argmax(1), probs.max(1), thresholds) == 255)


def test_ignored_labels_and_unseen_classes():
    thresholds = class_thresholds(np.zeros((3, BINS), np.int64), 0.9)
    np.testing.assert_array_equal(thresholds, 0)
    labels = np.array([0, 2, 255], np.uint8)
    kept = apply_thresholds(labels, np.zeros(3), thresholds)
    np.testing.assert_array_equal(kept, labels)
    assert kept.dtype == np.uint8
    assert np.all(apply_thresholds(labels, np.zeros(3), np.full(3, 0.5)) == 255)
