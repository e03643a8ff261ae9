import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden

from jaxuda.losses.adversarial import SOURCE, TARGET, class_domain_ce, domain_bce


@pytest.mark.parametrize("domain", [0, 1])
@pytest.mark.parametrize("case", "ab")
def test_domain_bce_matches_golden(case, domain):
    arrays = golden("bce")
    loss, gradient = jax.value_and_grad(domain_bce)(arrays[f"{case}_pred"], domain)
    expected = arrays[f"{case}_grad_label{domain}"]
    np.testing.assert_allclose(loss, arrays[f"{case}_loss_label{domain}"], rtol=1e-5)
    assert np.abs(gradient - expected).max() <= 1e-5 * np.abs(expected).max()


def test_class_domain_ce_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]))
    probs = jnp.array([[0.9, 0.1], [0.5, 0.5]])
    of_source = -(0.9 * np.log(0.1) + 0.1 * np.log(0.2) + np.log(0.25)) / 2
    of_target = -(0.9 * np.log(0.3) + 0.1 * np.log(0.4) + np.log(0.25)) / 2
    np.testing.assert_allclose(class_domain_ce(logits, probs, SOURCE), of_source, rtol=1e-5)
    np.testing.assert_allclose(class_domain_ce(logits, probs, TARGET), of_target, rtol=1e-5)
    with pytest.raises(ValueError, match="twice as many channels"):
        class_domain_ce(logits[:, :3], probs, SOURCE)
