"""A network in a user's file, used with every method and every command."""

import json
import re
import sys
import types
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
from methods.test_contract import METHODS, assert_close, begin, make_batch, stage_config
from ml_collections import ConfigDict
from plugins.network_recipe import NETWORK

import jaxuda
from configs import common
from jaxuda import convert, parallel
from jaxuda.artifacts.arrays import read_arrays, write_arrays
from jaxuda.cli import INTERRUPTED, MISTAKE, parse
from jaxuda.errors import UserError
from jaxuda.inference.restore import restore
from jaxuda.interop import load_torch
from jaxuda.main import main
from jaxuda.models import abstract_variables, make_model
from jaxuda.pipeline import domains, recipe, stages
from jaxuda.training import checkpoints, loop, weights

ROOT = Path(__file__).parents[2]
RECIPE = "--config=tests/plugins/network_recipe.py"


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    data = tiny.prepare_domains(tmp_path_factory.mktemp("data"))
    places = {"source.path": data["source"], "target.path": data["target"], "data_dir": data["data_dir"]}
    return ["jaxuda", RECIPE, *(f"--config.{field}={place}" for field, place in places.items())]


@pytest.fixture(scope="module")
def work(words: list[str], tmp_path_factory) -> Path:
    """A finished work folder."""
    folder = tmp_path_factory.mktemp("work") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main([*words, f"--workdir={folder}"]) == 0
    return folder


def start(method: str, dtype: str = "float32") -> tuple:
    """See `begin`; on the network here."""
    config = stage_config(method)
    config.model = ConfigDict({**NETWORK, "depth": method == "dada", "dtype": dtype})
    if "discriminator_width" in config:
        config.discriminator_width = 4
    return begin(config)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_on_it(method: str) -> None:
    state, constants, step = start(method)
    compiled = jax.jit(step).lower(state, constants, 0, make_batch()).compile({"xla_backend_optimization_level": 0})
    after, metrics = compiled(state, constants, 0, make_batch())
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params["model"], after.params["model"])
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.slow
def test_devices_and_parts_draw_the_same() -> None:
    """With dropout and drop path, 2 and 8 devices give the same parameters as one; the draws depend on the seed."""
    with jax.enable_x64(True):
        state, constants, step = start("minent", "float64")
        ends = []
        for devices, seed in ((1, 0), (2, 0), (8, 0), (1, 1)):
            chosen = jax.local_devices()[:devices]
            arguments = parallel.replicate(state, chosen), parallel.replicate(constants, chosen)
            moved, _ = parallel.compile_step(step, chosen)(*arguments, seed, parallel.shard(make_batch(), chosen))
            ends.append(parallel.first(moved, chosen))
    one, two, eight, other = ends
    assert_close(two, one, 1e-10)
    assert_close(eight, one, 1e-10)
    with pytest.raises(AssertionError):
        assert_close(other, one, 1e-3)


@pytest.mark.slow
def test_train_and_resume(words: list[str], work: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """A run that is stopped and continued ends with the same weights, with or without dropout."""
    save = loop._Loop._save

    def save_and_stop(self, step: int, *arguments) -> None:
        save(self, step, *arguments)
        if self._task.name == "adapt" and step == 2:
            raise KeyboardInterrupt

    # Another folder, so that the finished stages are not reused.
    line = [*words, f"--workdir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_save", save_and_stop)
        assert main(line) == INTERRUPTED
    assert main(line) == 0
    assert "adapt: continues from step 2" in capsys.readouterr().out
    for network in ("student", "teacher"):
        found = [
            checkpoints.read_variables(folder / "adapt" / "checkpoints", network=network)[0]
            for folder in (work, tmp_path / "run")
        ]
        assert found[0].keys() == found[1].keys()
        for name, array in found[0].items():
            np.testing.assert_array_equal(array, found[1][name], err_msg=name)


def test_eval_predict_load(words: list[str], work: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The evaluated network, which is the teacher, is scored first; the config names the modules, so they may run."""
    adapt = work / "adapt"
    for name in ("plugins.encoder_decoder", "plugins.noisy_teacher"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"model\.name='plugins\.encoder_decoder' is code outside jaxuda"):
        jaxuda.load(str(adapt))
    assert main([*words, "--mode=eval", f"--checkpoint={adapt}"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"adapt \(teacher\)\s+adapt \(student\)", told)
    last = json.loads((adapt / "evaluations.jsonl").read_text().splitlines()[-1])
    student = last["other_networks"]["student"]["miou"]
    scored = re.search(r"mIoU \(3\)\s+([\d.]+)\s+([\d.]+)", told)
    assert [float(x) for x in scored.groups()] == pytest.approx([100 * last["miou"], 100 * student], abs=0.06)

    images = words[3].partition("=")[2] + "/images/val"
    line = [*words, "--mode=predict", f"--checkpoint={adapt}", f"--images={images}", f"--workdir={tmp_path}"]
    assert main(line) == 0
    assert len(list((tmp_path / "predictions" / "ids").iterdir())) == 6

    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    teacher, student = (jaxuda.load(str(adapt), network=network) for network in ("", "student"))
    teachers, students = (restore(str(adapt), network=name)[1] for name in ("teacher", "student"))
    jax.tree.map(np.testing.assert_array_equal, teacher.variables, teachers)
    jax.tree.map(np.testing.assert_array_equal, student.variables, students)
    assert teacher.classes == tiny.CLASSES and teacher.predict(image)[0].shape == (32, 48)
    assert np.any(teacher.predict(image)[1] != student.predict(image)[1])
    with pytest.raises(UserError, match="has no network 'pupil'"):
        jaxuda.load(str(adapt), network="pupil")


@pytest.mark.parametrize("inside", [True, False])
def test_sweeps_take_the_evaluated_network(words: list[str], work: Path, tmp_path: Path, inside: bool, monkeypatch):
    """A stage that labels with the run's own stage, or with one from outside, labels with its teacher."""
    config = parse(words).config
    with config.unlocked():
        init = "adapt" if inside else str(work / "adapt")
        config.rank = common.sweep_stage("entropy_rank", init)
        config.pipeline = ("source_only", "adapt", "rank")
    opened, given = domains.load_domains(config), []
    (*_, rank) = stages.plan(config, work, opened)
    module = types.SimpleNamespace(run=lambda variables, *_, method, **__: given.append((variables, method.__name__)))
    monkeypatch.setattr(recipe.sweeps, "load", lambda name: module)
    log = types.SimpleNamespace(say=print)
    recipe.sweep(rank._replace(folder=tmp_path), config, opened, log)
    ((variables, method),) = given
    assert method == "plugins.noisy_teacher"
    jax.tree.map(np.testing.assert_array_equal, variables, restore(str(work / "adapt"), network="teacher")[1])


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_export_and_import(words: list[str], work: Path, tmp_path: Path, name: str, monkeypatch, capsys) -> None:
    adapt, file = work / "adapt", tmp_path / name
    monkeypatch.delitem(sys.modules, "plugins.encoder_decoder")
    assert convert.main([str(adapt), f"--export={file}"]) == MISTAKE
    assert "a work folder alone must not run it" in capsys.readouterr().err
    assert convert.main([str(adapt), f"--export={file}", RECIPE]) == 0
    model, teacher, _ = restore(str(adapt))
    jax.tree.map(np.testing.assert_array_equal, load_torch(file, model), teacher)

    assert convert.main([str(file), *words[1:], f"--out={tmp_path / 'in'}"]) == 0
    jax.tree.map(np.testing.assert_array_equal, restore(str(tmp_path / "in"))[1], teacher)
    assert convert.main([str(file), *words[1:], "--config.model.width=8", f"--out={tmp_path / 'other'}"]) == MISTAKE
    assert "the fields of config.model (width, depth)" in capsys.readouterr().err


def test_weights_for_other_classes_and_of_other_networks(work: Path) -> None:
    arrays, _ = checkpoints.read_variables(work / "adapt" / "checkpoints")
    zeros = lambda model: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_variables(model, (48, 32)))  # noqa: E731
    model = make_model(NETWORK, 5)
    fitted, notes = weights.fit(arrays, zeros(model), model, "work")
    assert notes == ["head starts anew: the checkpoint's is for 3 classes, this network has 5"]
    kernel = fitted["params"]["decoder"]["join"]["kernel"]
    np.testing.assert_array_equal(kernel, arrays["params.decoder.join.kernel"])
    wider = make_model({**NETWORK, "width": 8}, 3)
    with pytest.raises(UserError, match=r"compare it with the fields of config.model \(width, depth\)"):
        weights.fit(arrays, zeros(wider), wider, "work")
    config = ConfigDict({"model": NETWORK, "preprocess": "imagenet"})
    with pytest.raises(UserError, match=r"no ImageNet weights are known for config\.model\.name=plugins"):
        weights.network_name(config)


def test_artifacts_are_used_with_the_network_that_they_are_of(tmp_path: Path) -> None:
    model, file = make_model(NETWORK, 2), tmp_path / "file.npz"
    write_arrays(file, {"x": np.zeros(2)}, ("a", "b"), (model, 16))
    assert "x" in read_arrays(file, "numbers", ["x"], 2, network=(model, 16))
    with pytest.raises(UserError, match=r"encoder and decoder, width 4.*encoder and decoder, width 8"):
        read_arrays(file, "numbers", ["x"], 2, network=(make_model({**NETWORK, "width": 8}, 2), 16))


@pytest.mark.parametrize("field", ["model", "train"])
def test_a_received_work_folder_runs_no_code(
    words: list[str], work: Path, tmp_path: Path, field: str, monkeypatch, capsys
):
    """No command imports a network or a method that only stage.json names."""
    monkeypatch.syspath_prepend(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile" / "__init__.py").write_text(f"open({str(ran)!r}, 'w')\n")
    (tmp_path / "hostile" / "code.py").write_text("make = passes = None\n")
    folder = tmp_path / "received"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(work / "adapt" / "checkpoints")
    record = json.loads((work / "adapt" / "stage.json").read_text())
    name = {"model": "model.name", "train": "train"}[field]
    if field == "model":
        record["identity"]["model"]["name"] = "hostile.code"
    else:
        record["identity"]["train"] = "hostile.code"
    (folder / "stage.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"{name}='hostile\.code' is code outside jaxuda"):
        jaxuda.load(str(folder))
    images = words[3].partition("=")[2] + "/images/val"
    for more in (["--mode=eval"], ["--mode=predict", f"--images={images}", f"--workdir={tmp_path}"]):
        assert main([*words, *more, f"--checkpoint={folder}"]) == MISTAKE
        assert f"{name}='hostile.code' is code outside jaxuda" in capsys.readouterr().err
    if field == "model":
        assert convert.main([str(folder), f"--export={tmp_path / 'out.pth'}"]) == MISTAKE
    else:  # a sweep that starts from there would take the method's predictions
        with pytest.raises(UserError, match="is code outside jaxuda"):
            stages._trained_with(folder)
    assert not ran.exists() and "hostile" not in sys.modules


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "unet"}, r"unknown model.name='unet'; choose one of: deeplab"),
        ({"name": "plugins.nowhere"}, r"model.name='plugins.nowhere' cannot be imported"),
        ({"name": "plugins.bare"}, r"the network model.name='plugins.bare' lacks num_classes, .*, describe"),
        ({**NETWORK, "layers": 3}, r"config.model does not fit the network 'plugins.encoder_decoder'.*layers"),
    ],
)
def test_mistakes_are_named(fields: dict, message: str, monkeypatch) -> None:
    bare = types.ModuleType("plugins.bare")
    bare.make = lambda fields, num_classes: nn.Dense(num_classes)
    monkeypatch.setitem(sys.modules, "plugins.bare", bare)
    with pytest.raises(UserError, match=message):
        make_model(fields, 3)
