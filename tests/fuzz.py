"""A coverage-guided fuzzer of the readers of users' files; test_fuzz.py starts it, since it takes its process over.

    pip install -e '.[dev,fuzz]'
    python tests/fuzz.py pth FOLDER -runs=100000

FOLDER gets the inputs that reach new code; what ends in anything but a `UserError` is printed with its traceback and
kept as crash-... in the present folder. All that libFuzzer takes may follow, as -max_total_time=600 or -rss_limit_mb.
"""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["jaxuda", "PIL", "zipfile", "json"]):
    import numpy as np
    from PIL import Image

    from jaxuda.artefacts import read_arrays, write_arrays
    from jaxuda.data import encoding, records
    from jaxuda.data.folder import read_classes
    from jaxuda.errors import UserError
    from jaxuda.interop import read_tensors
    from jaxuda.interop.tensor_files import pth_bytes, safetensors_bytes

ARRAYS = {"layer1.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.array([1, -2], np.int64)}


def npz_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_arrays(Path(folder) / "whole.npz", ARRAYS, ["a", "b"])
        return (Path(folder) / "whole.npz").read_bytes()


def png_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(42, dtype=np.uint8).reshape(6, 7)).save(buffer, "png")
    return buffer.getvalue()


def classes_bytes() -> bytes:
    entries = [{"name": "road", "ids": [0], "color": [1, 2, 3]}, {"name": "car", "ids": [7, 9], "color": [4, 5, 6]}]
    return json.dumps({"name": "town", "classes": entries, "ignore": [255]}).encode()


def from_file(read: Callable[[Path], object], suffix: str) -> Callable[[bytes], object]:
    """`read` on a file of its own, which the next input overwrites."""
    file = Path(tempfile.mkdtemp()) / f"input{suffix}"

    def read_bytes(content: bytes) -> object:
        file.write_bytes(content)
        return read(file)

    return read_bytes


def read_image(content: bytes) -> object:
    try:
        return encoding.read_image_file(content)
    except ValueError as error:  # which `prepare` tells with the file's name
        raise UserError(str(error)) from error


# What reads the bytes, and a whole file to start from.
READERS: dict[str, tuple[Callable[[bytes], object], Callable[[], bytes]]] = {
    "pth": (from_file(read_tensors, ".pth"), lambda: pth_bytes(ARRAYS)),
    "safetensors": (from_file(read_tensors, ".safetensors"), lambda: safetensors_bytes(ARRAYS)),
    "npz": (from_file(lambda file: read_arrays(file, "statistics", ["bias"], 2), ".npz"), npz_bytes),
    "image": (read_image, png_bytes),
    "classes": (from_file(read_classes, ".json"), classes_bytes),
    "split": (from_file(lambda file: records.read_split(file.parent, file.name), ""), lambda: b"one\ntwo\nthree\n"),
}


def main() -> None:
    read, whole = READERS[sys.argv[1]]
    corpus = Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "whole").write_bytes(whole())
    read(whole())

    def one_input(content: bytes) -> None:
        with contextlib.suppress(UserError):
            read(content)

    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[3:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
