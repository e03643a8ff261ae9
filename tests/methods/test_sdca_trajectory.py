"""Five SDCA steps of the reduced network against what the published loop computed in double precision."""

import jax
import numpy as np
import pytest
from golden_weights import golden, golden_keys
from ml_collections import ConfigDict
from trajectories import by_torch_name, run

from jaxuda.methods.sdca import confident_labels
from jaxuda.models.deeplab import DeepLabV2

MODEL = DeepLabV2(
    19, "resnet101", "torchvision", blocks=(1, 1, 1, 1), norm="frozen", norm_eps=0.0, dtype="float64"
)
LAYOUT = "split"
TERMS = ("features_source", "features_target", "logits_source", "logits_target")


def _config(arrays: dict[str, np.ndarray], name: str) -> ConfigDict:
    return ConfigDict(
        {
            "lr": float(arrays[f"{name}_base_lr"]),
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


@pytest.mark.parametrize("name", ["all", "half", "half_tau1", "half_reflr"])
def test_trajectory(name: str) -> None:
    arrays, keys = golden("train_sdca"), golden_keys("train_sdca")["param_and_buffer_keys"]
    with jax.enable_x64(True):
        states, metrics = run("sdca", _config(arrays, name), arrays, model=MODEL, layout=LAYOUT)
    name = f"{name}_double"
    for i, k in enumerate(TERMS):
        print(k, np.abs(np.array([r[k] for r in metrics]) / arrays[f"{name}_contrast_terms_f64"][:, i] - 1))
    for o, t in (("ce", "sup"), ("lovasz", "lov")):
        print(o, np.abs(np.array([r[o] for r in metrics]) / arrays[f"{name}_loss_{t}_f64"] - 1))
    for level, short in (("features", "feat"), ("logits", "out")):
        for field, s in (("mean", "mean"), ("var", "cov")):
            ours = np.array([np.linalg.norm(getattr(getattr(st.extra, level), field), axis=1) for st in states[1:]])
            theirs = arrays[f"{name}_{short}_{s}_l2_f64"]
            print(level, field, np.max(np.abs(ours - theirs) / theirs.max(), axis=1))
        print(np.array_equal(getattr(states[-1].extra, level).count, arrays[f"{name}_{short}_amount"]))
    named = [
        by_torch_name(s.params["model"], "params", MODEL, LAYOUT)
        | by_torch_name(s.batch_stats, "batch_stats", MODEL, LAYOUT)
        for s in states
    ]
    compared = [i for i, key in enumerate(keys) if not key.endswith("num_batches_tracked")]
    print(len(compared), {keys[i] for i in compared} ^ set(named[0]))
    def change(a):
        return np.array([np.linalg.norm(named[a][keys[i]] - named[0][keys[i]]) for i in compared])
    for a, n in ((1, "step1_delta_l2"), (-1, "delta_l2")):
        t = arrays[f"{name}_{n}_f64"][compared]
        e = np.abs(change(a) - t)
        print(n, e.max() / t.max(), (e / np.maximum(t, 1e-300))[t > 0].max(), t.min(), t.max())
