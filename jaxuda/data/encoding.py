"""Images, labels and depth as encoded bytes, which builders store, and which are decoded when a record is read.

Images keep the bytes of the user's JPEG or PNG file; labels are stored as 8-bit grey PNG, depth as 16-bit
grey PNG. Neither this file nor the builders import TensorFlow: tfds only gets bytes.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping

import cv2
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from jaxuda.data import png

# Fast, and the files are still small: labels compress well at any level.
_PNG_LEVEL = 3
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap width and height
_BITS_PER_SAMPLE = 258  # the tag of TIFF
_LEAST_OF_16 = 2**14  # a photo of 16 bits has brighter pixels
_TOO_HIGH = "ids must be 0..255 (if it shows single objects, their instances, take the file that shows the classes)"
_COLOUR_OF_ANY_DEPTH = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH


def features(*, depth: bool = False, label: bool = True, reference: bool = False) -> tfds.features.FeaturesDict:
    """Describes a record for a builder: image, id and, if the dataset has them, label, depth and reference image.

    A builder yields bytes: any JPEG or PNG for "image" and "reference", `encode_label` for "label" (b"" where an image
    has no label or reference), `encode_depth` for "depth"; "id" is a unique text without slashes.
    """
    record = {"image": tfds.features.Image(shape=(None, None, 3)), "id": tfds.features.Text()}
    if reference:
        record["reference"] = tfds.features.Image(shape=(None, None, 3))
    if label:
        record["label"] = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
    if depth:
        record["depth"] = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")
    return tfds.features.FeaturesDict(record)


def encode_image(image: np.ndarray) -> bytes:
    """Encodes (H, W, 3) uint8 RGB as PNG."""
    _expect(image, "image", np.uint8, 3)
    return _png(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def decode_image(data: bytes, bits: int = 16) -> np.ndarray:
    """Decodes JPEG or PNG bytes of any kind to (H, W, 3) uint8 RGB, turned upright by its EXIF tag.

    Args:
      data: the content of a file.
      bits: the bits that 16-bit values use, 8 to 16: 2**bits - 1 becomes 255, and so does anything above.

    Raises:
      ValueError: the bytes are not an image.
    """
    array = _decode(data, _COLOUR_OF_ANY_DEPTH)
    if array.dtype == np.uint16:
        array = np.minimum(array >> (bits - 8), 255).astype(np.uint8)
    return np.ascontiguousarray(array[..., ::-1])


def value_range(data: bytes) -> tuple[int, int] | None:
    """The lowest and the highest value in a 16-bit PNG or TIFF image, without its alpha; None for other images.

    Raises:
      ValueError: the bytes are not an image.
    """
    if not _has_16_bits(data):
        return None
    array = _decode(data, _COLOUR_OF_ANY_DEPTH)
    return int(array.min()), int(array.max())


def range_warning(ranges: Mapping[str, tuple[int, int]], bits: int = 16) -> str:
    """A warning about 16-bit images whose values use other bits than those that are asked for.

    Args:
      ranges: `value_range` of each image that has one, by the name of its file.
      bits: as for `decode_image`. With 16, images that hold fewer, such as a camera's 12, would be nearly black; with
        fewer, images that hold more would be partly white.

    Returns:
      The number of these images, the values that they use, and what to do; "" if there are none.
    """
    if bits < 16:
        cut = {name: high for name, (_, high) in ranges.items() if high >= 2**bits}
        found = f"{len(cut)} images have values above {2**bits - 1}, up to {max(cut.values(), default=0)}"
        return f"{found}, such as {next(iter(cut))}: --image_bits {bits} makes them white" if cut else ""
    dark = {name: found for name, found in ranges.items() if found[1] < _LEAST_OF_16}
    if not dark:
        return ""
    lowest, highest = min(low for low, _ in dark.values()), max(high for _, high in dark.values())
    bits = next(bits for bits in (8, 10, 12, 14) if highest < 2**bits)
    return (
        f"{len(dark)} of the {len(ranges)} images of 16 bits use only the values {lowest} to {highest} of 65535, such "
        f"as {next(iter(dark))}: they are nearly black. If these are values of {bits} bits, add --image_bits {bits}, "
        f"which makes {2**bits - 1} white"
    )


def _has_16_bits(data: bytes) -> bool:
    if png.is_png(data):
        return png.header(data).bits == 16
    if not data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return False
    with _opened(data) as image:
        return image.format == "TIFF" and 16 in image.tag_v2.get(_BITS_PER_SAMPLE, ())


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
        if png.has(data, b"acTL"):
            raise ValueError("is an animation: save each of its images as a file of its own")
        # OpenCV rotates images by this chunk, which hardly any PNG has.
        return decode_image(data).shape[:2] if png.has(data, b"eXIf") else (found.height, found.width)
    with _opened(data) as image:
        if image.format not in ("JPEG", "MPO"):
            raise ValueError(f"is {image.format}, not JPEG or PNG")
        width, height = image.size
        png.check_size(width, height)
        with _unreadable():
            sideways = _orientation(image) in (5, 6, 7, 8)
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
    return (width, height) if sideways else (height, width)


def turned_in_place(data: bytes) -> bool:
    """Whether the EXIF tag of a JPEG or PNG turns or mirrors it, but to the same size.

    Then the size of a label does not show whether the label was turned too. The bytes are as `check_image` accepts
    them.
    """
    if png.is_png(data):
        if not png.has(data, b"eXIf"):
            return False
        upright, stored = (
            _decode(data, cv2.IMREAD_COLOR),
            _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION),
        )
        return upright.shape == stored.shape and bool((upright != stored).any())
    with _opened(data) as image:
        return _orientation(image) in ((2, 3, 4, 5, 6, 7, 8) if image.width == image.height else (2, 3, 4))


def _orientation(image: Image.Image) -> int:
    """The EXIF tag; Pillow's getexif() also returns that of XMP, which OpenCV and most programs ignore."""
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    return exif.get(_ORIENTATION, 1)


def read_image_file(data: bytes, bits: int = 16) -> np.ndarray:
    """Checks and decodes a user's JPEG, PNG, WebP, TIFF or BMP file, as `decode_image` does.

    Args:
      data, bits: as for `decode_image`.

    Returns:
      (H, W, 3) uint8 RGB, upright.

    Raises:
      ValueError: what is wrong with the file.
    """
    if png.is_png(data):
        check_image(data)
        return decode_image(data, bits)
    kinds = "JPEG, PNG, WebP, TIFF or BMP"
    with _opened(data, kinds) as image:
        if image.format in ("JPEG", "MPO"):
            check_image(data)
            return decode_image(data)
        if image.format not in ("WEBP", "TIFF", "BMP"):
            raise ValueError(f"is {image.format}, not {kinds}")
        png.check_size(*image.size)
        # A reader of the first one alone would drop the others without a word.
        if (count := getattr(image, "n_frames", 1)) > 1:
            raise ValueError(f"holds {count} images: save each as a file of its own")
        if image.mode in ("F", "I"):
            raise ValueError("holds values of 32 bits: save it with 8 or 16")
        if _has_16_bits(data):
            return decode_image(data, bits)  # Pillow keeps the upper 8 bits of colours, and the lower 8 of grey
        if image.mode.startswith("I;16"):
            raise ValueError("holds values of more than 8 bits, but not of 16: save it with 8 or 16")
        with _unreadable():
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))


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
        raise ValueError(f"holds the id {first.max()}; {_TOO_HIGH}")
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
        raise ValueError(f"holds the id {label.max()}; {_TOO_HIGH}")
    return label.astype(np.uint8)


def _opened(data: bytes, kinds: str = "JPEG or PNG") -> Image.Image:
    with _unreadable(kinds), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are checked here
        return Image.open(io.BytesIO(data))


@contextlib.contextmanager
def _unreadable(kinds: str = "") -> Iterator[None]:
    """Turns any exception into a ValueError: a corrupt file can make Pillow's parsers raise anything.

    `kinds`: the formats that are read, for the message about a file of another one.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot be read as an image ({_text(error, kinds)})") from error


def _text(error: Exception, kinds: str) -> str:
    """Pillow's message without the address of its in-memory file."""
    return f"not a {kinds}" if "identify image file" in str(error) else str(error).rstrip(".")


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
