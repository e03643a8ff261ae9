"""Checkpoints are valid, verified, and kept as promised."""

import shutil
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


def test_other_network_is_named(state: TrainState) -> None:
    with pytest.raises(UserError, match=r"here: 'b' has shape \(2,\), this network needs \(3,\)"):
        unflatten({"b": np.zeros(2)}, {"b": np.zeros(3)}, "here")
    with pytest.raises(UserError, match="here has no 'b'"):
        unflatten({}, {"b": np.zeros(3)}, "here")


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
