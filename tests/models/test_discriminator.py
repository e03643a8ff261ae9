import jax
import jax.numpy as jnp
import numpy as np
from golden_weights import golden, golden_keys, network_input, state_dict

from jaxuda.interop import load_torch
from jaxuda.models.discriminator import FCDiscriminator


def test_discriminator_matches_golden():
    arrays = golden("model_fc_discriminator")
    model = FCDiscriminator()
    variables = load_torch(state_dict(golden_keys("model_fc_discriminator")), model)
    logits = jax.jit(model.apply)(variables, network_input(arrays))
    assert np.abs(logits - arrays["logits"]).max() < 1e-4 * np.abs(arrays["logits"]).max()


def test_initial_weights_are_uniform_within_the_fan_in_bound():
    model = FCDiscriminator(width=8)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 5)))["params"]
    assert sorted(params) == [f"conv{i}" for i in range(5)]
    for layer in params.values():
        bound = 1 / np.sqrt(np.prod(layer["kernel"].shape[:3]))
        assert 0.8 * bound < np.abs(layer["kernel"]).max() <= bound
        assert 0 < np.abs(layer["bias"]).max() <= bound
