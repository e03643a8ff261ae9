"""Five DADA steps of the reduced network against the published loop in double precision, and DADA's errors."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden, golden_keys, state_dict
from ml_collections import ConfigDict
from trajectories import by_torch_name, run
from updates import begin

from jaxuda.errors import UserError
from jaxuda.interop.torch_checkpoint import load_torch, to_torch
from jaxuda.methods import dada
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.discriminator import FCDiscriminator
from jaxuda.training.state import TrainState

MODEL = DeepLabV2(16, "resnet101", "caffe", blocks=(1, 1, 1, 1), depth=True, dtype="float64")
DISCRIMINATOR = FCDiscriminator()
LITERAL = {"stem": 1, "block": 3, "shortcut": 4}
KEYS = golden_keys("train_dada")
LOSSES = {"ce": "loss_seg_src_main", "depth": "loss_depth_src_main", "adv_main": "loss_adv_trg_main"}


def _config(name: str) -> ConfigDict:
    factor = 100.0 if name.endswith("lam100") else 1.0
    return ConfigDict(
        {
            "lr": 2.5e-4,
            "schedule_steps": 90_000,
            "align_corners": True,
            "lambda_aux": 0.0,
            "lambda_lovasz": 0.0,
            "lambda_depth": 0.001 * factor,
            "lambda_adv": 0.001 * factor,
            "lambda_adv_aux": 0.0,
            "discriminator_width": 64,
            "discriminator_lr": 1e-4,
            "optim": {
                "head_factor": 10.0,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "power": 0.9,
                "train_norm": False,
                "repeat": LITERAL if name.startswith("dup04") else dict.fromkeys(LITERAL, 1),
                "repeat_decay": "accumulate",
            },
        }
    )


def _run(config: ConfigDict, steps: int = 5) -> tuple[list[TrainState], list[dict]]:
    shapes = jax.eval_shape(DISCRIMINATOR.init, jax.random.key(0), jnp.zeros((1, 64, 64, MODEL.num_classes)))
    keys = [
        (_disc_name(path), to_torch(np.empty(leaf.shape, bool)).shape)
        for path, leaf in flax.traverse_util.flatten_dict(shapes).items()
    ]
    player = load_torch(state_dict(keys, seed_prefix="d_main."), DISCRIMINATOR)["params"]
    players = {"discriminator": {"main": player}}
    with jax.enable_x64(True):
        return run("dada", config, golden("train_dada"), steps, model=MODEL, layout="two_level", players=players)


def _disc_name(path: tuple[str, ...]) -> str:
    return DISCRIMINATOR.torch_layouts()["sequential"].name(path)


def _tensors(state: TrainState) -> dict[str, np.ndarray]:
    named = functools.partial(by_torch_name, model=MODEL, layout="two_level")
    player = flax.traverse_util.flatten_dict({"params": state.params["discriminator"]["main"]})
    return (
        named(state.params["model"], "params")
        | named(state.batch_stats, "batch_stats")
        | {f"d_main.{_disc_name(path)}": np.asarray(leaf) for path, leaf in player.items()}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dedup", "dup04", "dedup_lam100"])
def test_trajectory(name: str) -> None:
    arrays = golden("train_dada")
    states, metrics = _run(_config(name))
    for ours, theirs in LOSSES.items():
        expected = arrays[f"{name}_double_{theirs}_f64"]
        np.testing.assert_allclose([row[ours] for row in metrics], expected, rtol=1e-6, err_msg=theirs)
    calls = [[row[f"{term}_main"] for term in ("adv", "d_source", "d_target")] for row in metrics]
    np.testing.assert_allclose(calls, arrays[f"{name}_double_bce_calls_f64"], rtol=1e-6)

    start, first, last = (_tensors(states[index]) for index in (0, 1, -1))
    keys = [key for key in KEYS["param_and_buffer_keys"] if not key.endswith("num_batches_tracked")]
    places = [KEYS["param_and_buffer_keys"].index(key) for key in keys]
    assert {*keys, *KEYS["disc_keys"]} == set(start)

    def expect(values: dict[str, np.ndarray], quantity: str, rtol: float) -> None:
        of_player = quantity.startswith("disc_")
        theirs = arrays[f"{name}_double_{quantity}_f64"]
        theirs = theirs if of_player else theirs[places]
        ours = [np.linalg.norm(values[key]) for key in (KEYS["disc_keys"] if of_player else keys)]
        # The movement of a tensor that hardly moves is only known to the rounding of its stored values.
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-9 * theirs.max(), err_msg=quantity)

    expect(last, "l2", 1e-6)
    expect({key: first[key] - start[key] for key in start}, "step1_delta_l2", 1e-5)
    expect({key: last[key] - start[key] for key in start}, "delta_l2", 1e-5)
    expect(last, "disc_l2", 1e-6)
    expect({key: last[key] - start[key] for key in start}, "disc_delta_l2", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dedup", "dedup_lam100"])
def test_first_gradients(name: str) -> None:
    """Without momentum and decay and with a learning rate of 1, the first update is minus the gradient."""
    arrays, config = golden("train_dada"), _config(name)
    config.lr = 1.0
    config.optim.update({"weight_decay": 0.0, "head_factor": 1.0})
    (before, after), _ = _run(config, steps=1)
    start, end = _tensors(before), _tensors(after)
    for quantity, statistic in (("l2", np.linalg.norm), ("sum", np.sum)):
        theirs = dict(zip(KEYS["param_and_buffer_keys"], arrays[f"{name}_double_grad1_{quantity}_f64"], strict=True))
        trained = [key for key in theirs if key in start and "running" not in key and ".bn" not in f".{key}"]
        trained = [key for key in trained if "downsample.1" not in key]
        expected = np.array([theirs[key] for key in trained])
        ours = [statistic(start[key] - end[key]) for key in trained]
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9 * np.abs(expected).max(), err_msg=quantity)


def test_source_without_depth_is_named() -> None:
    batch = {domain: {"image": np.zeros((1, 32, 48, 3))} for domain in ("source", "target")}
    with pytest.raises(UserError, match="this source has no depth"):
        begin(dada, MODEL, _config("dedup"), batch)
    batch["source"]["depth"] = np.zeros((1, 32, 48))
    with pytest.raises(UserError, match=r"model\.depth=True"):
        begin(dada, MODEL.clone(depth=False), _config("dedup"), batch)
