"""Five train steps of the reduced network against what the published loops computed in double precision."""

import functools

import flax
import jax
import numpy as np
import pytest
from golden_weights import golden, golden_keys, state_dict
from ml_collections import ConfigDict
from trajectories import by_torch_name, run

from jaxuda.interop.torch_checkpoint import load_torch, to_torch
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.discriminator import FCDiscriminator
from jaxuda.training.state import TrainState

pytestmark = pytest.mark.usefixtures("all_optimizations")

LITERAL = {"stem": 1, "block": 3, "shortcut": 4}
MODEL = DeepLabV2(19, "resnet101", "caffe", blocks=(1, 1, 1, 1), aux=True, dtype="float64")
_run = functools.partial(run, model=MODEL, layout="two_level")
_by_torch_name = functools.partial(by_torch_name, model=MODEL, layout="two_level")


def _config(run: str) -> ConfigDict:
    """The settings in a run's name: update rule, learning rates, weights of the adaptation terms."""
    rule, scale = run.split("_")[:2]
    factor = 100.0 if scale == "lam100" else 1.0
    return ConfigDict(
        {
            "lr": 2.5e-4 * (10 if scale == "lr10" else 1),
            "schedule_steps": 250_000,
            "align_corners": True,
            "lambda_aux": 0.1,
            "lambda_lovasz": 0.0,
            "lambda_entropy": 0.001 * factor,
            "lambda_entropy_aux": 0.0002 * factor,
            "lambda_adv": 0.001 * factor,
            "lambda_adv_aux": 0.0002 * factor,
            "discriminator_width": 64,
            "discriminator_lr": 1e-4 * (10 if scale == "lr10" else 1),
            "optim": {
                "head_factor": 10.0,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "power": 0.9,
                "train_norm": False,
                "repeat": LITERAL if rule != "dedup" else dict.fromkeys(LITERAL, 1),
                "repeat_decay": "accumulate" if rule == "dup04" else "fresh",
            },
        }
    )


LOSSES = {
    "ce": "loss_seg_src_main",
    "ce_aux": "loss_seg_src_aux",
    "entropy": "loss_ent_main",
    "entropy_aux": "loss_ent_aux",
}


def _players(method: str) -> dict:
    """The generated discriminators of a method."""
    if method != "advent":
        return {}
    keys, discriminator = golden_keys("model_fc_discriminator"), FCDiscriminator()
    return {
        "discriminator": {
            level: load_torch(state_dict(keys, seed_prefix=f"d_{level}."), discriminator)["params"]
            for level in ("main", "aux")
        }
    }


def _check_discriminators(arrays: dict, run: str, states: list, metrics: list) -> None:
    order = ("adv_aux", "adv_main", "d_source_aux", "d_source_main", "d_target_aux", "d_target_main")
    ours = np.array([[row[name] for name in order] for row in metrics])
    np.testing.assert_allclose(ours, arrays[f"{run}_bce_calls_f64"], rtol=1e-6)

    def tensors(state: TrainState) -> dict[str, np.ndarray]:
        return {
            f"d_{level}.{FCDiscriminator().torch_layouts()['sequential'].name(path)}": np.asarray(leaf)
            for level, player in state.params["discriminator"].items()
            for path, leaf in flax.traverse_util.flatten_dict({"params": player}).items()
        }

    first, last = tensors(states[0]), tensors(states[-1])
    keys = golden_keys("train_advent")["disc_keys"]
    assert set(keys) == set(first)
    for name, values in (("disc_l2", last), ("disc_delta_l2", {key: last[key] - first[key] for key in keys})):
        norms = [np.linalg.norm(values[key]) for key in keys]
        np.testing.assert_allclose(norms, arrays[f"{run}_{name}_f64"], rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "file", "run"),
    [
        ("source_only", "train_source", "dedup_lr1"),
        ("source_only", "train_source", "dedup_lr10"),
        ("source_only", "train_source", "dup04_lr1"),
        ("minent", "train_minent", "dedup_lr1"),
        ("minent", "train_minent", "dedup_lam100"),
        ("minent", "train_minent", "dup04_lr10"),
        ("advent", "train_advent", "dedup_lr1"),
        ("advent", "train_advent", "dedup_lam100"),
        ("advent", "train_advent", "dup04_lr10"),
    ],
)
def test_trajectory(method: str, file: str, run: str) -> None:
    arrays, keys = golden(file), golden_keys(file)["param_and_buffer_keys"]
    with jax.enable_x64(True):
        states, metrics = _run(method, _config(run), arrays, players=_players(method))
    run = f"{run}_double"
    if method == "advent":
        _check_discriminators(arrays, run, states, metrics)
    for ours, theirs in LOSSES.items():
        if f"{run}_{theirs}_f64" in arrays:
            np.testing.assert_allclose([row[ours] for row in metrics], arrays[f"{run}_{theirs}_f64"], rtol=1e-6)

    named = [_by_torch_name(s.params["model"], "params") | _by_torch_name(s.batch_stats, "batch_stats") for s in states]
    compared = [i for i, key in enumerate(keys) if not key.endswith("num_batches_tracked")]
    assert {keys[i] for i in compared} == set(named[0])

    def norms(values: dict[str, np.ndarray]) -> np.ndarray:
        return np.array([np.linalg.norm(values[keys[i]]) for i in compared])

    def change(after: int) -> dict[str, np.ndarray]:
        return {key: named[after][key] - named[0][key] for key in named[0]}

    def expect(ours: np.ndarray, name: str, rtol: float) -> None:
        theirs = arrays[f"{run}_{name}_f64"][compared]
        # The movement of a tensor that hardly moves is only known to the rounding of its stored values.
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-9 * theirs.max(), err_msg=name)

    expect(norms(named[-1]), "l2", 1e-6)
    expect(norms(change(1)), "step1_delta_l2", 1e-5)
    expect(norms(change(-1)), "delta_l2", 1e-5)
    np.testing.assert_allclose(
        to_torch(states[-1].params["model"]["backbone"]["conv1"]["kernel"])[:8, :3, :7, :7],
        arrays[f"{run}_conv1_slice"],
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "file"), [("source_only", "train_source"), ("minent", "train_minent"), ("advent", "train_advent")]
)
def test_first_gradients(method: str, file: str) -> None:
    """Without momentum and decay and with a learning rate of 1, the first update is minus the gradient."""
    arrays, keys = golden(file), golden_keys(file)["param_and_buffer_keys"]
    config = _config("dedup_lr1")
    config.lr = 1.0
    config.optim.update({"weight_decay": 0.0, "head_factor": 1.0})
    with jax.enable_x64(True):
        (before, after), _ = _run(method, config, arrays, steps=1, players=_players(method))
    start, end = (_by_torch_name(state.params["model"], "params") for state in (before, after))
    theirs = {
        name: dict(zip(keys, arrays[f"dedup_lr1_double_grad1_{name}_f64"], strict=True)) for name in ("l2", "sum")
    }
    trained = [key for key in start if theirs["l2"][key] != 0]
    assert len(trained) > 20
    assert all(np.array_equal(start[key], end[key]) for key in start if theirs["l2"][key] == 0)
    for name, statistic in (("l2", np.linalg.norm), ("sum", np.sum)):
        expected = np.array([theirs[name][key] for key in trained])
        ours = [statistic(start[key] - end[key]) for key in trained]
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9 * np.abs(expected).max())
