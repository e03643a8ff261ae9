"""Every file of a user is read or ends in a `UserError`, with bounded memory: mutated files, hostile names.

`--examples 2000` tries that many of each kind instead of the usual few.
"""

import contextlib
import io
import json
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxuda import files, prepare
from jaxuda.artifacts import arrays
from jaxuda.cli import MISTAKE
from jaxuda.data import encoding, labels, prepared, records
from jaxuda.data.datasets.folder import Folder, read_classes
from jaxuda.data.pseudo import PseudoLabelled, write_pseudo_label
from jaxuda.errors import UserError
from jaxuda.interop import read_tensors
from jaxuda.interop.tensor_files import pth_bytes, safetensors_bytes
from jaxuda.pipeline import stages
from jaxuda.sweeps.predict import ImageFiles, write_predictions

MEGABYTES = 2**20


@pytest.fixture
def examples(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--examples")


@contextlib.contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Python and NumPy may not hold more than `limit` bytes at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, removed, repeated or cut off; half of the places are in the first 200 bytes."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(min(len(data), 200) if rng.random() < 0.5 else len(data)))
        length = int(rng.integers(1, 9))
        how = rng.integers(5)
        if how == 0:
            data[place : place + length] = rng.bytes(length)
        elif how == 1:
            del data[place : place + length]
        elif how == 2:
            data[place:place] = data[place : place + length]
        elif how == 3:
            data[place] = rng.choice([0, 1, 127, 128, 255])
        elif rng.random() < 0.3:
            del data[max(1, place) :]
        if not data:
            return b"\0"
    return bytes(data)


# Images


def pictures() -> dict[str, bytes]:
    """Small files of every kind that users have."""
    rng = np.random.default_rng(0)
    grey, rgb = rng.integers(0, 256, (9, 14), np.uint8), rng.integers(0, 256, (9, 14, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6

    def saved(image: Image.Image, kind: str, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    colour = Image.fromarray(rgb)
    return {
        "png": saved(colour, "PNG"),
        "grey": saved(Image.fromarray(grey), "PNG"),
        "palette": encoding.encode_indexed(grey % 3, np.eye(3, dtype=np.uint8) * 200),
        "alpha": saved(colour.convert("RGBA"), "PNG"),
        "grey alpha": saved(Image.fromarray(grey).convert("LA"), "PNG"),
        "16 bit": cv2.imencode(".png", rng.integers(0, 2**16, (9, 14, 3), np.uint16))[1].tobytes(),
        "one bit": saved(Image.fromarray(grey).convert("1"), "PNG"),
        "png turned": saved(colour, "PNG", exif=exif),
        "jpeg": saved(colour, "JPEG"),
        "progressive": saved(colour, "JPEG", progressive=True),
        "cmyk": saved(colour.convert("CMYK"), "JPEG"),
        "jpeg turned": saved(colour, "JPEG", exif=exif),
        "one pixel": saved(colour.crop((0, 0, 1, 1)), "PNG"),
        "one pixel jpeg": saved(colour.crop((0, 0, 1, 1)), "JPEG"),
        "wide": saved(Image.new("RGB", (20_000, 2)), "PNG"),
        "wide jpeg": saved(Image.new("RGB", (20_000, 2)), "JPEG"),
    }


PICTURES = pictures()
READERS = (encoding.read_image_file, encoding.store_label, encoding.store_depth, encoding.read_label_file)


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_of_image_is_read_at_its_upright_size(kind: str) -> None:
    image = encoding.read_image_file(PICTURES[kind])
    width, height = {"one pixel": (1, 1), "wide": (20_000, 2)}.get(kind.removesuffix(" jpeg"), (14, 9))
    expected = (width, height) if "turned" in kind else (height, width)
    assert image.shape == (*expected, 3) and image.dtype == np.uint8
    assert encoding.check_image(PICTURES[kind]) == expected


def test_an_image_of_huge_size_in_a_small_file_is_not_decoded() -> None:
    flat = np.zeros((20_000, 4_500), np.uint8)
    png, jpeg = (cv2.imencode(kind, flat)[1].tobytes() for kind in (".png", ".jpg"))
    del flat
    declared = bytearray(PICTURES["png"])
    declared[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    declared[29:33] = zlib.crc32(declared[12:29]).to_bytes(4, "big")
    with at_most(len(png) + 8 * MEGABYTES):
        for content in (png, jpeg, bytes(declared)):
            for read in (
                encoding.check_image,
                encoding.read_image_file,
                encoding.store_label,
                encoding.read_label_file,
            ):
                with pytest.raises(
                    ValueError, match=r"more than the 89,478,485 pixels|labels must be PNG|cannot be read"
                ):
                    read(content)


@pytest.mark.parametrize("kind", PICTURES)
def test_changed_images_are_refused_or_read(kind: str, examples: int) -> None:
    rng = np.random.default_rng(len(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(examples):
            content = mutated(PICTURES[kind], rng)
            for read in (
                encoding.read_image_file,
                encoding.store_label,
                encoding.store_depth,
                encoding.read_label_file,
            ):
                try:
                    read(content)
                except ValueError as error:
                    assert str(error)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=100), st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF89a"]))
def test_any_bytes_are_no_image(content: bytes, start: bytes) -> None:
    with pytest.raises(ValueError):
        encoding.read_image_file(start + content)


def test_a_folder_of_odd_images_is_named_file_by_file(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    bad = {
        "empty": b"",
        "text": b"hello\n",
        "half": PICTURES["png"][:60],
        "half_jpeg": PICTURES["jpeg"][: len(PICTURES["jpeg"]) * 2 // 3],
        "huge": cv2.imencode(".png", np.zeros((20_000, 5_000), np.uint8))[1].tobytes(),
    }
    for name, content in (bad | {kind.replace(" ", "_"): data for kind, data in PICTURES.items()}).items():
        (folder / f"{name}.png").write_bytes(content)
    assert prepare.main(["folder", "--path", str(tmp_path), "--data_dir", str(tmp_path / "data")]) == MISTAKE
    message = capsys.readouterr().err
    assert all(f"/{name}.png: " in message for name in bad) and message.count(".png: ") == len(bad)
    found = ImageFiles(str(folder))
    for index in range(len(found)):
        name = found._names[index]
        if name in bad:
            with pytest.raises(UserError, match=f"{name}.png: .*leave it out of --images"):
                found[index]
        else:
            assert found[index]["image"].ndim == 3


# Tables of classes


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {"name": st.text(max_size=5) | JSON, "ids": st.lists(st.integers(-1, 256), max_size=3) | JSON},
    optional={"color": st.lists(st.integers(-1, 256), min_size=3, max_size=3) | JSON, "id": JSON},
)
TABLE = st.fixed_dictionaries(
    {"name": st.text(min_size=1, max_size=300) | JSON, "classes": st.lists(ENTRY | JSON, max_size=4) | JSON},
    optional={"ignore": st.lists(st.integers(0, 255), max_size=3) | JSON},
)


@settings(deadline=None, max_examples=150)
@given(TABLE | JSON)
def test_any_json_as_classes(tmp_path_factory: pytest.TempPathFactory, content) -> None:
    folder = tmp_path_factory.mktemp("classes")
    (folder / "images").mkdir()
    (folder / "classes.json").write_text(json.dumps(content))
    try:
        classes = read_classes(folder / "classes.json")
        config = Folder.config_of(str(folder))
    except UserError:
        return
    (folder / config.name).mkdir()  # is short enough, and stays inside the folder
    space, table = records._folder_labels(classes, None, "folder")
    assert set(table.tolist()) <= {*range(space.num_classes), labels.IGNORE}
    assert all(table[raw] == index for index, entry in enumerate(classes["classes"]) for raw in entry["ids"])


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"name": 1e99999}', b"1" * 10_000, b" " * 2**21]
)
def test_bytes_that_are_no_classes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "classes.json").write_bytes(content)
    with pytest.raises(UserError, match=r"classes\.json"):
        read_classes(tmp_path / "classes.json")


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(st.integers(0, 255), st.text(max_size=3)), st.lists(st.text(max_size=3), unique=True, max_size=255)
)
def test_label_tables(names: dict[int, str], classes: list[str]) -> None:
    space = labels.make_label_space("any", dict.fromkeys(classes, (0, 0, 0)))
    table = labels.table_by_name(names, space)
    assert table.shape == (256,) and table.dtype == np.uint8
    for raw in range(256):
        assert table[raw] == (classes.index(names[raw]) if names.get(raw) in classes else 255)


# Lists of ids, and names that would lead out of a folder


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60))
def test_any_bytes_as_a_list_of_ids(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("split")
    (folder / records.EASY).write_bytes(content)
    try:
        ids = records.read_split(folder, records.EASY)
        records.Subset(FakeRecords(["0", "1"]), ids)
    except UserError:
        return
    assert set(ids) <= {"0", "1"}


class FakeRecords:
    name, label_space, labelled = "fake", None, False

    def __init__(self, ids: list[str]):
        self._ids = ids

    def ids(self) -> list[str]:
        return self._ids

    def images_only(self) -> "FakeRecords":
        return self


OUTSIDE = ["../evil", "/tmp/evil", "a/../../evil", "..", ".", "", "a\0b", "a\\b", ".hidden", "x" * 300, "sub/evil"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_ids_cannot_leave_their_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    (folder / "labels").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    space = labels.make_label_space("two", {"x": (0, 0, 0), "y": (9, 9, 9)})
    ids = np.zeros((2, 2), np.uint8)
    with pytest.raises(UserError, match="cannot be the name of a file"):
        write_pseudo_label(folder, name, ids, space)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="cannot be the name of a file"):
        write_predictions([(name, ids)], folder / "labels", space)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    summary = {"ids": [name], "sha256": "0", "labelled": False}
    with pytest.raises(UserError, match="cannot be the name of a file"):
        records.Records("x", folder, "train", summary, space, np.zeros(256, np.uint8))


def test_damaged_pseudo_labels_are_named(tmp_path: Path) -> None:
    class Images(FakeRecords):
        def __getitem__(self, index: int) -> dict:
            return {"id": "0", "image": np.zeros((2, 2, 3), np.uint8)}

    space = labels.make_label_space("one", {"x": (0, 0, 0)})
    (tmp_path / "labels").mkdir()
    write_pseudo_label(tmp_path, "0", np.zeros((2, 2), np.uint8), space)
    data = PseudoLabelled(Images(["0"]), tmp_path, space)
    assert data[0]["label"].shape == (2, 2)
    (tmp_path / "labels" / "0.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"the pseudo-label .* run its stage again"):
        data[0]


# Prepared datasets


def test_damaged_prepared_data_are_named(tmp_path: Path, examples: int) -> None:
    (tmp_path / "town" / "images").mkdir(parents=True)
    for kind in ("png", "jpeg", "grey"):
        (tmp_path / "town" / "images" / f"{kind}.png").write_bytes(PICTURES[kind])
    path = str(tmp_path / "town")
    (folder,) = prepare.prepare("folder", path=path, data_dir=tmp_path)
    names, rng = [folder / prepared.SUMMARY, *folder.glob("*.array_record*")], np.random.default_rng(0)
    assert len(names) == 2
    for file in names:
        whole = file.read_bytes()
        for _ in range(examples // 4):
            file.write_bytes(mutated(whole, rng))
            try:
                found = records.load("folder", "train", path=path, data_dir=tmp_path)
                for index in range(len(found)):
                    found[index]
            except UserError as error:
                assert "prepare" in str(error) or "cannot be the name" in str(error) or "has no split" in str(error)
        file.write_bytes(whole)


# Files of numbers


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy_bomb() -> bytes:
    """A member that declares four terabytes."""
    buffer, content = io.BytesIO(), io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (2**39,)}
    np.lib.format.write_array_header_1_0(content, header)
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("mean.npy", content.getvalue() + bytes(64))
    return buffer.getvalue()


def compressed_bomb() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mean=np.zeros(2**24))
    return buffer.getvalue()


def test_arrays_that_are_too_large_or_objects_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "statistics.npz"
    objects = npz(classes=np.array(["a"]), mean=np.array([{}], dtype=object))
    contents = [npy_bomb(), compressed_bomb(), objects, b"", b"PK", b"\x93NUMPY"]
    with at_most(4 * MEGABYTES):
        for content in contents:
            file.write_bytes(content)
            with pytest.raises(UserError, match=r"statistics\.npz is corrupt"):
                arrays.read_arrays(file, "statistics", ["mean"], 1)


def test_changed_arrays_are_refused_or_read(tmp_path: Path, examples: int) -> None:
    file, rng = tmp_path / "statistics.npz", np.random.default_rng(0)
    arrays.write_arrays(file, {"mean": rng.normal(size=(2, 3)), "count": np.arange(2)}, ["a", "b"])
    whole = file.read_bytes()
    assert arrays.read_arrays(file, "statistics", ["mean"], 2)["mean"].shape == (2, 3)
    with at_most(4 * MEGABYTES):
        for _ in range(4 * examples):
            file.write_bytes(mutated(whole, rng))
            try:
                arrays.read_arrays(file, "statistics", ["mean", "count"], 2)
            except UserError as error:
                assert "statistics.npz" in str(error)


@pytest.mark.parametrize("write", [pth_bytes, safetensors_bytes])
def test_changed_tensors_are_refused_or_read(write, tmp_path: Path, examples: int) -> None:
    file, rng = tmp_path / "weights.pth", np.random.default_rng(0)
    whole = write({"layer.weight": np.ones((2, 3), np.float32), "layer.bias": np.zeros(3, np.float32)})
    for _ in range(4 * examples):
        content = mutated(whole, rng)
        file.write_bytes(content)
        try:
            tensors = read_tensors(file)
        except UserError as error:
            assert "weights.pth" in str(error)
        else:
            assert sum(array.size for array in tensors.values()) <= len(content)


def test_one_long_name_shared_by_many_tensors_is_refused(tmp_path: Path) -> None:
    """A pickle may name a text once and use it for every tensor: a small file would fill the memory."""
    text = b"X" + (2**20).to_bytes(4, "little") + b"a" * 2**20
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x01\x85K\x01\x85\x89}tRq\x01"
    entries = b"".join(b"J" + index.to_bytes(4, "little") + b"h\x01" for index in range(20_000))
    graph = b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s}" + text + b"}(" + entries + b"us\x86."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", graph)
        archive.writestr("archive/data/0", np.float32([1]).tobytes())
    (tmp_path / "weights.pth").write_bytes(buffer.getvalue())
    with at_most(16 * MEGABYTES), pytest.raises(UserError, match="names of its tensors are too long"):
        read_tensors(tmp_path / "weights.pth")


# Records of runs


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"status": "done"}', "[" * 100_000, '"text"', "\udcff"])
def test_damaged_records_of_stages(content: str, tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="delete it, then run the same command again"):
        stages.read_record(path)


def test_lines_that_are_no_objects_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\nnull\n[1]\n\xff\xfe\n{"step": 2}\n{"st')
    assert [row["step"] for row in files.read_json_lines(path)] == [1, 2]
    files.append_json_line(path, {"step": 3})  # not behind the half line
    assert [row["step"] for row in files.read_json_lines(path)] == [1, 2, 3]
