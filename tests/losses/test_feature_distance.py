"""Labels at the resolution of features, and the feature distance, against numbers of the published code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden

from jaxuda.losses.feature_distance import feature_distance, shrink_labels

GOLDEN = golden("feature_distance")
THINGS = GOLDEN["thing_classes"]
both = jax.jit(jax.value_and_grad(feature_distance))


@pytest.mark.parametrize("case", range(4))
def test_shrunk_labels(case):
    label, small = GOLDEN[f"label{case}"], GOLDEN[f"label{case}_small"]
    factor, ratio, classes = (GOLDEN[f"label{case}_{name}"].item() for name in ("factor", "min_ratio", "num_classes"))
    for dtype in (np.int32, np.uint8):
        found = shrink_labels(jnp.asarray(label, dtype), factor, ratio, classes)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, small)


def test_a_share_that_is_exactly_the_ratio_counts():
    labels = np.full((1, 10, 20), 255, np.int32)
    labels[0, :7] = 3
    labels[0, 6, 10] = 2
    np.testing.assert_array_equal(shrink_labels(labels, 10, 0.7, 4), [[[3, 255]]])


@pytest.mark.parametrize("case", "abd")
def test_distance_and_gradient(case):
    with jax.enable_x64(True):
        features, reference = (
            GOLDEN[f"{case}_{name}"].astype(np.float64) for name in ("features", "imagenet_features")
        )
        mask = jnp.ones(features.shape[:3], bool)
        if case != "d":
            mask = jnp.isin(shrink_labels(GOLDEN[f"{case}_label"], 8, 0.75, 19), THINGS)
            np.testing.assert_array_equal(mask, GOLDEN[f"{case}_mask"])
        value, gradient = both(features, reference, mask)
        np.testing.assert_allclose(0.005 * value, GOLDEN[f"{case}_loss_f64"], rtol=1e-9)
        np.testing.assert_allclose(0.005 * gradient, GOLDEN[f"{case}_grad_features"], rtol=1e-6, atol=1e-12)


def test_without_a_cell_the_loss_and_its_gradient_are_0():
    features, reference, mask = (GOLDEN[f"c_{name}"] for name in ("features", "imagenet_features", "mask"))
    assert not mask.any()
    value, gradient = both(features, reference, mask == 1)
    assert value == 0
    np.testing.assert_array_equal(gradient, GOLDEN["c_grad_features"])


@pytest.mark.parametrize("dtype, rounding, real", [("float32", 1e-7, 1e-4), ("float64", 1e-12, 1e-7)])
def test_rounding_is_no_distance(dtype, rounding, real):
    """Cell 0: features that differ by rounding; cell 1: a small distance; both count in the mean."""
    with jax.enable_x64(dtype == "float64"):
        features = np.zeros((1, 1, 2, 4), dtype)
        features[0, 0, :, 0] = rounding, real
        value, gradient = both(features, np.zeros_like(features), np.ones((1, 1, 2), bool))
        np.testing.assert_allclose(value, real / 2, rtol=1e-6)
        np.testing.assert_allclose(gradient[0, 0, :, 0], [0, 0.5], rtol=1e-6)
