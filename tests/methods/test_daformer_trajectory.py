"""Four steps of DAFormer and of MIC on a tiny network against what the published loop computed in double precision."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_weights import golden, golden_keys, state_dict
from ml_collections import ConfigDict

from jaxuda.interop import load_torch
from jaxuda.interop.torch_checkpoint import to_torch, torch_layouts
from jaxuda.losses.segmentation import IGNORE
from jaxuda.methods import daformer, selftraining
from jaxuda.methods.selftraining import Coins, Teacher
from jaxuda.models import Outputs
from jaxuda.models.layers import BatchNorm, Conv, resize_bilinear
from jaxuda.optimizers import make_optimizer
from jaxuda.training.state import TrainState
from jaxuda.training.step import make_update

STEPS = 4
THINGS = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
_conv = functools.partial(Conv, use_bias=True, dtype="float64")


class Backbone(nn.Module):
    """Three convolutions of stride 2 and two normalisations over the channels of each position."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)
        x = nn.relu(norm(name="norm1")(_conv(12, 3, 2, name="conv1")(x)))
        fine = nn.relu(_conv(20, 3, 2, name="conv2")(x))
        return fine, norm(name="norm2")(_conv(28, 3, 2, name="conv3")(fine))


class Head(nn.Module):
    """Both maps at the size of the finer one, joined and classified."""

    axis_name: str | None

    @nn.compact
    def __call__(self, fine: jax.Array, last: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        joined = jnp.concatenate([fine, resize_bilinear(last, fine.shape[1:3], align_corners=False)], axis=-1)
        fused = Conv(24, 1, dtype="float64", name="fuse")(joined)
        features = nn.relu(BatchNorm(axis_name=self.axis_name, dtype="float64", name="bn")(fused, train))
        return _conv(19, 1, name="conv_seg")(features), features


class Network(nn.Module):
    """The network of the golden files."""

    num_classes: int = 19
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, index: jax.Array | None = None) -> Outputs:
        levels = Backbone(name="backbone")(images)
        main, features = Head(self.axis_name, name="decode_head")(*levels, train)
        return Outputs(main, features, levels=levels)

    def parameter_group(self, path: tuple[str, ...]) -> str:
        if path[0] == "decode_head":
            return "head"
        return "norm" if path[1].startswith("norm") else "block"


MODEL = Network()
NAME = torch_layouts(MODEL)["paths"].name


def variables(prefix: str = "") -> dict:
    """The generated weights of the student ("") or of another network, in double precision."""
    keys = golden_keys("train_daformer")["param_and_buffer_keys"]
    found = load_torch(state_dict(keys, seed_prefix=prefix), MODEL)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), found)


def by_torch_name(params: dict, batch_stats: dict) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path({"params": params, "batch_stats": batch_stats})
    return {NAME(tuple(entry.key for entry in path)): to_torch(np.asarray(leaf)) for path, leaf in flat}


def as_written(number: np.ndarray) -> float:
    """The decimal number that was rounded to single precision."""
    return float(str(number))


def settings(arrays: dict[str, np.ndarray], masks: str) -> ConfigDict:
    """The settings of a run; `masks`: which images are masked, "" for none."""
    optim = {"name": "adamw", "head_factor": 10.0, "weight_decay": 0.01, "power": 1.0, "train_norm": True}
    warmup = {"warmup_steps": int(arrays["warmup_steps"]), "warmup_ratio": as_written(arrays["warmup_ratio"])}
    return ConfigDict(
        {
            "preprocess": "imagenet",
            "lr": as_written(arrays["base_lr"]),
            "schedule_steps": int(arrays["max_steps"]),
            "align_corners": False,
            "lambda_lovasz": 0.0,
            "alpha": as_written(arrays["alpha"]),
            "threshold": as_written(arrays["threshold"]),
            "lambda_features": as_written(arrays["lambda_fd"]),
            "feature_classes": THINGS,
            "feature_ratio": 0.75,
            "ignore_top": int(arrays["ignore_top"]),
            "ignore_bottom": int(arrays["ignore_bottom"]),
            "strength": 0.2,
            "lambda_mask": float(bool(masks)),
            "mask_block": int(arrays.get("block", 1)),
            "mask_ratio": as_written(arrays.get("ratio", np.float32(0))),
            "mask_images": masks,
            "optim": {**optim, "undecayed": ("norm",), **warmup},
        }
    )


def recorded(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What was drawn in each step, as the functions of `selftraining` return or take it."""
    draws = {}
    drawn = np.zeros((*arrays["chosen_classes"].shape[:2], 20), bool)
    for *place, value in [(*at, arrays["chosen_classes"][at]) for at in np.ndindex(arrays["chosen_classes"].shape)]:
        if value >= 0:
            drawn[place[0], place[1], 19 if value == IGNORE else value] = True
    draws["classes"] = drawn
    for name in ("mask_draws", "valid_mask"):
        if name in arrays:
            draws[name] = arrays[name]
    for use in ("mix", "masked"):
        if f"{use}_order" in arrays:
            get = lambda name, use=use: arrays[f"{use}_{name}"]  # noqa: E731
            factors = np.stack([get(name) for name in ("brightness", "contrast", "saturation", "hue")], -1)
            shape = factors.shape[:2]
            order, sigma = get("order"), get("sigma_f64")
            draws[use] = {
                "coins": Coins(get("jitter_on") > 0, get("blur_on") > 0),
                "factors": factors.astype(np.float64),
                "order": np.broadcast_to(order if order.ndim == 3 else order[:, None], (*shape, 4)),
                "sigma": np.broadcast_to(sigma if sigma.ndim == 2 else sigma[:, None], shape),
            }
    return draws


def run(arrays: dict[str, np.ndarray], name: str, masks: str, monkeypatch: pytest.MonkeyPatch) -> tuple:
    """States (before the first step and after each), metrics and pseudo-labels of each step, and the first gradient."""
    config, held = settings(arrays, masks), {}

    def augment(images: jax.Array, keys: Any, preprocess: str, *, per_batch: bool = False, **_: Any) -> jax.Array:
        use = held["draws"].get("masked" if per_batch else "mix")
        return images if use is None else selftraining.augmented(images, preprocess, **use)

    def pseudo_labels(*given: Any) -> tuple:
        held["labels"], *rest = selftraining.pseudo_labels(*given)
        return held["labels"], *rest

    def draw_classes(keys: Any, present: jax.Array) -> jax.Array:
        held["sound"] = jnp.all(held["draws"]["classes"] <= present)
        return held["draws"]["classes"]

    monkeypatch.setattr(daformer, "augment", augment)
    monkeypatch.setattr(daformer, "pseudo_labels", pseudo_labels)
    monkeypatch.setattr(daformer, "draw_classes", draw_classes)
    monkeypatch.setattr(daformer, "block_draws", lambda *_: held["draws"]["mask_draws"])
    if name == "margin":
        monkeypatch.setattr(daformer, "trusted", lambda share, *_: share * held["draws"]["valid_mask"])

    student = variables()
    tx = make_optimizer(config, MODEL)
    constants = {"reference": student if name == "same" else variables("imnet.")}
    teacher = Teacher(jax.tree.map(jnp.zeros_like, student["params"]), variables("teacher.")["batch_stats"])
    teacher = teacher._replace(params=selftraining.follow(teacher.params, student["params"], 0, config.alpha))
    state = TrainState.create({"model": student["params"]}, tx, student["batch_stats"], teacher)

    def step(tx: optax.GradientTransformation, state: TrainState, batch: dict, draws: dict) -> tuple:
        held["draws"] = draws
        after, metrics = make_update(daformer, MODEL, tx, config)(state, constants, 0, batch)
        return after, metrics, held["labels"], held["sound"]

    draws, states, metrics, labels = recorded(arrays), [state], [], []
    compiled = jax.jit(functools.partial(step, tx))
    for k in range(STEPS):
        batch = {
            "source": {"image": arrays["src_images"][k].astype(np.float64), "label": arrays["src_labels"][k]},
            "target": {"image": arrays["trg_images"][k].astype(np.float64)},
        }
        given = (batch, jax.tree.map(lambda x, k=k: x[k], draws))
        if k == 0:
            descent = optax.sgd(1.0)
            down, *_ = jax.jit(functools.partial(step, descent))(
                state.replace(opt_state=descent.init(state.params)), *given
            )
            gradient = jax.tree.map(jnp.subtract, state.params["model"], down.params["model"])
        after, row, found, sound = compiled(states[-1], *given)
        assert sound  # only classes that are present are drawn
        states.append(after)
        metrics.append(row)
        labels.append(found)
    return states, metrics, labels, gradient


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "name", "masks"),
    [
        *(("train_daformer", name, "") for name in ("main", "dacs", "same", "margin", "aug")),
        *(("train_mic", name, "augmented") for name in ("target", "aug")),
        ("train_mic", "both", "separate"),
    ],
)
def test_trajectory(file: str, name: str, masks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {key.removeprefix(f"{name}_"): value for key, value in golden(file).items()}
    keys, buffers = (golden_keys(file)[each] for each in ("param_keys", "param_and_buffer_keys"))
    with jax.enable_x64(True):
        states, metrics, labels, gradient = run(arrays, name, masks, monkeypatch)

    # The published pixel weights, and the colours of augmented images, are rounded to single precision.
    rtol, atol = (2e-6, 1e-6) if name == "aug" else (3e-7, 3e-8)
    np.testing.assert_array_equal(labels, arrays["pseudo_labels"])
    np.testing.assert_allclose([row["share"] for row in metrics], arrays["double_share_f64"], rtol=1e-7)
    terms = {"ce": "src", "ce_mixed": "mix", **({"ce_masked": "masked"} if masks else {})}
    for ours, theirs in terms.items():
        np.testing.assert_allclose(
            [row[ours] for row in metrics], arrays[f"double_loss_{theirs}_f64"], rtol, err_msg=ours
        )
    assert ("feature_distance" in metrics[0]) == (name != "dacs")
    if name != "dacs":
        distances = [as_written(arrays["lambda_fd"]) * row["feature_distance"] for row in metrics]
        np.testing.assert_allclose(distances, arrays["double_loss_fd_f64"], rtol, atol=1e-12)
        assert (distances[0] == 0) == (name == "same")

    def flat(params: dict) -> np.ndarray:
        named = by_torch_name(params, {})
        assert set(named) == set(keys)
        return np.concatenate([named[key].ravel() for key in keys])

    np.testing.assert_allclose(flat(gradient), arrays["double_grad1_flat_f64"], rtol=0, atol=atol)
    np.testing.assert_allclose(flat(states[-1].params["model"]), arrays["double_student_flat_f64"], rtol=0, atol=atol)
    # The files have the teacher as a step uses it, with the statistics that the step has moved.
    np.testing.assert_allclose(flat(states[-2].extra.params), arrays["double_teacher_flat_f64"], rtol=0, atol=atol)
    for whose, stats in (
        ("student", [state.batch_stats for state in states[1:]]),
        ("teacher", [state.extra.batch_stats for state in states[1:]]),
    ):
        for kind in ("mean", "var"):
            ours = [each["decode_head"]["bn"][kind] for each in stats]
            np.testing.assert_allclose(
                ours, arrays[f"double_{whose}_running_{kind}_steps_f64"], rtol, atol, err_msg=f"{whose} {kind}"
            )

    start = by_torch_name(states[0].params["model"], states[0].batch_stats)
    for whose, after in (
        ("student", [(state.params["model"], state.batch_stats) for state in states[1:]]),
        ("teacher", [(old.extra.params, new.extra.batch_stats) for old, new in itertools.pairwise(states)]),
    ):
        begin = start | by_torch_name({}, states[0].extra.batch_stats) if whose == "teacher" else start
        named = [by_torch_name(*each) for each in after]
        for column, (key, _) in enumerate(buffers):
            if key in start:
                change = [np.linalg.norm(each[key] - begin[key]) for each in named]
                theirs = arrays[f"double_{whose}_delta_l2_f64"][:, column]
                np.testing.assert_allclose(change, theirs, rtol=1e-4, atol=10 * atol, err_msg=f"{whose} {key}")
