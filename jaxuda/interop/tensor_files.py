"""Files of named tensors: torch's two formats (.pth) and safetensors (.safetensors), read and written without torch.

Reading maps the file into memory and returns arrays that are views of it: whatever a file declares, it never takes more
memory than it has bytes (of tensors with torch's negative bit, each storage is copied once). All sizes are checked
against the file first. A safetensors file is eight bytes, JSON and the numbers; it is read here because its package is
one more dependency and does not support bfloat16 in NumPy.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxuda.errors import UserError
from jaxuda.interop import pickles
from jaxuda.interop.pickle_names import STORAGES, Storage, Tensor, Unread, unread_type
from jaxuda.interop.pickles import shown

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MAX_DIRECTORY = 16 * 2**20  # bytes of a zip's or a safetensors file's table of contents
_MAX_NESTING = 16
_MAX_NAME = 1000  # characters in each part of a name
_MAX_SIZE = 2**28  # numbers in an expanded tensor, which has fewer in the file
_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a file by name; names of nested dicts and lists are joined with dots.

    The content decides the format, not the file's name. The arrays are read-only; they are views of the mapped file
    where possible. Other values beside them, and tensors that are not plain numbers (see `read_entries`), are left out.

    Raises:
      UserError: the file cannot be read, is corrupt or truncated, declares more than it holds, asks for anything but
        tensors and plain values, is not a file of weights, or has no tensor of plain numbers.
    """
    return {name: entry for name, entry in read_entries(path).items() if not isinstance(entry, Unread)}


def read_entries(path: str | os.PathLike) -> dict[str, np.ndarray | Unread]:
    """As `read_tensors`, with the tensors that are not plain numbers: sparse, quantised, fp8, without numbers, ..."""
    where = str(path)
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise UserError(f"{where} is empty: its download or copy has failed")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from error
    if data[:4] == b"PK\x03\x04":
        entries = _read_zip(data, where)
    elif data[:1] == b"\x80":
        entries = _read_legacy(data, where)
    elif data[8:9] == b"{" and len(data) > 10:
        entries = _read_safetensors(data, where)
    else:
        raise UserError(f"{where} is not a file of weights: {_guess(data)}")
    if not entries:
        raise UserError(f"{where} holds no tensors")
    if all(isinstance(entry, Unread) for entry in entries.values()):
        name, first = next(iter(entries.items()))
        raise UserError(f"{where} holds no tensors that can be read: {shown(name)} {first}")
    return entries


def _guess(data: mmap.mmap) -> str:
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "it is a web page, perhaps a download that asked for a confirmation"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself"
    if data[257:262] == b"ustar":
        return "it is a tar archive, as torch wrote before 2017; load it in torch and save it again"
    return "it does not begin like a file of torch.save (.pth) or a .safetensors file"


def _read_zip(data: mmap.mmap, where: str) -> dict[str, np.ndarray | Unread]:
    """The format of torch 1.6 and later: an uncompressed zip with a pickle and one record per storage."""
    cut_off = f"{where} is corrupt or was cut off: its {len(data)} bytes do not end like an archive"
    try:
        if _directory_size(data) > _MAX_DIRECTORY:
            raise UserError(f"{where} is refused: its table of contents is too long")
        with zipfile.ZipFile(where) as archive:
            records = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OSError, EOFError) as error:
        raise UserError(cut_off) from error
    found = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(found) != 1:
        raise UserError(f"{where} is a zip archive, but not one that torch.save wrote: it has no data.pkl")
    root = found[0].removesuffix("data.pkl")

    def record(name: str) -> memoryview:
        if root + name not in records:
            raise UserError(f"{where} is corrupt: it has no record {shown(name)}")
        return _record(data, records[root + name], where)

    if f"{root}byteorder" in records and bytes(record("byteorder")) != b"little":
        raise UserError(f"{where} was written on a big-endian machine, which is not supported")
    tree = pickles.load(io.BytesIO(record("data.pkl")), where)
    entries = _flatten(tree, where)
    buffers: dict[str, memoryview] = {}
    held = 0
    for storage in _storages((e.storage for e in entries.values() if isinstance(e, Tensor)), where):
        buffers[storage.key] = record(f"data/{storage.key}")
        held += len(buffers[storage.key])
        if held > len(data):
            raise UserError(f"{where} is corrupt: its records overlap")
        if len(buffers[storage.key]) < storage.count * storage.dtype.itemsize:
            raise UserError(
                f"{where} is corrupt: the record data/{shown(storage.key)} has {len(buffers[storage.key])} bytes, but "
                f"{storage.count} numbers of {storage.dtype.itemsize} bytes"
            )
    return _arrays(entries, buffers, where)


def _directory_size(data: mmap.mmap) -> int:
    """Bytes of a zip's table of contents. torch's archives end without a comment, so its place is known."""
    end = data[-22:]
    if end[:4] != b"PK\x05\x06":
        raise zipfile.BadZipFile
    size = struct.unpack("<I", end[12:16])[0]
    if size == 0xFFFFFFFF:
        size = struct.unpack("<Q", data[-22 - 20 - 56 :][40:48])[0]
    return size


def _record(data: mmap.mmap, info: zipfile.ZipInfo, where: str) -> memoryview:
    """The bytes of one record, checked."""
    name = shown(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise UserError(f"{where} is refused: its record {name} is compressed, which torch.save never does")
    header = data[info.header_offset : info.header_offset + 30] if info.header_offset >= 0 else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise UserError(f"{where} is corrupt: its record {name} is not where it should be")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + info.file_size > len(data):
        raise UserError(f"{where} is corrupt or was cut off: its record {name} goes beyond the end of the file")
    content = memoryview(data)[start : start + info.file_size]
    if info.CRC and zlib.crc32(content) != info.CRC:  # torch writes 0 where it is told to compute no checksums
        raise UserError(f"{where} is corrupt: the checksum of its record {name} is wrong")
    return content


def _read_legacy(data: mmap.mmap, where: str) -> dict[str, np.ndarray | Unread]:
    """The format before torch 1.6: five pickles, then each storage as its length and its numbers."""
    if pickles.load(data, where) != _MAGIC:
        raise UserError(f"{where} is a pickle, but not one that torch.save wrote")
    protocol, system = (pickles.load(data, where) for _ in range(2))
    tree, named = pickles.load_with_storages(data, where)
    keys = pickles.load(data, where)
    if protocol != _PROTOCOL or not isinstance(system, dict) or not isinstance(keys, list):
        raise UserError(f"{where} is corrupt, or of an unknown version of torch")
    if not system.get("little_endian", True):
        raise UserError(f"{where} was written on a big-endian machine, which is not supported")
    entries = _flatten(tree, where)
    storages = {storage.key: storage for storage in _storages(named, where)}
    buffers: dict[str, memoryview] = {}
    content, position = memoryview(data), data.tell()
    for key in keys:
        if not isinstance(key, str) or key not in storages or key in buffers:
            # The type of a storage gives its length, and thereby the start of the next one.
            raise UserError(f"{where} is corrupt: it lists numbers that belong to no tensor")
        storage = storages[key]
        stored = content[position : position + 8]
        position += 8 + storage.count * storage.dtype.itemsize
        if position > len(data):
            raise UserError(f"{where} is corrupt or was cut off: it ends within the numbers of its tensors")
        if struct.unpack("<q", stored)[0] != storage.count:
            raise UserError(f"{where} is corrupt: the lengths of its tensors disagree")
        buffers[key] = content[position - storage.count * storage.dtype.itemsize : position]
    if missing := storages.keys() - buffers.keys():
        raise UserError(f"{where} is corrupt: the numbers of {len(missing)} tensors are missing")
    return _arrays(entries, buffers, where)


def _read_safetensors(data: mmap.mmap, where: str) -> dict[str, np.ndarray | Unread]:
    size = struct.unpack("<Q", data[:8])[0]
    if size > len(data) - 8:
        raise UserError(f"{where} is corrupt, cut off, or not a file of weights: its header goes beyond its end")
    if size > _MAX_DIRECTORY:
        raise UserError(f"{where} is refused: its header is too long")
    try:
        header = json.loads(data[8 : 8 + size])
        content = memoryview(data)[8 + size :]
        tensors: dict[str, np.ndarray | Unread] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _SAFETENSORS:
                tensors[name] = unread_type(shown(entry["dtype"]))
                continue
            dtype, (begin, end) = np.dtype(_SAFETENSORS[entry["dtype"]]), entry["data_offsets"]
            if not 0 <= begin <= end <= len(content):
                raise UserError(f"{where} is corrupt or was cut off: {shown(name)} goes beyond its end")
            count = (end - begin) // dtype.itemsize
            strides = [math.prod(entry["shape"][axis + 1 :]) for axis in range(len(entry["shape"]))]
            tensor = Tensor(Storage("", dtype, count, 0, count), 0, tuple(entry["shape"]), tuple(strides))
            tensors[name] = _array(name, tensor, content[begin:end], where)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} is corrupt: its header cannot be read") from error
    return tensors


def _flatten(tree: Any, where: str) -> dict[str, Tensor | Unread]:
    """The tensors in nested dicts and lists; anything else is skipped."""
    found: dict[str, Tensor | Unread] = {}
    seen: set[int] = set()

    def walk(value: Any, names: tuple[str, ...]) -> None:
        if isinstance(value, Tensor | Unread):
            name = ".".join(names)
            if name in found:
                raise UserError(f"{where} is corrupt: it has two tensors named {shown(name)}")
            found[name] = value
        elif isinstance(value, dict | list | tuple) and not isinstance(value, Storage) and value:
            if len(names) > _MAX_NESTING:
                raise UserError(f"{where} is refused: its tensors are nested without end")
            if id(value) in seen:
                return  # seen before; containers that share parts could multiply without end
            seen.add(id(value))
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(key, str) and len(key) > _MAX_NAME:  # many tensors may share it: it would multiply
                    raise UserError(f"{where} is refused: the names of its tensors are too long")
                walk(inner, (*names, str(key)))

    walk(tree, ())
    return found


def _storages(named: Iterable[Storage], where: str) -> list[Storage]:
    """Each storage once, after checks that its entries agree with each other."""
    found: dict[str, Storage] = {}
    for storage in named:
        if min(storage.start, storage.length) < 0 or storage.start + storage.length > storage.count:
            raise UserError(f"{where} is corrupt: a part of a storage is outside of the storage")
        known = found.setdefault(storage.key, storage)
        if (known.dtype, known.count) != (storage.dtype, storage.count):
            raise UserError(f"{where} is corrupt: its storages contradict each other")
    return list(found.values())


def _arrays(
    entries: Mapping[str, Tensor | Unread], buffers: Mapping[str, memoryview], where: str
) -> dict[str, np.ndarray | Unread]:
    """The arrays that tensors describe; `buffers`: key of a storage -> its bytes."""
    arrays: dict[str, np.ndarray | Unread] = {}
    negated: dict[str, memoryview] = {}
    for name, entry in entries.items():
        if isinstance(entry, Unread):
            arrays[name] = entry
            continue
        key, dtype = entry.storage.key, entry.storage.dtype
        if entry.negative and key not in negated:
            numbers = np.frombuffer(buffers[key], dtype, entry.storage.count)
            negated[key] = memoryview(np.negative(numbers).view(np.uint8))
        arrays[name] = _array(name, entry, (negated if entry.negative else buffers)[key], where)
    return arrays


def _array(name: str, tensor: Tensor, buffer: memoryview, where: str) -> np.ndarray:
    """The array that a tensor describes, a view of `buffer`, which holds its whole storage."""
    storage, offset, shape, strides, _ = tensor
    numbers = [offset, *shape, *strides] if type(shape) is type(strides) is tuple else [None]
    if any(type(n) is not int or not 0 <= n < 2**48 for n in numbers) or len(shape) != len(strides) or len(shape) > 8:
        raise UserError(f"{where} is corrupt: the shape of {shown(name)} is invalid")
    size, last = math.prod(shape), offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    expanded = size <= _MAX_SIZE and any(n > 1 and not step for n, step in zip(shape, strides, strict=True))
    if (size > storage.length and not expanded) or (size and last >= storage.length):
        raise UserError(
            f"{where} is corrupt or was cut off: {shown(name)} of shape {shape} needs more than the {storage.length} "
            "numbers that are stored for it"
        )
    if not size and math.prod(n or 1 for n in shape) < _MAX_SIZE:  # beyond it NumPy refuses even an empty array
        return np.zeros(shape, storage.dtype)
    if not size:
        raise UserError(f"{where} is corrupt: the shape of {shown(name)} is invalid")
    first = (storage.start + offset) * storage.dtype.itemsize
    flat = np.frombuffer(buffer, storage.dtype, storage.length - offset, first)
    steps = [step * storage.dtype.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)


def pth_bytes(tree: Mapping[str, Any]) -> bytes:
    """A file in the format of torch.save since 1.6; torch.load reads it, also with weights_only=True.

    Args:
      tree: name -> array, or name -> such a dict.
    """
    arrays: list[np.ndarray] = []
    pickled = b"\x80\x02" + _pickled_dict(tree, arrays) + b"."
    records = {"data.pkl": pickled, "byteorder": b"little"}
    records |= {f"data/{index}": array.tobytes() for index, array in enumerate(arrays)}
    records["version"] = b"3\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)  # a fixed date: equal input, equal bytes
    return file.getvalue()


def _pickled_dict(tree: Mapping[str, Any], arrays: list[np.ndarray]) -> bytes:
    items = b"".join(
        _pickled_text(name)
        + (_pickled_dict(value, arrays) if isinstance(value, Mapping) else _pickled_tensor(value, arrays))
        for name, value in tree.items()
    )
    return b"ccollections\nOrderedDict\n)R(" + items + b"u"


def _pickled_tensor(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict()); appends the array."""
    kind = next(name for name, dtype in STORAGES.items() if dtype == array.dtype)
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    text = [_pickled_text("storage"), f"ctorch\n{kind}\n".encode(), *map(_pickled_text, (str(len(arrays)), "cpu"))]
    storage = b"(" + b"".join(text) + _pickled_int(array.size) + b"tQ"
    sizes = (b"(" + b"".join(map(_pickled_int, numbers)) + b"t" for numbers in (array.shape, strides))
    arrays.append(np.ascontiguousarray(array))
    tail = b"\x89ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _pickled_int(0) + b"".join(sizes) + tail


def _pickled_text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _pickled_int(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def safetensors_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A .safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in arrays.items():
        kind = next(kind for kind, dtype in _SAFETENSORS.items() if dtype == array.dtype)
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    return b"".join([struct.pack("<Q", len(text)), text, *(array.tobytes() for array in arrays.values())])
