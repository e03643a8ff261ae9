"""Mix Transformers and HRDA below every method, on several devices, and in a whole run."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden_weights import random_variables
from methods.test_contract import METHODS, assert_close, stage_config
from ml_collections import ConfigDict

import jaxuda
from jaxuda import convert, methods, parallel
from jaxuda.cli import INTERRUPTED
from jaxuda.inference.restore import restore
from jaxuda.interop import load_torch
from jaxuda.main import main
from jaxuda.models import make_model
from jaxuda.optimizers import make_optimizer
from jaxuda.pipeline import tracing
from jaxuda.pipeline.tracing import abstract_step
from jaxuda.training import loop
from jaxuda.training.start import method_start, new_state
from jaxuda.training.step import make_step, to_float

MIT = {"name": "mix_transformer", "variant": "b0", "width": 8, "blocks": (1, 1, 1, 1), "head_width": 8}
VIEWS = {"crop": (64, 64), "window": (128, 128), "attention_width": 8}
SIZE = (96, 64)  # width, height
CLASSES = 5


def config_of(method: str, **model) -> ConfigDict:
    """The settings of a stage on a small network and images of SIZE."""
    config = stage_config(method)
    config.model = ConfigDict({**MIT, "dtype": "float32", **model})
    config.source.resize = config.target.resize = config.evaluation.size = SIZE
    return config


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "dada"])  # which needs a network with depth
def test_every_method_has_a_step_on_two_views(method: str) -> None:
    config = config_of(method, hrda=VIEWS)
    step, arguments = abstract_step(config, CLASSES, 2, value_and_grad=tracing._without_gradient)
    after, metrics = jax.eval_shape(step, *arguments)
    assert metrics["loss"].shape == ()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), arguments[0])


@pytest.mark.slow
def test_devices_draw_the_same() -> None:
    """Drop path, dropout, the detail view and batch normalisation of HRDA, on 1 and 2 devices."""
    with jax.enable_x64(True):
        config = config_of("source_only", hrda=VIEWS, dtype="float64", drop_path=0.3, dropout=0.3)
        model, method = make_model(config.model, CLASSES), methods.load("source_only")
        tx, rng = make_optimizer(config, model), np.random.default_rng(0)
        image = lambda: rng.integers(0, 256, (4, SIZE[1], SIZE[0], 3), np.uint8)  # noqa: E731
        label = rng.integers(0, CLASSES, (4, 4, 6)).repeat(16, 1).repeat(16, 2).astype(np.uint8)
        batch = {"source": {"image": image(), "label": label}}
        variables = jax.tree.map(jnp.float64, random_variables(model, jnp.zeros((1, 64, 64, 3))))
        given = method_start(method, jax.random.key(1), model, to_float(batch, "imagenet"), config, {}, None, variables)
        state, constants = jax.device_get((new_state(variables, given, tx), given.constants))
        step, ends = make_step(method, model, tx, config), []
        for devices in (1, 2):
            chosen = jax.local_devices()[:devices]
            arguments = parallel.replicate(state, chosen), parallel.replicate(constants, chosen)
            moved, _ = parallel.compile_step(step, chosen)(*arguments, 0, parallel.shard(batch, chosen))
            ends.append(parallel.first(moved, chosen))
    # Constants before batch normalisation change nothing: the gradient of these biases is rounding, which AdamW scales.
    noise = lambda path: all(word in jax.tree_util.keystr(path) for word in ("scale_attention", "embed", "bias"))  # noqa: E731
    kept = [[(path, x) for path, x in jax.tree_util.tree_leaves_with_path(end) if not noise(path)] for end in ends]
    one, two = ({jax.tree_util.keystr(path): x for path, x in leaves} for leaves in kept)
    assert len(one) > 100
    assert_close(two, one, 1e-9)


@pytest.mark.slow
def test_a_run_on_two_views_through_resume_predict_export_and_load(data: dict, tmp_path: Path, monkeypatch) -> None:
    """MIC on HRDA; the run is stopped in the stage that adapts, and continued."""
    folder = tmp_path / "run"
    words = ["jaxuda", "--config=configs/mic.py:folder,hrda", f"--workdir={folder}"]
    fields = {"source.path": data["source"], "target.path": data["target"], "data_dir": data["data_dir"]}
    fields |= dict.fromkeys(("source.resize", "target.resize", "evaluation.size", "model.hrda.window"), SIZE)
    fields |= {"model.hrda.crop": (64, 64), "model.width": 8, "model.blocks": (1, 1, 1, 1), "model.head_width": 8}
    fields |= {"model.hrda.attention_width": 8, "checkpoint_every": 1, "eval_every": 2, "log_every": 1, "devices": 1}
    fields |= {f"{stage}.{field}": 2 for stage in ("source_only", "adapt", "oracle") for field in ("steps", "batch")}
    words += [f"--config.{field}={value}" for field, value in fields.items()]
    save = loop._Loop._save

    def save_and_stop(self, step: int, *arguments) -> None:
        save(self, step, *arguments)
        if self._task.name == "adapt" and step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_save", save_and_stop)
        assert main(words) == INTERRUPTED
    assert main(words) == 0
    images = data["target"] / "images" / "val"
    adapt = folder / "adapt"
    line = ["jaxuda", "--mode=predict", f"--checkpoint={adapt}", f"--images={images}", f"--workdir={tmp_path / 'out'}"]
    assert main(line) == 0 and len(list((tmp_path / "out" / "predictions" / "ids").iterdir())) == 6
    assert convert.main([str(adapt), f"--export={tmp_path / 'out.pth'}"]) == 0
    model, variables, _ = restore(str(adapt))
    jax.tree.map(np.testing.assert_array_equal, load_torch(tmp_path / "out.pth", model), dict(variables))
    labels, scores = jaxuda.load(str(adapt)).predict(tiny_image())
    assert labels.shape == (32, 48) and scores.shape == (32, 48, 3)
    assert set(tiny.CLASSES) == set(jaxuda.load(str(adapt)).classes)


tiny_image = functools.partial(np.full, (32, 48, 3), 90, np.uint8)
