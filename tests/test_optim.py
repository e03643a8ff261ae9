"""The partitioned optimizer against torch's rules, written out (golden trajectories test it as a whole)."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxuda.errors import UserError
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.optimizers import make_optimizer
from jaxuda.optimizers.schedules import poly_schedule
from jaxuda.optimizers.sgd import sgd


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


CASES = {
    ("model", "backbone", "conv1", "kernel"): "stem",
    ("model", "backbone", "bn1", "scale"): "norm",
    ("model", "backbone", "layer3_5", "conv2", "kernel"): "block",
    ("model", "backbone", "layer3_0", "downsample_conv", "kernel"): "shortcut",
    ("model", "backbone", "layer3_0", "downsample_bn", "bias"): "norm",
    ("model", "head", "kernel0"): "head",
    ("model", "aux_head", "bias3"): "head",
    ("discriminator", "conv0", "kernel"): "discriminator",
    ("regions", "regions4", "kernel0"): "head",
}


def test_groups_follow_from_the_path() -> None:
    model = DeepLabV2(3)
    assert {path: model.parameter_group(path[1:]) for path in CASES if path[0] == "model"} == {
        path: group for path, group in CASES.items() if path[0] == "model"
    }


class Settings(dict):
    """A stage's settings."""

    def __init__(self, **optim):
        base = {"head_factor": 10.0, "momentum": 0.0, "weight_decay": 0.0, "power": 1.0, "repeat_decay": "fresh"}
        repeat = {"stem": 1, "block": 3, "shortcut": 4}
        super().__init__(lr=1.0, schedule_steps=10, discriminator_lr=1e-3)
        self["optim"] = {**base, "train_norm": False, "repeat": repeat, **optim}


def test_each_group_moves_as_its_settings_say() -> None:
    """Without momentum and decay, an update is minus the gradient times the group's factor."""
    params = flax.traverse_util.unflatten_dict({path: jnp.zeros(()) for path in CASES})
    grads = jax.tree.map(jnp.ones_like, params)
    for train_norm in (False, True):
        tx = make_optimizer(Settings(train_norm=train_norm), DeepLabV2(3))
        updates, _ = tx.update(grads, tx.init(params), params)
        moved = flax.traverse_util.flatten_dict(updates)
        factors = {"stem": 1, "block": 3, "shortcut": 4, "norm": float(train_norm), "head": 10, "discriminator": 1e-3}
        for path, group in CASES.items():
            np.testing.assert_allclose(moved[path], -factors[group], rtol=1e-5, err_msg=str(path))


def test_an_unknown_group_is_named() -> None:
    params = {"projection": {"kernel": jnp.zeros(())}}
    with pytest.raises(UserError, match=r"projection\.kernel is in the group 'projection'.*it has: stem, block"):
        make_optimizer(Settings(), DeepLabV2(3)).init(params)


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown optim\.name='lion'; choose one of: sgd"):
        make_optimizer(Settings(name="lion"), DeepLabV2(3))
