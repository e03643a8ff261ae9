"""The partitioned optimizer against torch's rules, written out (golden trajectories test it as a whole)."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden

from configs import common
from jaxuda.errors import UserError
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.optimizers import make_optimizer
from jaxuda.optimizers.adamw import adamw
from jaxuda.optimizers.schedules import poly_schedule
from jaxuda.optimizers.sgd import sgd


def test_poly_schedule() -> None:
    schedule = poly_schedule(0.1, 100)
    np.testing.assert_allclose([schedule(0), schedule(50), schedule(100)], [0.1, 0.1 * 0.5**0.9, 0], rtol=1e-6)
    assert schedule(120) == 0  # never NaN beyond the end


@pytest.mark.parametrize("case", ["a", "b"])
def test_poly_schedule_with_warm_up(case: str) -> None:
    """Case "c" of the golden file is a schedule with a minimum, which jaxuda lacks."""
    arrays = {key[2:]: value for key, value in golden("warmup_poly").items() if key.startswith(case)}
    numbers = {name: arrays[name].item() for name in ("max_steps", "warmup_steps")}
    # The file has float32 numbers of what was computed with float64.
    numbers |= {name: float(str(arrays[name])) for name in ("power", "warmup_ratio")}
    for wide, tolerance in ((True, 1e-9), (False, 1e-4)):
        with jax.enable_x64(wide):
            for rate, expected in zip(arrays["base_lr"], arrays["lr_f64"].T, strict=True):
                schedule = poly_schedule(float(str(rate)), **numbers)
                # In float32 the last steps, whose rates are nearly 0, are exact only relative to the first rates.
                least = 0 if wide else 1e-6 * rate
                np.testing.assert_allclose(schedule(jnp.asarray(arrays["steps"])), expected, tolerance, least)
                np.testing.assert_allclose(schedule(0), expected[0], tolerance)
    assert schedule(numbers["max_steps"] + 5) == 0


@pytest.mark.parametrize("tensor", ["plain", "norm", "head"])
def test_adamw(tensor: str) -> None:
    file = golden("adamw")
    arrays = {name.removeprefix(f"{tensor}_"): value for name, value in file.items() if name.startswith(tensor)}
    rates = file["lr_f64"] * float(arrays["lr_factor"])
    for wide, kind, expected, tolerance in (
        (True, np.float64, arrays["weights_f64"], 1e-14),
        (False, np.float32, arrays["weights"], 1e-6),
    ):
        with jax.enable_x64(wide):
            decay = float(str(arrays["weight_decay"]))  # 0.01; the file has the nearest float32
            transform = adamw(jnp.asarray(rates).__getitem__, decay)
            weight = jnp.asarray(arrays["start"], kind)
            state = transform.init(weight)
            for gradient, after in zip(arrays["grads"], expected, strict=True):
                updates, state = transform.update(jnp.asarray(gradient, kind), state, weight)
                weight = weight + updates
                assert weight.dtype == kind
                np.testing.assert_allclose(weight, after, tolerance, tolerance)


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


def adamw_settings(**fields) -> dict:
    config = common.base("minent", "streets")
    common.adamw(config, **fields)
    return {"lr": 1e-3, "schedule_steps": 10, "optim": config.optim.to_dict()}


def test_groups_of_adamw() -> None:
    """In the first update AdamW moves each weight by its rate, whatever the gradient's size, and by its decay."""
    params = flax.traverse_util.unflatten_dict({path: jnp.ones(()) for path in CASES if path[0] != "discriminator"})
    grads = jax.tree.map(lambda one: 0.1 * one, params)
    fields = {"head_factor": 5.0, "weight_decay": 0.5, "warmup_steps": 4, "warmup_ratio": 0.2}
    for more, norm in (
        ({"undecayed": ("norm",)}, 1.0),
        ({"undecayed": ["norm", "head"]}, 1.0),  # a stage's settings have been through JSON
        ({}, 1.5),
        ({"train_norm": False}, 0.0),
    ):
        tx = make_optimizer(adamw_settings(**fields, **more), DeepLabV2(3))
        updates, _ = tx.update(grads, tx.init(params), params)
        head = 5 * (1.0 if "head" in more.get("undecayed", ()) else 1.5)
        for path, moved in flax.traverse_util.flatten_dict(updates).items():
            expected = {"norm": norm, "head": head}.get(CASES[path], 1.5)
            np.testing.assert_allclose(moved, -1e-3 * 0.2 * expected, rtol=1e-4, err_msg=str((more, path)))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("undecayed", ("norms",), r"undecayed=\('norms',\) must be a tuple of groups \(stem, block"),
        ("undecayed", "norm", r"undecayed='norm' must be a tuple of groups"),
        ("undecayed", None, r"undecayed=None must be a tuple of groups"),
        ("weight_decay", "0.01", r"config\.optim\.weight_decay='0\.01' must be a number"),
        ("warmup_steps", None, r"config\.optim\.warmup_steps=None must be a number"),
    ],
)
def test_wrong_fields_of_adamw_are_named(field: str, value, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make_optimizer(adamw_settings(**{field: value}), DeepLabV2(3))


def test_an_unknown_group_is_named() -> None:
    params = {"projection": {"kernel": jnp.zeros(())}}
    with pytest.raises(UserError, match=r"projection\.kernel is in the group 'projection'.*it has: stem, block"):
        make_optimizer(Settings(), DeepLabV2(3)).init(params)


def test_unknown_and_missing_names() -> None:
    # SGD's settings with another name.
    with pytest.raises(UserError, match=r"config\.optim lacks warmup_steps, warmup_ratio, undecayed, which optim"):
        make_optimizer(Settings(name="adamw"), DeepLabV2(3))
    with pytest.raises(AssertionError, match="AdamW has no momentum"):
        adamw_settings(momentum=0.9)
    with pytest.raises(UserError, match=r"unknown optim\.name='lion'; choose one of: adamw, sgd"):
        make_optimizer(Settings(name="lion"), DeepLabV2(3))


def test_held_parameters_neither_decay_nor_count() -> None:
    """They then learn as if training began there, at the learning rates of the steps that follow."""
    config = common.base("held", "folder")
    common.adamw(config, weight_decay=0.1)
    config.update({"contrast_start": 3, "lr": 0.01, "schedule_steps": 8})
    tx, gradient = make_optimizer(config, DeepLabV2(4)), {"projection": {"kernel": jnp.ones(2)}}
    params = {"projection": {"kernel": jnp.array([1.0, -2.0])}}
    state, weights = tx.init(params), [params["projection"]["kernel"]]
    for step in range(6):
        size = 0.0 if step < 3 else step - 1.0  # the method gives zeros at first
        updates, state = tx.update(jax.tree.map(lambda x, size=size: size * x, gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        weights.append(params["projection"]["kernel"])
    for held in weights[1:4]:
        np.testing.assert_array_equal(held, weights[0])
    late = adamw(lambda count: 0.01 * (1 - (count + 3) / 8), 0.1)
    weight = weights[0]
    state = late.init(weight)
    for step in range(3, 6):
        updates, state = late.update((step - 1.0) * jnp.ones(2), state, weight)
        weight = weight + updates
        np.testing.assert_allclose(weights[step + 1], weight, rtol=1e-6)
