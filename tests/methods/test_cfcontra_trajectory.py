"""Three CFContra steps of the reduced network against what the published loop computed in double precision.

Before the first update both compute the same: losses and memories agree to some 1e-8, because of the second 1e-6 in the
published softmax and its single-precision memories. Afterwards the weights differ a little, since two of the four
published gradients mix the memory of the forward pass with one that has already moved. The first update of a tensor
differs by up to 3e-5 of its length if the four terms have their published weight of 0.001, and by up to 2e-3 if it is
0.1: a few per cent of their share. In the losses of the third step this is some 1e-7 and 2e-6.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden, golden_keys, state_dict
from ml_collections import ConfigDict
from trajectories import by_torch_name, run

from jaxuda.artifacts.prototypes import Memories
from jaxuda.interop.torch_checkpoint import from_torch
from jaxuda.methods import Start, cfcontra
from jaxuda.models.deeplab import DeepLabV2

pytestmark = pytest.mark.usefixtures("all_optimizations")

MODEL = DeepLabV2(19, "resnet101", "caffe", blocks=(1, 1, 1, 1), aux=True, dtype="float64")
LAYOUT = "two_level"
ONCE = {"stem": 1, "block": 1, "shortcut": 1}
SHARED = {"ce": "seg_main", "ce_aux": "seg_aux", "entropy": "ent_main", "entropy_aux": "ent_aux"}
CONTRASTS = {"source": "s", "target": "t", "target_to_source": "t2s", "source_to_target": "s2t"}


def _config(name: str, margin: float) -> ConfigDict:
    weight = 0.1 if name == "dedup_lam100" else 0.001
    return ConfigDict(
        {
            "lr": 2.5e-4,
            "schedule_steps": 250_000,
            "align_corners": True,
            "lambda_aux": 0.1,
            "lambda_lovasz": 0.0,
            "lambda_entropy": 0.001,
            "lambda_entropy_aux": 0.0002,
            **{f"lambda_{term}": weight for term in CONTRASTS},
            "projection": "mlp",
            "train_head": False,
            "margin": margin,
            "margin_decay": False,
            "normalise_for_labels": False,
            "temperature": 0.07,
            "momentum": 0.9,
            "optim": {
                "head_factor": 10.0,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "power": 0.9,
                "train_norm": False,
                "repeat": {"stem": 1, "block": 3, "shortcut": 4} if name == "dup17" else ONCE,
                "repeat_decay": "fresh",
            },
        }
    )


def _head() -> dict:
    """The generated projection head; published networks keep its layers at places 0 and 2."""
    shapes = {"weight": [2048, 2048, 1, 1], "bias": [2048]}
    weights = state_dict([[f"head.{place}.{kind}", shape] for place in (0, 2) for kind, shape in shapes.items()])
    return {
        f"linear{index}": {
            "kernel": from_torch(weights[f"head.{place}.weight"]),
            "bias": weights[f"head.{place}.bias"],
        }
        for index, place in enumerate((0, 2))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first_update", "update", "loss", "memory"),
    [
        ("dedup", 4e-5, 4e-5, 1e-7, 1e-8),
        ("dup17", 4e-5, 4e-5, 2e-7, 1e-8),
        ("dedup_lam100", 3e-3, 3e-3, 3e-6, 2e-7),
    ],
)
def test_trajectory(name: str, first_update: float, update: float, loss: float, memory: float) -> None:
    golden_file, keys = golden("train_cfcontra"), golden_keys("train_cfcontra")["param_and_buffer_keys"]
    arrays = {key.removeprefix(f"{name}_double_"): value for key, value in golden_file.items()}
    config = _config(name, float(arrays["threshold"]))
    with jax.enable_x64(True):
        memories = Memories(*(jnp.asarray(arrays[f"{domain}_memory0"], jnp.float64) for domain in ("src", "trg")))
        with mock.patch.object(cfcontra, "init", lambda *_, **__: Start(extra=memories)):
            states, metrics = run(
                "cfcontra", config, arrays, steps=3, model=MODEL, layout=LAYOUT, players={"projection": _head()}
            )

    for ours, theirs in [*SHARED.items(), *((f"contrast_{ours}", f"contra_{t}") for ours, t in CONTRASTS.items())]:
        values, expected = [row[ours] for row in metrics], arrays[f"{theirs}_f64"]
        np.testing.assert_allclose(values[0], expected[0], rtol=3e-8, err_msg=ours)
        np.testing.assert_allclose(values, expected, rtol=loss, err_msg=ours)
    kept = np.mean(arrays["pseudo_labels_steps"] != 255, axis=(1, 2))
    np.testing.assert_allclose([row["pseudo_kept"] for row in metrics], kept, rtol=1e-6)

    for ours, theirs in (("source", "src"), ("target", "trg")):
        moved = np.array([getattr(state.extra, ours)[:, ::16] for state in states[1:]])
        np.testing.assert_allclose(moved[0], arrays[f"{theirs}_memory_steps_every16"][0], atol=1e-8)
        np.testing.assert_allclose(moved, arrays[f"{theirs}_memory_steps_every16"], atol=memory)

    before, after = (states[0].params["projection"], states[-1].params["projection"])
    jax.tree.map(np.testing.assert_array_equal, before, after)
    named = [
        by_torch_name(state.params["model"], "params", MODEL, LAYOUT)
        | by_torch_name(state.batch_stats, "batch_stats", MODEL, LAYOUT)
        for state in states
    ]
    left_out = {key for key in keys if key.endswith("num_batches_tracked") or key.startswith("head.")}
    assert set(keys) - left_out == set(named[0])
    compared = [i for i, key in enumerate(keys) if key in named[0]]
    for step, theirs, rtol in ((1, "step1_delta_l2", first_update), (-1, "delta_l2", update)):
        change = [np.linalg.norm(named[step][keys[i]] - named[0][keys[i]]) for i in compared]
        expected = arrays[f"{theirs}_f64"][compared]
        np.testing.assert_allclose(change, expected, rtol=rtol, atol=1e-9 * expected.max(), err_msg=theirs)
