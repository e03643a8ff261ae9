import jax
import numpy as np
import pytest
from golden_weights import golden

from jaxuda.losses.adversarial import domain_bce


@pytest.mark.parametrize("domain", [0, 1])
@pytest.mark.parametrize("case", "ab")
def test_domain_bce_matches_golden(case, domain):
    arrays = golden("bce")
    loss, gradient = jax.value_and_grad(domain_bce)(arrays[f"{case}_pred"], domain)
    expected = arrays[f"{case}_grad_label{domain}"]
    np.testing.assert_allclose(loss, arrays[f"{case}_loss_label{domain}"], rtol=1e-5)
    assert np.abs(gradient - expected).max() <= 1e-5 * np.abs(expected).max()
