"""Five SDCA steps of the reduced network against what the published loop computed in double precision."""

import jax
import numpy as np
import pytest
from golden_weights import golden, golden_keys
from ml_collections import ConfigDict
from trajectories import by_torch_name, run

from jaxuda.methods.sdca import confident_labels
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.training.state import TrainState

pytestmark = pytest.mark.usefixtures("all_optimizations")

MODEL = DeepLabV2(19, "resnet101", "torchvision", blocks=(1, 1, 1, 1), norm="frozen", norm_eps=0.0, dtype="float64")
LAYOUT = "split"
TERMS = ("features_source", "features_target", "logits_source", "logits_target")


def _config(arrays: dict[str, np.ndarray], name: str) -> ConfigDict:
    return ConfigDict(
        {
            "lr": float(str(arrays[f"{name}_base_lr"])),  # the decimal number that was rounded to single precision
            "schedule_steps": 62_500,
            "align_corners": True,
            "lambda_aux": 0.0,
            "lambda_lovasz": 0.75,
            "lovasz_shrink": 1,
            "lambda_features": 1.0,
            "lambda_logits": 1.0,
            "tau": float(arrays[f"{name}_tau"]),
            "confidence": float(arrays[f"{name}_delta"]),
            "optim": {
                "head_factor": 10.0,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "power": 0.9,
                "train_norm": False,
                "repeat": {"stem": 1, "block": 1, "shortcut": 1},
                "repeat_decay": "fresh",
            },
        }
    )


def _expect(ours: np.ndarray, theirs: np.ndarray, rtol: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "half", "half_tau1", "half_reflr"])
def test_trajectory(name: str) -> None:
    golden_file, keys = golden("train_sdca"), golden_keys("train_sdca")["param_and_buffer_keys"]
    config = _config(golden_file, name)
    arrays = {key.removeprefix(f"{name}_"): value for key, value in golden_file.items()}
    with jax.enable_x64(True):
        states, metrics = run("sdca", config, arrays, model=MODEL, layout=LAYOUT)
        masks = [confident_labels(_target_logits(state, arrays), config.confidence) for state in states[:-1]]

    terms = [[row[term] for term in TERMS] for row in metrics]
    np.testing.assert_allclose(terms, arrays["double_contrast_terms_f64"], rtol=1e-9)
    lovasz = np.array([row["lovasz"] for row in metrics])
    np.testing.assert_allclose(lovasz, arrays["double_loss_lov_f64"], rtol=1e-7)
    supervised = [row["ce"] for row in metrics] + config.lambda_lovasz * lovasz
    np.testing.assert_allclose(supervised, arrays["double_loss_sup_f64"], rtol=2e-7)
    np.testing.assert_array_equal(masks, arrays["trg_mask_steps"])
    shares = np.mean(arrays["trg_mask_steps"] != 255, axis=(1, 2, 3))
    np.testing.assert_allclose([row["confident"] for row in metrics], shares, rtol=1e-12)

    for level, short in (("features", "feat"), ("logits", "out")):
        history = [getattr(state.extra, level) for state in states[1:]]
        for field, theirs in (("mean", "mean"), ("var", "cov")):
            norms = [np.linalg.norm(getattr(stats, field), axis=1) for stats in history]
            _expect(norms, arrays[f"{short}_{theirs}_l2_f64"], 1e-6)
        np.testing.assert_array_equal(history[-1].count, arrays[f"{short}_amount"])
    _expect(states[-1].extra.logits.mean, arrays["out_mean_final"], 1e-5)
    _expect(states[-1].extra.logits.var, arrays["out_cov_final"], 1e-5)

    named = [
        by_torch_name(state.params["model"], "params", MODEL, LAYOUT)
        | by_torch_name(state.batch_stats, "batch_stats", MODEL, LAYOUT)
        for state in states
    ]
    assert {key for key in keys if not key.endswith("num_batches_tracked")} == set(named[0])
    compared = [i for i, key in enumerate(keys) if key in named[0]]
    for after, theirs in ((1, "step1_delta_l2"), (-1, "delta_l2")):
        change = [np.linalg.norm(named[after][keys[i]] - named[0][keys[i]]) for i in compared]
        _expect(change, arrays[f"double_{theirs}_f64"][compared], 1e-7)


def _target_logits(state: TrainState, arrays: dict[str, np.ndarray]) -> jax.Array:
    variables = {"params": state.params["model"], "batch_stats": state.batch_stats}
    return MODEL.apply(variables, arrays["trg_images"].astype(np.float64)).main
