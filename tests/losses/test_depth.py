import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden

from jaxuda.losses.depth import berhu


@pytest.mark.parametrize("case", "ab")
def test_berhu_matches_golden(case):
    arrays = {k[2:]: v for k, v in golden("dada_depth_loss").items() if k.startswith(case)}
    loss, gradient = jax.value_and_grad(berhu)(arrays["pred"], arrays["depth"])
    expected = arrays["grad_pred"]
    np.testing.assert_allclose(loss, arrays["loss_f64"], rtol=1e-5)
    assert np.abs(gradient - expected).max() <= 1e-5 * np.abs(expected).max()


def test_perfect_prediction_gives_zero_and_no_gradient():
    depth = jnp.arange(12.0).reshape(1, 3, 4)
    value, gradient = jax.value_and_grad(berhu)(depth[..., None], depth)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
