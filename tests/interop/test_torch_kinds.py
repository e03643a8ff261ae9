"""Every kind of storage and of value that torch writes: read as torch reads it, or named with what to do."""

import argparse
import collections
import datetime
import pathlib

import jax
import numpy as np
import pytest
from golden_weights import random_variables

from jaxuda.errors import UserError
from jaxuda.interop import load_torch, read_tensors, save_torch
from jaxuda.models.deeplab import DeepLabV2

torch = pytest.importorskip("torch")

MODEL = DeepLabV2(3, backbone="resnet18", variant="torchvision", width=2, blocks=(1, 1, 1, 1))
WRITERS = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "protocol 3": {"pickle_protocol": 3},
    "protocol 4": {"pickle_protocol": 4},
    "protocol 5": {"pickle_protocol": 5},
}


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict:
    """A state dict of `MODEL`, with torch's names and in torch's tensors."""
    variables = random_variables(MODEL, np.zeros((1, 32, 32, 3), np.float32))
    file = tmp_path_factory.mktemp("state") / "state.pth"
    save_torch(variables, MODEL, file, "one_level")
    return torch.load(file, weights_only=True)


def seen_through(view, state: dict) -> dict:
    return {name: view(tensor) for name, tensor in state.items()}


def wide(tensor):
    """A tensor that is every third number of a larger storage, with an offset."""
    large = torch.full((tensor.numel() * 3 + 5,), 7.0)
    part = large[5::3][: tensor.numel()].view(tensor.shape) if tensor.ndim < 2 else large[5:].as_strided(
        tensor.shape, [3 * step for step in tensor.stride()]
    )  # fmt: skip
    return part.copy_(tensor)


def reversed_axes(tensor):
    axes = tuple(range(tensor.ndim))[::-1]
    return tensor.permute(axes).contiguous().permute(axes)


def negated(tensor):
    """Its storage holds -x, and torch's negative bit is set."""
    view = torch._neg_view(-tensor)
    assert view.is_neg()
    return view


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def with_attribute(tensor):
    parameter = torch.nn.Parameter(tensor.clone())
    parameter.note = "x"
    return parameter


VIEWS = {
    "plain": lambda tensor: tensor,
    "strided": wide,
    "transposed": reversed_axes,
    "channels_last": channels_last,
    "negative bit": negated,
    "half": lambda tensor: tensor.half(),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "double": lambda tensor: tensor.double(),
    "parameter": torch.nn.Parameter,
    "attribute": with_attribute,
    "buffer": getattr(torch.nn, "Buffer", torch.nn.Parameter),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("view", VIEWS)
def test_network_of_any_storage(state: dict, view: str, writer: str, tmp_path) -> None:
    seen = seen_through(VIEWS[view], state)
    torch.save(seen, tmp_path / "w.pth", **WRITERS[writer])
    tensors = read_tensors(tmp_path / "w.pth")
    assert list(tensors) == list(state)
    for name, tensor in seen.items():
        expected = tensor.detach().clone()
        assert tensors[name].dtype.name == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(tensors[name].astype(np.float64), expected.double().numpy(), strict=True)
        if view not in ("half", "bfloat16"):
            np.testing.assert_array_equal(tensors[name], state[name].numpy())
    if writer == "zip":
        found = load_torch(tmp_path / "w.pth", MODEL)["params"]["head"]["kernel2"]
        expected = seen["layer5.conv2d_list.2.weight"].detach().clone().float().numpy()
        np.testing.assert_array_equal(found, expected.transpose(2, 3, 1, 0), strict=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_types_shapes_and_signs(writer: str, tmp_path) -> None:
    numbers = torch.arange(6.0).reshape(2, 3)
    types = ["float16", "bfloat16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"]
    types += ["uint16", "uint32", "uint64"]
    tree = {name: numbers.to(getattr(torch, name)) for name in types}
    tree |= {"empty": torch.zeros(0, 3), "hole": torch.zeros(2, 0, 3), "scalar": torch.tensor(2.5)}
    tree |= {"expanded": torch.tensor([[1.0], [2.0]]).expand(2, 1000), "one": torch.tensor(3.0).expand(4, 5, 6)}
    tree |= {"imag": torch.complex(numbers, numbers + 1).conj().imag, "part": numbers[1, 1:]}
    assert tree["imag"].is_neg()
    torch.save(tree, tmp_path / "w.pth", **WRITERS[writer])
    tensors = read_tensors(tmp_path / "w.pth")
    for name in types:
        assert tensors[name].dtype.name == name
        np.testing.assert_array_equal(tensors[name].astype(np.float64), numbers.to(tree[name].dtype).double().numpy())
    assert tensors["empty"].shape == (0, 3) and tensors["hole"].shape == (2, 0, 3) and tensors["scalar"] == 2.5
    np.testing.assert_array_equal(tensors["expanded"], tree["expanded"].numpy(), strict=True)
    np.testing.assert_array_equal(tensors["one"], np.full((4, 5, 6), 3, np.float32), strict=True)
    np.testing.assert_array_equal(tensors["imag"], -(numbers + 1).numpy(), strict=True)
    np.testing.assert_array_equal(tensors["part"], [4, 5])


def lightning(state: dict) -> dict:
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.5",
        "state_dict": collections.OrderedDict((f"net.{name}", tensor) for name, tensor in state.items()),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'mode': 'min'}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"betas": (0.9, 0.99)}]}],
        "lr_schedulers": [{"milestones": collections.Counter([3])}],
        "hyper_parameters": {"args": argparse.Namespace(lr=1), "root": pathlib.PurePosixPath("x")},
    }


def compiled(state: dict) -> dict:
    return {f"_orig_mod.{name.replace('layer1.', 'layer1._orig_mod.')}": tensor for name, tensor in state.items()}


def averaged(state: dict) -> dict:
    return {"n_averaged": torch.tensor(3), **{f"module.{name}": tensor for name, tensor in state.items()}}


def training(state: dict) -> dict:
    return {
        "model": state,
        "epoch": torch.tensor(3),
        "scaler": {"scale": torch.tensor(2.0), "_growth_tracker": torch.tensor([1, 2])},
        "optimizer": {"momentum": {name: torch.zeros_like(tensor) for name, tensor in state.items()}},
    }


def twice(state: dict) -> dict:
    """A module that is registered under two names."""
    return {f"{place}.{name}": tensor for place in ("net", "network") for name, tensor in state.items()}


TREES = {
    "tuple": lambda state: (state, 3),
    "nested lists": lambda state: [[1.5, [state]]],
    "data parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    **{function.__name__: function for function in (lightning, compiled, averaged, training, twice)},
}


@pytest.mark.parametrize("writer", ["zip", "legacy"])
@pytest.mark.parametrize("tree", TREES)
def test_single_networks_in_wrappers_are_found(state: dict, tree: str, writer: str, tmp_path) -> None:
    torch.save(TREES[tree](state), tmp_path / "w.pth", **WRITERS[writer])
    expected = load_torch({name: tensor.numpy() for name, tensor in state.items()}, MODEL)
    jax.tree.map(np.testing.assert_array_equal, load_torch(tmp_path / "w.pth", MODEL), expected)


ODD = {
    "set": {1, 2},
    "frozenset": frozenset([1]),
    "complex number": 1j,
    "bytes": [b"x", bytearray(b"y"), 10**60, slice(1), range(3), int],
    "settings": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a")),
    "collections": [collections.Counter("ab"), collections.deque([1]), collections.defaultdict(list, a=[1])],
    "time": datetime.datetime(2020, 1, 1),
    "torch": [torch.float32, torch.float8_e5m2, torch.strided, torch.per_tensor_affine, torch.device("cpu")],
    "array": [np.arange(3), np.float32(1), np.array(["a", None], object)],
    "keys": {None: 1, 1.5: 2, ("a", 0): 3, True: 4},
    "uint16": torch.ones(2, dtype=torch.uint16),
    "fp8": torch.ones(2).to(torch.float8_e4m3fn),
    "complex": torch.ones(2, dtype=torch.complex64).conj(),
    "sparse": torch.eye(2).to_sparse(),
    "csr": torch.eye(2).to_sparse_csr(),
    "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "per channel": torch.quantize_per_channel(torch.ones(2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
    "meta": torch.ones(2, device="meta"),
    "storage": torch.ones(2).untyped_storage(),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("odd", ODD)
def test_one_odd_entry_does_not_refuse_the_others(odd: str, writer: str, tmp_path) -> None:
    weights = {"first": torch.arange(3.0), "last": torch.arange(4.0)}
    torch.save(
        {"first": weights["first"], "odd": ODD[odd], "last": weights["last"]}, tmp_path / "w.pth", **WRITERS[writer]
    )
    tensors = read_tensors(tmp_path / "w.pth")
    assert set(tensors) - {"odd"} == {"first", "last"}
    for name, tensor in weights.items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy(), strict=True)


ADVICE = {
    "meta": (lambda t: t.to("meta"), "no numbers|without numbers.*load the weights into the network"),
    "sparse": (lambda t: t.to_sparse(), r"sparse tensor.*to_dense\(\)"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), r"quantised.*dequantize\(\)"),
    "fp8": (lambda t: t.to(torch.float8_e4m3fn), r"float8_e4m3fn.*float\(\)"),
    "uint16": (lambda t: t.abs().to(torch.uint16), r"uint16.*float\(\)"),
    "int8": (lambda t: t.to(torch.int8), r"int8.*float\(\)"),
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
}


@pytest.mark.parametrize("writer", ["zip", "legacy"])
@pytest.mark.parametrize("kind", ADVICE)
@pytest.mark.parametrize("all_of_them", [True, False])
def test_weights_that_are_no_plain_numbers_get_advice(state, kind, writer, all_of_them, tmp_path) -> None:
    change, advice = ADVICE[kind]
    changed = {n: change(t) if all_of_them or n == "layer1.0.conv1.weight" else t for n, t in state.items()}
    torch.save(changed, tmp_path / "w.pth", **WRITERS[writer])
    with pytest.raises(UserError, match=advice) as error:
        load_torch(tmp_path / "w.pth", MODEL)
    assert (next(iter(state)) if all_of_them else "layer1.0.conv1.weight") in str(error.value)
    assert "w.pth" in str(error.value)


def test_files_without_checksums(state: dict, tmp_path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    for name, array in read_tensors(tmp_path / "w.pth").items():
        np.testing.assert_array_equal(array, state[name].numpy())
