"""Three SePiCo steps of the reduced network against what the published loop computed in double precision."""

import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_weights import golden, golden_keys, state_dict
from ml_collections import ConfigDict
from trajectories import by_torch_name, start
from updates import begin

from jaxuda.methods import daformer, sepico
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.optimizers import make_optimizer
from jaxuda.training.state import TrainState
from jaxuda.training.step import make_update

MODEL = DeepLabV2(19, "resnet101", "v1c", width=16, blocks=(1, 1, 2, 2), dtype="float64")
LAYOUT = "mmseg"
RUNS = {"dist": 100.0, "dist_tau1": 1.0, "proto": 100.0, "bank": 100.0}
HEAD = {"conv": "conv", "bn": "bn", "kernel": "weight", "scale": "weight", "bias": "bias"}


def _config(arrays: dict[str, np.ndarray], name: str) -> ConfigDict:
    return ConfigDict(
        {
            "lr": float(str(arrays["base_lr"])),  # the decimal number that was rounded to single precision
            "schedule_steps": 3,
            "preprocess": "imagenet",
            "align_corners": False,
            "lambda_lovasz": 0.0,
            "alpha": 0.999,
            "threshold": float(str(arrays["threshold"])),
            "ignore_top": int(arrays["ignore_top"]),
            "ignore_bottom": int(arrays["ignore_bottom"]),
            "strength": 0.2,
            "crop_limit": 0.75,
            "contrast": name.partition("_")[0],
            "tau": RUNS[name],
            "contrast_start": 1,
            "contrast_weight": 1.0,
            "reg_weight": 1.0,
            "channels": int(arrays["proj_channels"]),
            "bank": int(arrays["memory_length"]),
            "optim": {
                "name": "adamw",
                "head_factor": 10.0,
                "weight_decay": 0.01,
                "undecayed": (),
                "power": 0.0,
                "warmup_steps": 0,
                "warmup_ratio": 0.0,
                "train_norm": True,
            },
        }
    )


class _Recorded(NamedTuple):
    """The state of an optimizer, and the gradient of its last update."""

    inner: Any
    gradient: Any


def _recording(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(grads, state, params):
        updates, inner = tx.update(grads, state.inner, params)
        return updates, _Recorded(inner, grads)

    return optax.GradientTransformation(lambda params: _Recorded(tx.init(params), params), update)


def _head(tensors: dict[str, np.ndarray]) -> dict:
    """The projection head's variables in double precision."""
    place = "auxiliary_head.convs.{}.{}".format
    params, stats = {}, {}
    for index in (0, 1):
        conv, bn = (
            {
                leaf: tensors.get(f"{place(index, part)}.{leaf}")
                for leaf in ("weight", "bias", "running_mean", "running_var")
            }
            for part in ("conv", "bn")
        )
        params[f"conv{index}"] = {"kernel": conv["weight"].transpose(2, 3, 1, 0)}
        params[f"bn{index}"] = {"scale": bn["weight"], "bias": bn["bias"]}
        stats[f"bn{index}"] = {"mean": bn["running_mean"], "var": bn["running_var"]}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), {"params": params, "batch_stats": stats})


def _head_by_torch_name(params: dict, stats: dict | None = None) -> dict[str, np.ndarray]:
    named = {}
    for layer, leaves in (*params.items(), *(stats or {}).items()):
        for leaf, value in leaves.items():
            kind, index = layer[:-1], layer[-1]
            name = HEAD.get(leaf, f"running_{leaf}")
            named[f"auxiliary_head.convs.{index}.{kind}.{name}"] = np.asarray(value)
    return named


def _named(params: dict, extra: sepico.Sepico | None = None, batch_stats: dict | None = None) -> dict[str, np.ndarray]:
    """All parameters (with `extra` also running statistics) by their torch name."""
    named = by_torch_name(params["model"], "params", MODEL, LAYOUT)
    named |= _head_by_torch_name(params["projection"], None if extra is None else extra.projection_stats)
    return named if batch_stats is None else named | by_torch_name(batch_stats, "batch_stats", MODEL, LAYOUT)


def _drawn(choices: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Classes to paste, (steps, N, C + 1) bool, from their positions among the values of the labels."""
    values = [int(value) if value != 255 else 19 for value in np.unique(labels)]
    drawn = np.zeros((*choices.shape[:2], 20), bool)
    for place in np.argwhere(choices >= 0):
        drawn[(*place[:2], values[choices[tuple(place)]])] = True
    return drawn


def _run(monkeypatch: pytest.MonkeyPatch, arrays: dict[str, np.ndarray], name: str) -> tuple[list, list]:
    """States (before the first step and after each) and metrics with the labels of each step."""
    given: dict[str, jax.Array] = {}  # what is drawn, as arguments of the compiled step
    monkeypatch.setattr(sepico, "draw_corners", lambda *_: given["corners"])
    monkeypatch.setattr(daformer, "draw_classes", lambda *_: given["classes"])
    for module in (sepico, daformer):
        monkeypatch.setattr(module, "augment", lambda images, *_, **__: images)

    def before_passes(params, carry, batch, **rest):
        carry = sepico.before_passes(params, carry, batch, **rest)
        mixed = carry.values["mixed"]
        return carry.log(pseudo=carry.values["target"]["label"], label=mixed["label"], weight=mixed["weight"])

    config = _config(arrays, name)
    method = types.SimpleNamespace(**{**vars(sepico), "before_passes": before_passes})
    batch = {
        "source": {"image": arrays["src_images"].astype(np.float64), "label": arrays["src_labels"]},
        "target": {"image": arrays["trg_images"].astype(np.float64)},
    }
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), start(MODEL, LAYOUT))
    pairs = golden_keys("train_sepico")["param_and_buffer_keys"]
    head = _head(state_dict([pair for pair in pairs if pair[0].startswith("auxiliary_head")]))
    extra = begin(sepico, MODEL, config, batch, variables=variables).extra
    extra = extra._replace(projection=head["params"], projection_stats=head["batch_stats"])
    tx = _recording(make_optimizer(config, MODEL))
    params = {"model": variables["params"], "projection": head["params"]}
    states = [TrainState.create(params, tx, variables["batch_stats"], extra)]

    def step(state, corners, classes, phase):
        given.update(corners=corners, classes=classes)
        return make_update(method, MODEL, tx, config, phase)(state, (), 0, batch)

    compiled, rows = jax.jit(step, static_argnums=3), []
    drawn = _drawn(arrays["class_choice_steps"], arrays["src_labels"])
    for index, corners in enumerate(arrays["crop_draws_steps"]):
        state, row = compiled(states[-1], corners, drawn[index], int(index >= config.contrast_start))
        states.append(state)
        rows.append(row)
    return jax.device_get((states, rows))


def _expect(ours: np.ndarray, theirs: np.ndarray, rtol: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_trajectory(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file = golden("train_sepico")
    keys = [key for key, _ in golden_keys("train_sepico")["param_and_buffer_keys"]]
    theirs = {key.removeprefix(f"{name}_double_"): value for key, value in file.items()}
    shared = {key.removeprefix(f"{name}_"): value for key, value in file.items()}
    with jax.enable_x64(True):
        states, rows = _run(monkeypatch, file, name)

    terms = [
        [
            row["ce"],
            *(row.get(f"contrast_{domain}", 0) + row.get(f"uniformity_{domain}", 0) for domain in ("source", "target")),
            row["ce_mixed"],
        ]
        for row in rows
    ]
    np.testing.assert_allclose(terms, theirs["losses_f64"], rtol=1e-10)
    np.testing.assert_allclose([row["share"] for row in rows], shared["pseudo_weight_steps_f64"], rtol=1e-12)
    height = file["src_labels"].shape[1]
    inside = slice(int(file["ignore_top"]), height - int(file["ignore_bottom"]))
    for row, pseudo, mask, label in zip(
        rows, shared["pseudo_steps"], shared["mix_mask_steps"], shared["mixed_labels_steps"], strict=True
    ):
        expected = np.full_like(pseudo, 255)
        expected[:, inside] = pseudo[:, inside]
        np.testing.assert_array_equal(row["pseudo"], expected)
        np.testing.assert_array_equal(row["label"], label)
        trust = np.zeros_like(row["weight"])
        trust[:, inside] = row["share"]
        np.testing.assert_allclose(row["weight"], np.where(mask, 1, trust), rtol=1e-12)

    history = [state.extra for state in states[1:]]
    for ours, golden_name in (("mean", "stat_mean"), ("var", "stat_cov")):
        for extra, expected in zip(history, theirs[f"{golden_name}_steps"], strict=True):
            _expect(getattr(extra.statistics, ours), expected, 1e-6)
    for extra, expected in zip(history, shared["stat_amount_steps"], strict=True):
        np.testing.assert_array_equal(extra.statistics.count, expected)
    if name == "bank":
        for extra, rows_, lengths in zip(history, theirs["bank_steps"], theirs["bank_length_steps"], strict=True):
            np.testing.assert_array_equal(np.minimum(extra.bank.count, 2), lengths)
            ordered = [
                np.roll(ours, -count if count > 2 else 0, 0)
                for ours, count in zip(extra.bank.rows, extra.bank.count, strict=True)
            ]
            _expect(np.array(ordered), rows_, 1e-6)

    named = [_named(state.params, state.extra, state.batch_stats) for state in states]
    assert set(named[0]) == {key for key in keys if not key.endswith("num_batches_tracked")}
    for after, golden_name in ((1, "step1_delta_l2"), (-1, "delta_l2")):
        _compare(named[after], named[0], keys, theirs[f"{golden_name}_f64"])
    last = states[2].extra
    teacher = _named({"model": last.teacher.params, "projection": last.projection})
    _compare(teacher, named[0], keys, theirs["teacher_delta_l2_f64"])
    for number, state in enumerate(states[1:], start=1):
        gradient = _named(state.opt_state.gradient)
        _compare(gradient, None, keys, theirs[f"grad{number}_l2_f64"])


def _compare(ours: dict, before: dict | None, keys: list[str], theirs: np.ndarray) -> None:
    """The norms of tensors, or of how they changed."""
    compared = [i for i, key in enumerate(keys) if key in ours]
    norms = [np.linalg.norm(ours[keys[i]] - (before[keys[i]] if before else 0)) for i in compared]
    np.testing.assert_allclose(norms, theirs[compared], rtol=1e-9, atol=1e-13)
