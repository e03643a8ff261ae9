"""Checkpoints are valid, verified, and kept as promised."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxuda.errors import UserError
from jaxuda.training.checkpoints import MANIFEST, Checkpoints, read_variables, unflatten
from jaxuda.training.state import TrainState


@pytest.fixture
def state() -> TrainState:
    params = {"model": {"layer": {"kernel": np.arange(12.0).reshape(3, 4), "bias": np.zeros(4, np.float32)}}}
    stats = {"norm": {"mean": np.ones(4, np.float32)}}
    return jax.device_get(TrainState.create(params, optax.adam(0.1), stats, extra=(np.arange(3),)))


@pytest.fixture
def saved(tmp_path: Path):
    told = []
    checkpoints = Checkpoints(tmp_path, told.append)
    checkpoints.told = told
    yield checkpoints
    checkpoints.close()


def test_round_trip(saved: Checkpoints, state: TrainState) -> None:
    saved.save(7, state)
    restored = saved.restore(7, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert restored.params["model"]["layer"]["kernel"].dtype == state.params["model"]["layer"]["kernel"].dtype


def test_keeps_the_latest_two_and_the_best(saved: Checkpoints, state: TrainState, tmp_path: Path) -> None:
    for step, miou in ((1, 0.2), (2, 0.9), (3, 0.3), (4, None), (5, 0.4)):
        saved.save(step, state, None if miou is None else {"miou": miou})
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 4, 5]
    assert (saved.newest(), saved.best()) == (5, 2)
    assert read_variables(tmp_path)[1] == 5
    assert read_variables(tmp_path, "best")[1] == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "torn manifest"])
def test_damage_is_found(saved: Checkpoints, state: TrainState, tmp_path: Path, damage: str) -> None:
    saved.save(1, state)
    saved.save(2, state)
    folder = tmp_path / "2"
    file = max((f for f in (folder / "default").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 64
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-3])
    elif damage == "remove":
        file.unlink()
    elif damage == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="cannot be used"):
        saved.read(2)
    assert saved.newest() == 1
    assert len(saved.told) == 1 and str(folder) in saved.told[0]
    saved.save(2, state)  # the step can be saved again
    assert saved.newest() == 2


def test_nothing_whole(saved: Checkpoints, state: TrainState, tmp_path: Path) -> None:
    assert saved.newest() is None
    with pytest.raises(UserError, match="no valid checkpoint"):
        read_variables(tmp_path)
    with pytest.raises(UserError, match="its stage has not run"):
        read_variables(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_variables_of_the_model_alone(saved: Checkpoints, state: TrainState, tmp_path: Path) -> None:
    saved.save(1, state)
    arrays, _ = read_variables(tmp_path)
    assert set(arrays) == {"params.layer.kernel", "params.layer.bias", "batch_stats.norm.mean"}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("params", np.nan, r"params\.layer\.kernel has 1 of 12 numbers that are not finite"),
        ("params", np.inf, r"params\.layer\.kernel has 1 of 12 numbers that are not finite"),
        ("batch_stats", np.nan, r"batch_stats\.norm\.var has 1 of 4 numbers that are not finite"),
        ("batch_stats", -1.0, r"batch_stats\.norm\.var has 1 of 4 numbers that are negative"),
    ],
)
def test_weights_that_are_not_finite_are_named(
    saved: Checkpoints, state: TrainState, tmp_path: Path, place: str, value: float, message: str
) -> None:
    """Whoever reads a network reads it here: eval, predict, init, export, `jaxuda.load`."""
    state = state.replace(batch_stats={"norm": {"var": np.ones(4, np.float32)}})
    saved.save(1, state)
    assert read_variables(tmp_path)[0]["batch_stats.norm.var"].tolist() == [1, 1, 1, 1]
    array = state.params["model"]["layer"]["kernel"] if place == "params" else state.batch_stats["norm"]["var"]
    array.flat[-1] = value
    saved.save(2, state)
    with pytest.raises(UserError, match=rf"{tmp_path / '2'} cannot be used: {message}"):
        read_variables(tmp_path)


def test_unfinished_folders_of_killed_runs_are_removed(tmp_path: Path, state: TrainState) -> None:
    code = (
        "import os, sys, orbax.checkpoint as ocp, numpy as np\n"
        "from pathlib import Path\n"
        "from jaxuda.training.checkpoints import Checkpoints\n"
        "saved = Checkpoints(Path(sys.argv[1]))\n"
        "saved.save(1, {'params': {'model': {'w': np.ones(3)}}})\n"
        "ocp.StandardCheckpointHandler.finalize = lambda *_: os._exit(9)\n"
        "saved.save(2, {'params': {'model': {'w': np.ones(3)}}})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1])
    left = [path.name for path in tmp_path.iterdir()]
    assert done.returncode == 9 and any(name.startswith("2.") for name in left), left
    Checkpoints(tmp_path, read_only=True).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left)
    checkpoints = Checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1"] and checkpoints.newest() == 1
    checkpoints.close()


def test_other_network_is_named(state: TrainState) -> None:
    with pytest.raises(UserError, match=r"here: 'b' has shape \(2,\), this network needs \(3,\)"):
        unflatten({"b": np.zeros(2)}, {"b": np.zeros(3)}, "here")
    with pytest.raises(UserError, match="here has no 'b'"):
        unflatten({}, {"b": np.zeros(3)}, "here")


def test_a_checkpoint_of_float16_is_cast(tmp_path: Path) -> None:
    """Optimizer state, steps and keys stay as they are; what was cast is said."""
    said: list[str] = []
    saved = Checkpoints(tmp_path, report=said.append)
    saved.save(1, {"w": np.float16([0.1, 2]), "v": np.float32([3]), "step": np.int64(7)})
    like = {"w": np.zeros(2, np.float32), "v": np.zeros(1, np.float32), "step": np.int32(0)}
    found = saved.restore(1, like)
    saved.close()
    assert found["w"].dtype == np.float32 and found["step"].dtype == np.int64
    np.testing.assert_array_equal(found["w"], np.float16([0.1, 2]))
    assert said == [f"{tmp_path / '1'}: cast 1 arrays from float16 to float32"]


def test_full_disk_while_writing(saved: Checkpoints, state: TrainState, tmp_path: Path, monkeypatch) -> None:
    """The disk fills up after the check: earlier checkpoints stay."""
    saved.save(1, state)

    def fail(*_, **__):
        shutil.copytree(tmp_path / "1", tmp_path / "2.partial")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved._manager, "save", fail)
    with pytest.raises(UserError, match="free some space"):
        saved.save(2, state)
    assert saved.newest() == 1
