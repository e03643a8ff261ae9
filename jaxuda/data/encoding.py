"""Images, labels and depth as encoded bytes, which builders store, and which are decoded when a record is read.

Images keep the bytes of the user's JPEG or PNG file; labels are stored as 8-bit grey PNG, depth as 16-bit
grey PNG. Neither this file nor the builders import TensorFlow: tfds only gets bytes.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import cv2
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxuda.data import png

# Fast, and the files are still small: labels compress well at any level.
_PNG_LEVEL = 3
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap width and height


def features(*, depth: bool = False, label: bool = True) -> tfds.features.FeaturesDict:
    """Describes a record for a builder: image, id and, if the dataset has them, label and depth.

    A builder yields bytes: any JPEG or PNG for "image", `encode_label` for "label" (or b"" in a split without
    labels), `encode_depth` for "depth"; "id" is a unique text without slashes.
    """
    record = {"image": tfds.features.Image(shape=(None, None, 3)), "id": tfds.features.Text()}
    if label:
        record["label"] = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
    if depth:
        record["depth"] = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")
    return tfds.features.FeaturesDict(record)


def encode_image(image: np.ndarray) -> bytes:
    """Encodes (H, W, 3) uint8 RGB as PNG."""
    _expect(image, "image", np.uint8, 3)
    return _png(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def decode_image(data: bytes) -> np.ndarray:
    """Decodes JPEG or PNG bytes of any kind to (H, W, 3) uint8 RGB, turned upright by its EXIF tag.

    Raises:
      ValueError: the bytes are not an image.
    """
    return np.ascontiguousarray(_decode(data, cv2.IMREAD_COLOR)[..., ::-1])


def encode_label(label: np.ndarray) -> bytes:
    """Encodes (H, W) uint8 ids as 8-bit grey PNG."""
    _expect(label, "label", np.uint8, 2)
    return _png(label)


def decode_label(data: bytes) -> np.ndarray:
    """Decodes what `encode_label` wrote to (H, W) uint8. For users' files see `read_label_file`."""
    return _decode_as(data, "label", np.uint8)


def encode_indexed(ids: np.ndarray, palette: np.ndarray) -> bytes:
    """Encodes (H, W) uint8 ids as a PNG that shows id i in colour palette[i], (n, 3) uint8; other ids are black."""
    _expect(ids, "ids", np.uint8, 2)
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    picture = Image.fromarray(ids, "P")
    picture.putpalette(table.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def encode_depth(depth: np.ndarray) -> bytes:
    """Encodes (H, W) uint16 raw depth as 16-bit grey PNG."""
    _expect(depth, "depth", np.uint16, 2)
    return _png(depth)


def decode_depth(data: bytes) -> np.ndarray:
    """Decodes what `encode_depth` wrote to (H, W) uint16."""
    return _decode_as(data, "depth", np.uint16)


def inverse_depth(raw: np.ndarray) -> np.ndarray:
    """Turns raw depth (any shape, uint16) into inverse depth 65536 / (raw + 1), float32 (DADA, sec. 4.1)."""
    return np.float32(65536) / (raw.astype(np.float32) + 1)


def check_image(data: bytes) -> tuple[int, int]:
    """Checks that bytes are a complete JPEG or PNG image; OpenCV would fill a missing part with grey.

    A PNG is checked by its checksums; a JPEG, which has none, is decoded at an eighth of its size.

    Returns:
      (height, width) of the upright image.

    Raises:
      ValueError: what is wrong with it.
    """
    if png.is_png(data):
        found = png.check(data)
        # OpenCV rotates images by this chunk, which hardly any PNG has.
        return decode_image(data).shape[:2] if png.has(data, b"eXIf") else (found.height, found.width)
    with _opened(data) as image:
        if image.format not in ("JPEG", "MPO"):
            raise ValueError(f"is {image.format}, not JPEG or PNG")
        width, height = image.size
        png.check_size(width, height)
        with _unreadable():
            sideways = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
    return (width, height) if sideways else (height, width)


def read_image_file(data: bytes) -> np.ndarray:
    """Checks a user's file, then decodes it as `decode_image` does; raises ValueError as `check_image` does."""
    check_image(data)
    return decode_image(data)


def store_label(data: bytes) -> tuple[bytes, np.ndarray]:
    """Converts a user's label PNG to one that `decode_label` reads; 8-bit files are not encoded again.

    Returns:
      The bytes to store, and the ids, (H, W) uint8.

    Raises:
      ValueError: as `read_label_file`.
    """
    if png.is_png(data):
        found = png.check(data)
        if found.bits == 8 and found.colour in (png.GREY, png.PALETTE):
            stored = png.as_grey(data)
            return stored, decode_label(stored)
    label = read_label_file(data)
    return encode_label(label), label


def count_ids(label: np.ndarray) -> np.ndarray:
    """The number of pixels of each id in (H, W) uint8: (256,) int64; five times as fast as NumPy's bincount."""
    # OpenCV counts in float32, which is exact up to 2**24.
    parts = np.array_split(label, max(1, -(-label.size // 2**24)))
    return sum(cv2.calcHist([part], [0], None, [256], [0, 256]).ravel().astype(np.int64) for part in parts)


def store_depth(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """Converts a user's 16-bit depth PNG to one that `decode_depth` reads; also returns its (height, width).

    A grey file is not encoded again; a colour file must hold the same depth in all channels.

    Raises:
      ValueError: what is wrong with it.
    """
    found = png.check(data)
    if found.bits != 16:
        raise ValueError(f"has {found.bits} bits per value; depth must be a 16-bit PNG")
    if found.colour == png.GREY:
        return png.as_grey(data), (found.height, found.width)
    depth = _decode(data, cv2.IMREAD_UNCHANGED)
    if depth.ndim != 3 or (depth[..., :3] != depth[..., :1]).any():
        raise ValueError("holds colours, not depth")
    return encode_depth(np.ascontiguousarray(depth[..., 0])), depth.shape[:2]


def read_first_channel(data: bytes) -> np.ndarray:
    """The first channel of a PNG with several 16-bit channels, in which SYNTHIA stores the class of a pixel.

    Pillow cuts such files to 8 bits. OpenCV reverses the order of colours, and converts grey with alpha to three
    equal channels and alpha.

    Returns:
      (H, W) uint8.

    Raises:
      ValueError: what is wrong with it.
    """
    first = _decode(data, cv2.IMREAD_UNCHANGED)[..., 2]
    if first.max(initial=0) > 255:
        raise ValueError(f"holds the id {first.max()}; ids must be 0..255")
    return first.astype(np.uint8)


def read_label_file(data: bytes) -> np.ndarray:
    """Reads a user's label PNG as class ids: the index of a palette PNG, the value of a grey one.

    OpenCV would convert a palette to colours, and both libraries stretch 2 and 4 bit grey to 0..255.

    Returns:
      (H, W) uint8.

    Raises:
      ValueError: the file cannot be read, is not a PNG, or holds colours instead of ids.
    """
    with _opened(data) as image:
        if image.format != "PNG":
            raise ValueError(f"is {image.format}; labels must be PNG (a lossy file changes the ids)")
        png.check_size(*image.size)
        with _unreadable():
            image.load()
            mode, label = image.mode, np.asarray(image)
    if label.ndim != 2 or mode not in ("1", "L", "P", "I;16", "I"):
        raise ValueError(f"holds colours (mode {mode}), not class ids; save it as a grey or palette PNG of ids")
    bits = data[24]  # IHDR: bit depth
    if mode == "L" and bits in (2, 4):
        label = label // (255 // (2**bits - 1))
    if label.max(initial=0) > 255:
        raise ValueError(f"holds the id {label.max()}; ids must be 0..255")
    return label.astype(np.uint8)


def _opened(data: bytes) -> Image.Image:
    with _unreadable(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are checked here
        return Image.open(io.BytesIO(data))


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    """Turns any exception into a ValueError: a corrupt file can make Pillow's parsers raise anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot be read as an image ({_text(error)})") from error


def _text(error: Exception) -> str:
    """Pillow's message without the address of its in-memory file."""
    return "not a JPEG or PNG" if "identify image file" in str(error) else str(error).rstrip(".")


def _expect(array: np.ndarray, name: str, dtype: type, ndim: int) -> None:
    if array.dtype != dtype or array.ndim != ndim:
        raise ValueError(f"{name} must be {np.dtype(dtype)} with {ndim} axes, not {array.dtype} {array.shape}")


def _png(array: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL])
    if not done:
        raise ValueError(f"OpenCV could not encode {array.dtype} {array.shape}")
    return data.tobytes()


def _decode(data: bytes, flags: int) -> np.ndarray:
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:  # a size that OpenCV refuses
        array = None
    if array is None:
        raise ValueError("cannot be decoded as an image")
    return array


def _decode_as(data: bytes, name: str, dtype: type) -> np.ndarray:
    array = _decode(data, cv2.IMREAD_UNCHANGED)
    _expect(array, name, dtype, 2)
    return array
