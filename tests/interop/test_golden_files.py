"""The published networks through a real file and the convert command give the logits of the published code.

torch writes the files if it is installed, in both of its formats; otherwise we write them.
"""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_weights import golden, golden_keys, network_input, state_dict

from jaxuda import convert
from jaxuda.inference.restore import restore
from jaxuda.interop.tensor_files import pth_bytes
from jaxuda.models.deeplab_files import PLCA_ORDER

ROOT = Path(__file__).parents[2]
# Golden network -> recipe, and the fields to change; SDCA's last stage has another normalisation.
NETWORKS = {
    "model_advent_r101_multi": ["--config=configs/advent.py:gta5"],
    "model_dada_r101_depth_unit": ["--config=configs/dada.py:synthia"],
    "model_sdca_r101": ["--config=configs/sdca.py:gta5", "--stage=adapt"],
    "model_sdca_vgg16": ["--config=configs/sdca.py:gta5,vgg16"],
    "model_fork_r18": [
        *("--config=configs/advent.py:synthia", "--config.model.backbone=resnet18"),
        *("--config.model.aux=False", "--config.model.dilated=False"),
    ],
    "model_plca_r101": [
        *("--config=configs/advent.py:gta5", "--config.model.aux=False", "--config.model.head_bias=False"),
    ],
    "model_vfmuda_tiny": [
        *("--config=configs/vfmuda.py:gta5", "--config.model.width=48", "--config.model.blocks=(4,)"),
        *("--config.model.heads=3", "--config.model.grid=7"),
    ],
}


def write(path: Path, state: dict, legacy: bool) -> None:
    if importlib.util.find_spec("torch") is None:
        path.write_bytes(pth_bytes(state))
        return
    import torch

    tensors = jax.tree.map(torch.from_numpy, state)
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_golden_logits_through_convert(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    arrays, file = golden(name), tmp_path / "published.pth"
    legacy = name in ("model_sdca_r101", "model_fork_r18")
    write(file, state_dict(golden_keys(name.removesuffix("_unit"))), legacy)
    folder = tmp_path / "converted"
    assert convert.main([str(file), *NETWORKS[name], f"--out={folder}"]) == 0, capsys.readouterr().err
    assert f"--checkpoint {folder} --mode eval" in capsys.readouterr().out

    num_classes = arrays.get("main_logits", arrays.get("logits")).shape[-1]
    assert json.loads((folder / "stage.json").read_text())["identity"]["label_space"].endswith(str(num_classes))
    model, variables, _ = restore(str(folder), num_classes)
    outputs = jax.jit(model.apply)(variables, network_input(arrays))
    expected = arrays.get("main_logits", arrays.get("logits"))
    main = np.asarray(outputs.main)
    if name == "model_plca_r101":
        main = main[..., PLCA_ORDER]  # the file's own order of classes
    assert np.abs(main - expected).max() < 1e-4 * np.abs(expected).max()
    if getattr(model, "aux", False):
        assert np.abs(outputs.aux - arrays["aux_logits"]).max() < 1e-4 * np.abs(arrays["aux_logits"]).max()
