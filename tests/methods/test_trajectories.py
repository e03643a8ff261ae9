"""Five train steps of the reduced network against what the published loops computed in double precision."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden, golden_keys, state_dict
from ml_collections import ConfigDict

from jaxuda import methods
from jaxuda.interop.torch_checkpoint import LAYOUTS, load_torch, to_torch, torch_name
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.discriminator import FCDiscriminator
from jaxuda.optim import make_optimizer
from jaxuda.train_state import TrainState

LITERAL = {"stem": 1, "block": 3, "shortcut": 4}
MODEL = DeepLabV2(19, "resnet101", "caffe", blocks=(1, 1, 1, 1), aux=True, dtype="float64")
DADA_MODEL = DeepLabV2(16, "resnet101", "caffe", blocks=(1, 1, 1, 1), depth=True, dtype="float64")
DISCRIMINATORS = {"advent": ("aux", "main"), "dada": ("main",)}


def _network(method: str) -> DeepLabV2:
    return DADA_MODEL if method == "dada" else MODEL


def _config(method: str, run: str) -> ConfigDict:
    """The settings that a run's name tells: update rule, learning rates, weights of the adaptation terms."""
    rule, scale = (run + "_lr1").split("_")[:2]
    factor = 100.0 if scale == "lam100" else 1.0
    return ConfigDict(
        {
            "lr": 2.5e-4 * (10 if scale == "lr10" else 1),
            "discriminator_lr": 1e-4 * (10 if scale == "lr10" else 1),
            "discriminator_width": 64,
            "schedule_steps": 90_000 if method == "dada" else 250_000,
            "align_corners": True,
            "lambda_aux": 0.1,
            "lambda_lovasz": 0.0,
            "lambda_entropy": 0.001 * factor,
            "lambda_entropy_aux": 0.0002 * factor,
            "lambda_adversarial": 0.001 * factor,
            "lambda_adversarial_aux": 0.0002 * factor,
            "lambda_depth": 0.001 * factor,
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


@functools.cache
def _start(model: DeepLabV2) -> dict:
    """The generated weights of the reduced network, as our variables."""
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 65, 65, 3)))
    flat = flax.traverse_util.flatten_dict(shapes)
    keys = [
        (torch_name(path, model, LAYOUTS["two_level"]), to_torch(np.empty(leaf.shape, bool)).shape)
        for path, leaf in flat.items()
    ]
    return load_torch(state_dict(keys), model)


def _discriminators(method: str, classes: int) -> dict:
    """The generated weights of the method's discriminators, one per level."""
    discriminator = FCDiscriminator(dtype="float64")
    shapes = jax.eval_shape(discriminator.init, jax.random.key(0), jnp.zeros((1, 64, 64, classes)))
    keys = [
        (torch_name(path, discriminator, LAYOUTS["two_level"]), to_torch(np.empty(leaf.shape, bool)).shape)
        for path, leaf in flax.traverse_util.flatten_dict(shapes).items()
    ]
    levels = DISCRIMINATORS[method]
    return {f: load_torch(state_dict(keys, seed_prefix=f"d_{f}."), discriminator)["params"] for f in levels}


def _by_torch_name(tree: dict, collection: str, model: nn.Module = MODEL) -> dict[str, np.ndarray]:
    flat = flax.traverse_util.flatten_dict({collection: tree})
    return {torch_name(p, model, LAYOUTS["two_level"]): np.asarray(leaf, np.float64) for p, leaf in flat.items()}


def _run(method: str, config: ConfigDict, arrays: dict[str, np.ndarray], steps: int = 5) -> tuple[list, list]:
    """States (before the first step and after each) and metrics of each step, in double precision."""
    model = _network(method)
    variables = _start(model)
    params = {"model": variables["params"]}
    if method in DISCRIMINATORS:
        params["discriminator"] = _discriminators(method, model.num_classes)
    params, batch_stats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, variables["batch_stats"]))
    batch = {
        "source": {"image": arrays["src_images"].astype(np.float64), "label": arrays["src_labels"]},
        "target": {"image": arrays.get("trg_images", np.zeros(())).astype(np.float64)},
    }
    if "src_depth" in arrays:
        batch["source"]["depth"] = arrays["src_depth"].astype(np.float64)
    tx = make_optimizer(config)
    states = [TrainState.create(params, tx, batch_stats)]
    step = jax.jit(functools.partial(methods.load(method).train_step, model=model, tx=tx, config=config))
    metrics = []
    for _ in range(steps):
        state, row = step(states[-1], batch, jax.random.key(0))
        states.append(state)
        metrics.append(row)
    return states, metrics


LOSSES = {
    "ce": "loss_seg_src_main",
    "ce_aux": "loss_seg_src_aux",
    "entropy": "loss_ent_main",
    "entropy_aux": "loss_ent_aux",
    "adversarial": "loss_adv_trg_main",
    "adversarial_aux": "loss_adv_trg_aux",
    "depth": "loss_depth_src_main",
}
# Discriminator losses in the order in which the published loops compute them.
BCE_CALLS = {
    "advent": ("adversarial_aux", "adversarial", "d_source_aux", "d_source", "d_target_aux", "d_target"),
    "dada": ("adversarial", "d_source", "d_target"),
}


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
        ("advent", "train_advent", "dup04_lr1"),
        ("advent", "train_advent", "dedup_lam100"),
    ],
)
def test_trajectory(method: str, file: str, run: str) -> None:
    arrays, keys = golden(file), golden_keys(file)["param_and_buffer_keys"]
    with jax.enable_x64(True):
        states, metrics = _run(method, _config(method, run), arrays)
    model = _network(method)
    run = f"{run}_double"
    for ours, theirs in LOSSES.items():
        if f"{run}_{theirs}_f64" in arrays:
            np.testing.assert_allclose([row[ours] for row in metrics], arrays[f"{run}_{theirs}_f64"], rtol=1e-6)

    if method in BCE_CALLS:
        calls = [[row[name] for name in BCE_CALLS[method]] for row in metrics]
        np.testing.assert_allclose(calls, arrays[f"{run}_bce_calls_f64"], rtol=1e-6)

    named = [
        _by_torch_name(s.params["model"], "params", model) | _by_torch_name(s.batch_stats, "batch_stats", model)
        for s in states
    ]
    compared = [i for i, key in enumerate(keys) if not key.endswith("num_batches_tracked")]
    assert {keys[i] for i in compared} == set(named[0])

    def norms(values: dict[str, np.ndarray]) -> np.ndarray:
        return np.array([np.linalg.norm(values[keys[i]]) for i in compared])

    def change(after: int) -> dict[str, np.ndarray]:
        return {key: named[after][key] - named[0][key] for key in named[0]}

    def expect(ours: np.ndarray, name: str, rtol: float) -> None:
        theirs = arrays[f"{run}_{name}_f64"][compared]
        # A tensor that hardly moves is known to the rounding of its stored values only.
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
    if method in DISCRIMINATORS:
        _check_discriminators(method, arrays, run, states)


def _check_discriminators(method: str, arrays: dict, run: str, states: list[TrainState]) -> None:
    def flat(state: TrainState) -> np.ndarray:
        trees = {
            f"d_{level}.{name}": value
            for level, tree in state.params["discriminator"].items()
            for name, value in _by_torch_name(tree, "params", FCDiscriminator()).items()
        }
        return [trees[key] for key in golden_keys(f"train_{method}")["disc_keys"]]

    start, end = flat(states[0]), flat(states[-1])
    change = [b - a for a, b in zip(start, end, strict=True)]
    for name, values in (("disc_l2", end), ("disc_delta_l2", change)):
        ours = [np.linalg.norm(value) for value in values]
        np.testing.assert_allclose(ours, arrays[f"{run}_{name}_f64"], rtol=1e-5, err_msg=name)
    for name, values in (("disc_sum", end), ("disc_delta_sum", change)):
        theirs = arrays[f"{run}_{name}_f64"]
        np.testing.assert_allclose([v.sum() for v in values], theirs, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("method", "file", "run"),
    [
        ("source_only", "train_source", "dedup_lr1"),
        ("minent", "train_minent", "dedup_lr1"),
        ("advent", "train_advent", "dedup_lr1"),
        ("advent", "train_advent", "dedup_lam100"),
    ],
)
def test_first_gradients(method: str, file: str, run: str) -> None:
    """With momentum and decay off and a learning rate of 1, the first update is minus the gradient."""
    arrays, keys = golden(file), golden_keys(file)["param_and_buffer_keys"]
    config, model = _config(method, run), _network(method)
    config.lr = 1.0
    config.optim.update({"weight_decay": 0.0, "head_factor": 1.0})
    with jax.enable_x64(True):
        (before, after), _ = _run(method, config, arrays, steps=1)
    start, end = (_by_torch_name(state.params["model"], "params", model) for state in (before, after))
    theirs = {name: dict(zip(keys, arrays[f"{run}_double_grad1_{name}_f64"], strict=True)) for name in ("l2", "sum")}
    trained = [key for key in start if theirs["l2"][key] != 0]
    assert len(trained) > 20
    assert all(np.array_equal(start[key], end[key]) for key in start if theirs["l2"][key] == 0)
    for name, statistic in (("l2", np.linalg.norm), ("sum", np.sum)):
        expected = np.array([theirs[name][key] for key in trained])
        ours = [statistic(start[key] - end[key]) for key in trained]
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9 * np.abs(expected).max())
