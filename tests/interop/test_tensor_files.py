"""Files of tensors: those of torch itself, hostile files, corrupt files.

fixtures/*.pth were written by torch 2.6: the weights of `TINY` named as LFASS names them, from
`golden_weights.state_dict`, with a counter of batches.
  torch_zip.pth     torch.save({"epoch": 3, "best": numpy.float64(0.5), "state_dict": {"module." + name: ...}}, path)
  torch_legacy.pth  torch.save(state_dict, path, _use_new_zipfile_serialization=False)
  torch_types.pth   its entries of bn1, weights as bfloat16 and biases as float16; and "transposed",
                    torch.arange(12.).reshape(3, 4).t(), and "part", torch.arange(12.)[4:6]
"""

import contextlib
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import flax
import jax
import numpy as np
import pytest
from golden_weights import state_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxuda.errors import UserError
from jaxuda.interop import load_torch, pickles, read_tensors
from jaxuda.interop.tensor_files import pth_bytes, safetensors_bytes
from jaxuda.interop.torch_checkpoint import to_torch
from jaxuda.models.deeplab import DeepLabV2

FIXTURES = Path(__file__).parent / "fixtures"
TINY = DeepLabV2(3, backbone="resnet18", width=2, blocks=(1, 1, 1, 1), dilated=False)
MAGIC = 0x1950A86A20F9469CFC6C
ARRAYS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([1, -2], np.int64), "c": np.float64([[7]])}


def tiny_state() -> dict[str, np.ndarray]:
    shapes = flax.traverse_util.flatten_dict(jax.eval_shape(TINY.init, jax.random.key(0), np.zeros((1, 32, 32, 3))))
    names = {TINY.torch_layouts()["one_level"].name(path): leaf.shape for path, leaf in shapes.items()}
    return state_dict([[name, to_torch(np.empty(shape)).shape] for name, shape in names.items()])


def legacy_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """A file in the old format, made from the pickle of the new one."""
    with zipfile.ZipFile(io.BytesIO(pth_bytes(arrays))) as archive:
        graph = archive.read("archive/data.pkl")
    heads = [pickle.dumps(v, 2) for v in (MAGIC, 1001, {"little_endian": True})]
    keys = pickle.dumps([str(index) for index in range(len(arrays))], 2)
    numbers = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in arrays.values())
    return b"".join([*heads, graph, keys, numbers])


WRITERS = {"zip": pth_bytes, "legacy": legacy_bytes, "safetensors": safetensors_bytes}


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["torch_zip", "torch_legacy"])
def test_files_of_torch(name: str) -> None:
    expected, prefix = tiny_state(), "state_dict.module." if name == "torch_zip" else ""
    tensors = read_tensors(FIXTURES / f"{name}.pth")
    assert tensors.pop(f"{prefix}bn1.num_batches_tracked") == 0
    assert list(tensors) == [prefix + key for key in expected]
    for key, array in expected.items():
        np.testing.assert_array_equal(tensors[prefix + key], array)
        assert tensors[prefix + key].dtype == np.float32 and not tensors[prefix + key].flags.writeable
    jax.tree.map(np.testing.assert_array_equal, load_torch(FIXTURES / f"{name}.pth", TINY), load_torch(expected, TINY))


def test_types_and_strides_of_torch() -> None:
    expected, tensors = tiny_state(), read_tensors(FIXTURES / "torch_types.pth")
    np.testing.assert_array_equal(tensors.pop("transposed"), np.arange(12.0).reshape(3, 4).T)
    np.testing.assert_array_equal(tensors.pop("part"), [4, 5])
    tensors.pop("bn1.num_batches_tracked")
    assert {array.dtype.name for array in tensors.values()} == {"bfloat16", "float16", "float32"}
    for key, array in tensors.items():
        np.testing.assert_array_equal(array, expected[key].astype(array.dtype))


@pytest.mark.parametrize("kind", WRITERS)
def test_written_files_read_the_same_under_any_name(kind: str, tmp_path: Path) -> None:
    tensors = read_tensors(put(tmp_path / "weights.jpg", WRITERS[kind](ARRAYS)))
    assert tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name], array, strict=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_cut_off_anywhere(kind: str, tmp_path: Path) -> None:
    whole = WRITERS[kind](ARRAYS)
    for length in range(1, len(whole), 7):
        with pytest.raises(UserError, match=r"cut off|corrupt|not a file of weights"):
            read_tensors(put(tmp_path / "weights.pth", whole[:length]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a file of weights"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        (bytes(257) + b"ustar" + bytes(300), "tar archive"),
        (pickle.dumps({"a": 1}, 2), "not one that torch.save wrote"),
        (struct.pack("<Q", 2**40) + b"{} ", "header goes beyond its end"),
        (struct.pack("<Q", 4) + b"{[]]" + bytes(8), "header cannot be read"),
        (struct.pack("<Q", 30_000) + b'{"a":' + b"[" * 29_995, "header cannot be read"),
    ],
)
def test_what_is_no_weights_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_tensors(put(tmp_path / "weights.pth", content))
    assert "weights.pth" in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_other_archives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pth cannot be read: No such file"):
        read_tensors(tmp_path / "none.pth")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_tensors(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(UserError, match=r"no data\.pkl"):
        read_tensors(tmp_path / "other.zip")


class Hostile:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def zipped(graph: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {"data.pkl": graph, "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def hostile_files(graph: bytes) -> list[bytes]:
    heads = b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, {}))
    return [zipped(graph), heads + graph + pickle.dumps([], 2), graph]


@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_pickles_are_refused_and_nothing_runs(protocol: int, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    graph = pickle.dumps({"conv1.weight": Hostile(proof)}, protocol)
    for content in hostile_files(graph):
        with pytest.raises(UserError, match=r"is refused: it asks for posix\.system.*Nothing in it was run"):
            read_tensors(put(tmp_path / "hostile.pth", content))
        assert not proof.exists()
    pickle.loads(graph)
    assert proof.exists(), "the file would not have been hostile"


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", r"asks for builtins\.eval"),
        (b"\x80\x02ctorch\x1b[2J\neval\n.", r"asks for torch\\x1b\[2J"),
        (b"\x80\x02(S'echo'\nios\nsystem\n.", "uses the pickle operation INST"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses the pickle operation NEWOBJ"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls something that is not a function"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "sets attributes"),
        (b"\x80\x02\x82\x01.", "uses the pickle operation EXT1"),
        (b"\x80\x02r\xff\xff\xff\xff.", "corrupt"),  # a memo entry without a value
        (b"\x80\x02X\xff\xff\xff\xffabc.", "corrupt"),  # a text of four gigabytes
        (b"\x80\x02\x8b\xff\xff\xff\x7fabc.", "corrupt"),  # a number of two
        (b"\x80\x02" + b"}" + b"K\x01\x85" * 50 + b"K\x01s.", "corrupt"),  # a nested tuple as a key
        (b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".", "nested without end"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "holds no tensors"),  # contains itself
        (b"\x80\x02" + b"0" * 10 + b".", "uses the pickle operation POP"),
        (b"\x80\x02" + b"N" * 2_100_000 + b".", "longer than any network"),
    ],
)
def test_pickles_that_no_weights_need(graph: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_tensors(put(tmp_path / "weights.pth", zipped(graph)))
    assert "\x1b" not in str(error.value)


def test_text_pickles_of_python_2_are_read() -> None:
    """In such pickles OrderedDicts list their items, and texts are byte strings."""
    graph = b"\x80\x02ccollections\nOrderedDict\n]]U\x01aK\x01ea\x85R}U\x09_metadataNsb."
    graph = graph.replace(b"]]U\x01aK\x01ea", b"]](U\x01aK\x01ea")
    assert pickles.load(io.BytesIO(graph), "file") == {"a": 1}


def tensor_graph(size: str, strides: str, count: int, offset: int = 0) -> bytes:
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuI%d\ntQ" % count
    numbers = b"I%d\n(%st(%st" % (offset, *("".join(f"I{n}\n" for n in eval(t)).encode() for t in (size, strides)))
    return b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89}tRs."


@pytest.mark.parametrize(
    ("size", "strides", "count", "offset"),
    [
        ("(4,)", "(1,)", 1_000_000_000_000, 0),  # a storage that the file has no room for
        ("(4,)", "(1,)", 5, 0),
        ("(5,)", "(1,)", 4, 0),
        ("(1000000000000,)", "(0,)", 4, 0),  # one number a trillion times
        ("(2, 2)", "(3, 1)", 4, 0),
        ("(4,)", "(1,)", 4, 1),
        ("(1,)", "(1,)", 4, -1),
        ("(2,)", "(-1,)", 4, 1),
        ("(2,)", "(1, 1)", 4, 0),
        ("(4,)", "(1,)", -4, 0),
        ("(2,) * 64", "(0,) * 64", 4, 0),
    ],
)
def test_sizes_that_the_file_does_not_hold(size: str, strides: str, count: int, offset: int, tmp_path: Path) -> None:
    fits = zipped(tensor_graph("(2, 2)", "(2, 1)", 4), **{"data/0": np.float32([1, 2, 3, 4]).tobytes()})
    np.testing.assert_array_equal(read_tensors(put(tmp_path / "good.pth", fits))["w"], [[1, 2], [3, 4]])
    content = zipped(tensor_graph(size, strides, count, offset), **{"data/0": bytes(16)})
    tracemalloc.start()
    with pytest.raises(UserError, match=r"weights\.pth is corrupt"):
        read_tensors(put(tmp_path / "weights.pth", content))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F8", "shape": [16], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 16]},
        {"dtype": [], "shape": [4], "data_offsets": [0, 16]},
        [],
    ],
)
def test_safetensors_headers_are_checked(entry, tmp_path: Path) -> None:
    header = json.dumps({"w": entry}).encode()
    with pytest.raises(UserError, match=r"corrupt|not supported"):
        read_tensors(put(tmp_path / "w.safetensors", struct.pack("<Q", len(header)) + header + bytes(16)))


def test_compressed_and_damaged_records_are_refused(tmp_path: Path) -> None:
    bomb = zipped(tensor_graph("(4,)", "(1,)", 4), zipfile.ZIP_DEFLATED, **{"data/0": bytes(2**24)})
    with pytest.raises(UserError, match="is compressed"):
        read_tensors(put(tmp_path / "bomb.pth", bomb))
    content = bytearray(pth_bytes(ARRAYS))
    content[content.index(ARRAYS["b"].tobytes()) + 5] ^= 1
    with pytest.raises(UserError, match=r"checksum of its record archive/data/0 is wrong"):
        read_tensors(put(tmp_path / "flipped.pth", content))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(WRITERS)),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
    cut=st.integers(0, 10**6),
)
def test_changed_bytes_end_in_one_kind_of_error(kind: str, changes: list, cut: int, tmp_path: Path) -> None:
    content = bytearray(WRITERS[kind](ARRAYS))
    for place, replacement in changes:
        place %= len(content)
        content[place : place + len(replacement)] = replacement
    if cut % 4 == 0:
        del content[cut % len(content) :]
    tracemalloc.start()
    try:
        tensors = read_tensors(put(tmp_path / "weights.pth", bytes(content)))
        assert sum(array.size for array in tensors.values()) <= len(content)
    except UserError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 * 2**20


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_pickle(graph: bytes) -> None:
    with contextlib.suppress(UserError):
        pickles.load(io.BytesIO(b"\x80\x02" + graph), "file")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_torch_and_we_read_each_other(options: dict, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tree = {"part": {"w": np.arange(6, dtype=np.float32).reshape(1, 2, 3)}, "n": np.array(3, np.int64)}
    ours = torch.load(put(tmp_path / "ours.pth", pth_bytes(tree)), weights_only=True)
    np.testing.assert_array_equal(ours["part"]["w"].numpy(), tree["part"]["w"], strict=True)
    assert ours["n"].item() == 3
    torch.save(ours, tmp_path / "theirs.pth", **options)
    theirs = read_tensors(tmp_path / "theirs.pth")
    np.testing.assert_array_equal(theirs["part.w"], tree["part"]["w"], strict=True)


def test_the_safetensors_package_and_we_read_each_other(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    theirs = numpy.load_file(put(tmp_path / "ours.safetensors", safetensors_bytes(ARRAYS)))
    numpy.save_file(ARRAYS, tmp_path / "theirs.safetensors")
    ours = read_tensors(tmp_path / "theirs.safetensors")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(theirs[name], array, strict=True)
        np.testing.assert_array_equal(ours[name], array, strict=True)
