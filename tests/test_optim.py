"""The partitioned optimizer against torch's rules, written out (golden trajectories test it in whole)."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxuda.optimizers.sgd import parameter_group, poly_schedule, sgd


def test_poly_schedule() -> None:
    schedule = poly_schedule(0.1, 100)
    np.testing.assert_allclose([schedule(0), schedule(50), schedule(100)], [0.1, 0.1 * 0.5**0.9, 0], rtol=1e-6)
    assert schedule(120) == 0  # never NaN beyond the end


@pytest.mark.parametrize("decay", ["fresh", "accumulate"])
@pytest.mark.parametrize("repeat", [1, 3])
def test_sgd(repeat: int, decay: str) -> None:
    rng = np.random.default_rng(0)
    weight, buffer = rng.normal(size=5), np.zeros(5)
    transform = sgd(poly_schedule(0.1, 10), 0.9, 0.01, repeat, decay)
    params = {"w": jnp.asarray(weight, jnp.float32)}
    state = transform.init(params)
    for step in range(3):
        grad = rng.normal(size=5)
        updates, state = transform.update({"w": jnp.asarray(grad, jnp.float32)}, state, params)
        params = {"w": params["w"] + updates["w"]}
        for _ in range(repeat):
            decayed = grad + 0.01 * weight
            if decay == "accumulate":
                grad = decayed
            buffer = 0.9 * buffer + decayed
            weight = weight - 0.1 * (1 - step / 10) ** 0.9 * buffer
    np.testing.assert_allclose(params["w"], weight, rtol=1e-5)


def test_groups_follow_from_the_path() -> None:
    cases = {
        ("model", "backbone", "conv1", "kernel"): "stem",
        ("model", "backbone", "bn1", "scale"): "frozen",
        ("model", "backbone", "layer3_5", "conv2", "kernel"): "block",
        ("model", "backbone", "layer3_0", "downsample_conv", "kernel"): "shortcut",
        ("model", "backbone", "layer3_0", "downsample_bn", "bias"): "frozen",
        ("model", "head", "kernel0"): "head",
        ("model", "aux_head", "bias3"): "head",
        ("discriminator", "conv0", "kernel"): "discriminator",
        ("regions", "regions4", "kernel0"): "head",
    }
    assert {path: parameter_group(path, train_norm=False) for path in cases} == cases
    assert parameter_group(("model", "backbone", "bn1", "scale"), train_norm=True) == "norm"
