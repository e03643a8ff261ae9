"""The npz files that a sweep writes for a training stage, checked to have the same classes and network."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import numpy as np

from jaxuda import files
from jaxuda.errors import UserError

REMEDY = "run the stage that makes them again, with this network and label space (--from_stage NAME)"


def write_arrays(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    classes: Sequence[str],
    network: tuple[nn.Module, int] | None = None,
) -> None:
    """Writes `arrays`, together with the class names and the network that they come from.

    Args:
      path: the file.
      arrays: by name.
      classes: names in the order of the train ids.
      network: the network and the number of channels of its features; None if the arrays come from no network.
    """
    identity = {"classes": np.array(classes, dtype=str)}
    if network is not None:
        model, channels = network
        identity |= {"network": np.array(model.describe()), "channels": np.int64(channels)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **identity)
    files.write_bytes(path, buffer.getvalue())


def load_arrays(path: Path, what: str, names: Sequence[str]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Reads what `write_arrays` wrote, for any classes and network.

    Args:
      path: the file.
      what: its content, in the plural, for messages.
      names: arrays that it must hold.

    Returns:
      All arrays of the file, including those that name its network, and the names of its classes.

    Raises:
      UserError: the file is missing or corrupt.
    """
    try:
        arrays = read_npz(path)
        classes = tuple(map(str, arrays.pop("classes").ravel().tolist()))
        missing = [name for name in names if name not in arrays]
        if missing:
            raise KeyError(missing[0])
    except FileNotFoundError as error:
        raise UserError(f"there are no {what} in {path.parent}: {REMEDY}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is corrupt ({error}): delete it, then {REMEDY}") from error
    return arrays, classes


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file of `write_arrays`: uncompressed, without objects.

    What a member declares is compared with its size first, so that the file never takes more memory than it has bytes.

    Raises:
      ValueError: it is another kind of file, or corrupt.
      FileNotFoundError: there is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                raise ValueError("it declares more than it holds")
            return {info.filename.removesuffix(".npy"): _read_member(archive, info) for info in archive.infolist()}
    except FileNotFoundError:
        raise
    except (OSError, EOFError, LookupError, TypeError, NotImplementedError, RuntimeError, struct.error) as error:
        raise ValueError(str(error)) from error
    except (zipfile.BadZipFile, zlib.error, SyntaxError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    content = io.BytesIO(archive.read(info))
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError(f"{info.filename} is of another version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(content)
    if math.prod(shape) * dtype.itemsize != info.file_size - content.tell():
        raise ValueError(f"{info.filename} declares another size than it has")
    content.seek(0)
    return np.load(content, allow_pickle=False)


def read_arrays(
    path: Path,
    what: str,
    names: Sequence[str],
    num_classes: int,
    classes: Sequence[str] | None = None,
    network: tuple[nn.Module, int] | None = None,
) -> dict[str, np.ndarray]:
    """Reads what `write_arrays` wrote.

    Args:
      path: the file.
      what: its content, in the plural, for messages.
      names: arrays that it must hold.
      num_classes: C of the network that will use the arrays.
      classes: its class names in order; None if only their number is known.
      network: that network and the number of channels of its features, if the arrays must come from the same one.

    Returns:
      All arrays of the file.

    Raises:
      UserError: the file is missing or corrupt, or comes from another network or label space.
    """
    arrays, known = load_arrays(path, what, [*names, "network", "channels"] if network else names)
    if network is not None:
        theirs, found = str(arrays.pop("network")), int(arrays.pop("channels"))
    if network is not None and (theirs, found) != (network[0].describe(), network[1]):
        raise UserError(
            f"{path} holds {what} of another network: {theirs}, {found} channels, against "
            f"{network[0].describe()}, {network[1]} channels here; {REMEDY}"
        )
    if len(known) != num_classes or (classes is not None and known != tuple(classes)):
        ours = f"{num_classes}" if classes is None else f"{len(classes)} ({', '.join(classes)})"
        raise UserError(
            f"{path} holds {what} of another label space: {len(known)} classes ({', '.join(known)}), against "
            f"{ours} here; {REMEDY}"
        )
    return arrays
