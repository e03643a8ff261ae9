"""A coverage-guided fuzzer of the readers of users' files; test_fuzz.py starts it, since it needs its own process.

    pip install -e '.[dev,fuzz]'
    python tests/fuzz.py pth FOLDER -runs=100000

FOLDER gets the inputs that reach new code. If an input raises anything but a `UserError`, the traceback is printed and
the input saved as crash-... in the current folder. libFuzzer's flags may follow: -max_total_time=600, -rss_limit_mb.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["jaxuda", "PIL", "zipfile", "json"]):
    import numpy as np

    from jaxuda.artifacts.arrays import read_arrays, write_arrays
    from jaxuda.data import encoding, records
    from jaxuda.data.datasets.folder import read_classes
    from jaxuda.errors import UserError
    from jaxuda.interop import read_tensors
    from jaxuda.interop.tensor_files import pth_bytes, safetensors_bytes

ARRAYS = {"layer1.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.array([1, -2], np.int64)}


CLASSES = {
    "name": "town",
    "classes": [{"name": "road", "ids": [0], "color": [1, 2, 3]}, {"name": "car", "ids": [7, 9], "color": [4, 5, 6]}],
    "ignore": [255],
}


def read_image(file: Path) -> None:
    try:
        encoding.read_image_file(file.read_bytes())
    except ValueError as error:  # `prepare` reports it with the file's name
        raise UserError(str(error)) from error


# The name of the file, its reader, and the writer of a valid file to start from.
READERS: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object]]] = {
    "pth": ("weights.pth", read_tensors, lambda file: file.write_bytes(pth_bytes(ARRAYS))),
    "safetensors": ("weights.safetensors", read_tensors, lambda file: file.write_bytes(safetensors_bytes(ARRAYS))),
    "npz": (
        "statistics.npz",
        lambda file: read_arrays(file, "statistics", ["bias"], 2),
        lambda file: write_arrays(file, ARRAYS, ["a", "b"]),
    ),
    "image": (
        "image.png",
        read_image,
        lambda file: file.write_bytes(encoding.encode_label(np.arange(42, dtype=np.uint8).reshape(6, 7))),
    ),
    "classes": ("classes.json", read_classes, lambda file: file.write_text(json.dumps(CLASSES))),
    "split": (
        records.EASY,
        lambda file: records.read_split(file.parent, file.name),
        lambda file: file.write_text("one\ntwo\nthree\n"),
    ),
}


def main() -> None:
    name, read, write_whole = READERS[sys.argv[1]]
    corpus = Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    write_whole(corpus / name)
    read(corpus / name)
    file = Path(tempfile.mkdtemp()) / name

    def one_input(content: bytes) -> None:
        file.write_bytes(content)
        with contextlib.suppress(UserError):
            read(file)

    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[3:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
