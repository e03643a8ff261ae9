"""Convert reads and writes CFContra's projection head, which its published files hold beside the network."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from golden_weights import golden_keys, random_variables, state_dict

from jaxuda import convert
from jaxuda.cli import MISTAKE
from jaxuda.interop import read_tensors, save_torch
from jaxuda.interop.tensor_files import pth_bytes
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.heads import ProjectionHead
from jaxuda.training import checkpoints

ROOT = Path(__file__).parents[2]
CHANNELS = 64
MODEL = DeepLabV2(19, "resnet18", "caffe", width=8, aux=True)
WORDS = ["--config=configs/cfcontra.py:gta5", "--config.model.backbone=resnet18", "--config.model.width=8"]


def head(axes: int) -> dict[str, np.ndarray]:
    """Its entries, by their published names; the layers are convolutions (4 axes) or linear (2 axes)."""
    shapes = {"weight": [CHANNELS, CHANNELS, 1, 1][:axes], "bias": [CHANNELS]}
    state = state_dict([[f"head.{place}.{kind}", shape] for place in (0, 2) for kind, shape in shapes.items()])
    names = golden_keys("train_cfcontra")["param_and_buffer_keys"]
    assert set(state) == {name for name in names if name.startswith("head.")}
    return state


def write(path: Path, state: dict[str, np.ndarray]) -> Path:
    if importlib.util.find_spec("torch"):
        import torch

        torch.save({name: torch.tensor(array) for name, array in state.items()}, path)
    else:
        path.write_bytes(pth_bytes(state))
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> dict[str, np.ndarray]:
    file = tmp_path_factory.mktemp("network") / "network.pth"
    save_torch(random_variables(MODEL, np.zeros((1, 32, 32, 3), np.float32)), MODEL, file)
    return read_tensors(file)


@pytest.mark.parametrize("axes", [4, 2])
def test_in_and_out_again(network: dict, axes: int, tmp_path: Path, capsys) -> None:
    state = network | head(axes)
    file = write(tmp_path / "cfcontra.pth", {f"module.{name}": array for name, array in state.items()})
    assert convert.main([str(file), *WORDS, f"--out={tmp_path / 'in'}"]) == 0
    told = capsys.readouterr().out
    assert "with a projection head" in told and "not used" not in told and f"taken:    {len(state)} tensors" in told

    saved = checkpoints.Checkpoints(tmp_path / "in" / "checkpoints", read_only=True)
    arrays = saved.read(0)
    saved.close()
    params = {
        f"linear{index}": {leaf: arrays[f"params.projection.linear{index}.{leaf}"] for leaf in ("kernel", "bias")}
        for index in (0, 1)
    }
    features = np.random.default_rng(0).normal(size=(1, 2, 3, CHANNELS)).astype(np.float32)
    first, second = (state[f"head.{place}.weight"].reshape(CHANNELS, CHANNELS) for place in (0, 2))
    hidden = np.maximum(features @ first.T + state["head.0.bias"], 0)
    expected = hidden @ second.T + state["head.2.bias"]
    np.testing.assert_allclose(ProjectionHead().apply({"params": params}, features), expected, rtol=1e-4, atol=1e-5)

    for name in ("out.pth", "out.safetensors"):
        assert convert.main([str(tmp_path / "in"), f"--export={tmp_path / name}"]) == 0
        again = read_tensors(tmp_path / name)
        assert again.keys() == state.keys()
        for key, array in (network | head(4)).items():
            np.testing.assert_array_equal(again[key], array)


def test_torch_takes_it(network: dict, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = write(tmp_path / "cfcontra.pth", network | head(4))
    assert convert.main([str(file), *WORDS, f"--out={tmp_path / 'in'}"]) == 0
    assert convert.main([str(tmp_path / "in"), f"--export={tmp_path / 'out.pth'}"]) == 0
    layers = [torch.nn.Conv2d(CHANNELS, CHANNELS, 1), torch.nn.ReLU(), torch.nn.Conv2d(CHANNELS, CHANNELS, 1)]
    module = torch.nn.Sequential(*layers)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    module.load_state_dict({k.removeprefix("head."): v for k, v in written.items() if k.startswith("head.")})
    np.testing.assert_array_equal(module[2].weight.detach().numpy(), head(4)["head.2.weight"])


def test_heads_that_do_not_fit_or_are_not_there(network: dict, tmp_path: Path, capsys) -> None:
    state = head(4) | {"head.2.bias": np.zeros(3, np.float32)}
    del state["head.0.bias"]
    file = write(tmp_path / "broken.pth", network | state)
    assert convert.main([str(file), *WORDS, f"--out={tmp_path / 'in'}"]) == MISTAKE
    message = capsys.readouterr().err
    assert "missing: head.0.bias" in message
    assert "shape of head.2.bias: (3,) in the checkpoint, (64,) in the network" in message
    assert not (tmp_path / "in").exists()

    assert convert.main([str(write(tmp_path / "bare.pth", network)), *WORDS, f"--out={tmp_path / 'in'}"]) == 0
    assert "without a projection head" in capsys.readouterr().out
    # A network of another method lacks it, which is reported.
    other = ["--config=configs/minent.py:gta5", *WORDS[1:], f"--out={tmp_path / 'other'}"]
    assert convert.main([str(write(tmp_path / "whole.pth", network | head(4))), *other]) == 0
    assert "not used: 4: head.0.weight" in capsys.readouterr().out
