import io
import struct
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from jaxuda.data import encoding

RNG = np.random.default_rng(0)


def _bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_round_trips():
    image = RNG.integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(encoding.decode_image(encoding.encode_image(image)), image)
    label = RNG.integers(0, 256, (5, 7), np.uint8)
    np.testing.assert_array_equal(encoding.decode_label(encoding.encode_label(label)), label)
    depth = RNG.integers(0, 65536, (5, 7), np.uint16)
    decoded = encoding.decode_depth(encoding.encode_depth(depth))
    assert decoded.dtype == np.uint16
    np.testing.assert_array_equal(decoded, depth)


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="label must be uint8 with 2 axes"):
        encoding.encode_label(np.zeros((4, 4), np.int32))
    with pytest.raises(ValueError, match="depth must be uint16"):
        encoding.decode_depth(encoding.encode_label(np.zeros((4, 4), np.uint8)))
    with pytest.raises(ValueError, match="cannot be decoded"):
        encoding.decode_image(b"")


def test_inverse_depth():
    depth = encoding.inverse_depth(np.array([[0, 1, 65535]], np.uint16))
    assert depth.dtype == np.float32
    np.testing.assert_array_equal(depth, [[65536, 32768, 1]])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "RGB", "CMYK"])
def test_every_kind_of_image_becomes_rgb(mode):
    picture = Image.fromarray(np.full((4, 6, 3), (200, 30, 90), np.uint8)).convert(mode)
    decoded = encoding.decode_image(_bytes(picture, "JPEG" if mode == "CMYK" else "PNG"))
    assert decoded.shape == (4, 6, 3)
    expected = np.asarray(picture.convert("RGB"), int)
    assert np.abs(decoded - expected).max() <= (6 if mode == "CMYK" else 0)


def test_jpeg_agrees_with_pillow():
    ramp = np.linspace(0, 255, 32 * 48 * 3).reshape(32, 48, 3).astype(np.uint8)
    data = _bytes(Image.fromarray(ramp), "JPEG", quality=95)
    difference = encoding.decode_image(data).astype(int) - np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(difference).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    picture = Image.fromarray(np.zeros((16, 32, 3), np.uint8))
    picture.paste((255, 0, 0), (0, 0, 8, 8))  # red corner: top left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _bytes(picture, "JPEG", exif=exif, quality=95)
    upright = encoding.decode_image(data)
    assert upright.shape[:2] == ((32, 16) if orientation > 4 else (16, 32))
    corners = [upright[2, 2], upright[2, -3], upright[-3, -3], upright[-3, 2]]  # clockwise from top left
    # As the standard has it: where the first row and column of the file are shown.
    assert int(np.argmax([c[0] for c in corners])) == {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]
    assert encoding.check_image(data) == upright.shape[:2]


def test_only_exif_turns_an_image():
    """Pillow also heeds XMP, which OpenCV and most viewers do not; both checks must agree with what is read."""
    tiff = b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"'
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description ' + tiff + b"/></x:xmpmeta>"
    data = _bytes(Image.new("RGB", (32, 16)), "JPEG", xmp=xmp)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    assert encoding.check_image(data) == encoding.decode_image(data).shape[:2] == (16, 32)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(16, 16), (32, 16)])
def test_images_that_are_turned_to_the_same_size(format, size):
    picture, exif = Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), np.uint8)), Image.Exif()
    for tag in range(1, 9):
        exif[0x0112] = tag
        same = tag in (2, 3, 4) or (tag > 4 and size == (16, 16))
        assert encoding.turned_in_place(_bytes(picture, format, exif=exif)) == same, tag
    assert not encoding.turned_in_place(_bytes(picture, format))


def test_check_image_sees_what_opencv_hides():
    whole = _bytes(Image.fromarray(RNG.integers(0, 256, (40, 40, 3), np.uint8)), "JPEG")
    assert encoding.check_image(whole) == (40, 40)
    with pytest.raises(ValueError, match="truncated"):
        encoding.check_image(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a JPEG or PNG"):
        encoding.check_image(b"hello")
    with pytest.raises(ValueError, match="is BMP, not JPEG or PNG"):
        encoding.check_image(_bytes(Image.new("RGB", (4, 4)), "BMP"))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_photos_of_every_format_are_read(format, mode):
    picture = Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).convert(mode)
    read = encoding.read_image_file(_bytes(picture, format, **({"lossless": True} if format == "WEBP" else {})))
    np.testing.assert_array_equal(read, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("format", ["WEBP", "TIFF"])
def test_photos_of_other_formats_are_turned_upright(format):
    image, exif = RNG.integers(0, 256, (6, 8, 3), np.uint8), Image.Exif()
    exif[0x0112] = 6
    data = _bytes(Image.fromarray(image), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    np.testing.assert_array_equal(encoding.read_image_file(data), np.rot90(image, -1))


def test_files_that_would_be_read_wrongly_are_refused():
    picture = Image.fromarray(RNG.integers(0, 256, (6, 8), np.uint8))
    bad = {
        "holds 2 images": _bytes(picture, "TIFF", save_all=True, append_images=[picture]),
        "values of 32 bits": _bytes(picture.convert("F"), "TIFF"),
        "is GIF, not JPEG, PNG, WebP, TIFF or BMP": _bytes(picture, "GIF"),
        "not a JPEG, PNG, WebP, TIFF or BMP": b"hello",
        "truncated": _bytes(picture, "BMP")[:-5],
        "cannot be read": _bytes(picture, "WEBP")[:-5],
    }
    for message, data in bad.items():
        with pytest.raises(ValueError, match=message):
            encoding.read_image_file(data)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_16_bits_that_hold_fewer_are_seen_and_can_be_stretched(ending, channels):
    image = RNG.integers(0, 256, (6, 8, channels), np.uint8)
    image[0, 0], image[0, 1] = 0, 255
    colour = np.repeat(image, 3, 2) if channels == 1 else image[..., 2::-1]  # OpenCV writes BGR
    for bits in (8, 12, 16):
        deep = image.astype(np.uint16) << (bits - 8)
        if channels == 4:
            deep[..., 3] = 65535  # an opaque image
        data = cv2.imencode(ending, deep)[1].tobytes()
        assert encoding.value_range(data) == (0, 255 << (bits - 8))
        np.testing.assert_array_equal(encoding.read_image_file(data, bits), colour)
        np.testing.assert_array_equal(encoding.read_image_file(data), colour >> (16 - bits))
    assert encoding.value_range(_bytes(Image.fromarray(colour))) is None
    # Values above the range that the user names do not wrap.
    assert encoding.read_image_file(data, 12).max() == 255 and encoding.read_image_file(data, 12)[0, 1].min() == 255


def test_the_warning_about_dark_images_names_their_range_and_what_to_do():
    ranges = {"a.png": (0, 65000), "b.png": (3, 4080), "c.tif": (7, 200)}
    text = encoding.range_warning(ranges)
    assert text.startswith("2 of the 3 images of 16 bits use only the values 3 to 4080 of 65535, such as b.png")
    assert "add --image_bits 12, which makes 4095 white" in text
    assert "--image_bits 8, which makes 255 white" in encoding.range_warning({"c.tif": (7, 200)})
    assert encoding.range_warning({"a.png": (0, 65000)}) == "" == encoding.range_warning({})
    white = "1 images have values above 1023, up to 4080, such as b.png: --image_bits 10 makes them white"
    assert encoding.range_warning({"b.png": (3, 4080), "c.tif": (7, 1023)}, 10) == white
    assert encoding.range_warning({"b.png": (3, 4080)}, 12) == ""


def test_images_that_pillow_would_cut_are_read_whole_or_refused():
    grey = np.arange(96, dtype=np.uint16).reshape(8, 12) * 40
    big = io.BytesIO()
    Image.fromarray(grey).save(big, "TIFF", big_tiff=True)
    assert encoding.value_range(big.getvalue()) == (0, 3800)
    np.testing.assert_array_equal(encoding.read_image_file(big.getvalue(), 12)[..., 0], grey >> 4)
    pairs = grey.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    tags = {256: 12, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 8, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    with pytest.raises(ValueError, match="more than 8 bits, but not of 16"):
        encoding.read_image_file(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed)
    frames, moving = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")], io.BytesIO()
    frames[0].save(moving, "PNG", save_all=True, append_images=frames[1:])
    for read in (encoding.check_image, encoding.read_image_file):
        with pytest.raises(ValueError, match="is an animation"):
            read(moving.getvalue())


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (4200, 4100)])
def test_ids_are_counted_exactly(size):
    label = np.zeros(size, np.uint8)
    label[-1, -1] = 255
    expected = np.zeros(256, np.int64)
    expected[0], expected[255] = label.size - 1, 1
    np.testing.assert_array_equal(encoding.count_ids(label), expected)


def test_label_files_are_read_as_ids():
    ids = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)
    palette = Image.fromarray(ids, "P")
    palette.putpalette([128, 64, 128, 0, 0, 0, 9, 9, 9, 70, 70, 70])
    wide = Image.fromarray(ids.astype(np.uint16))
    for picture in (Image.fromarray(ids), palette, wide):
        read = encoding.read_label_file(_bytes(picture))
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, ids)
    binary = Image.fromarray((ids > 1) * np.uint8(255)).convert("1")
    np.testing.assert_array_equal(encoding.read_label_file(_bytes(binary)), ids > 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits_of_grey_are_not_stretched(bits):
    import struct
    import zlib

    # Pillow writes no such file: one row, four pixels with the values 0, 1, 2, 3.
    row = {2: bytes([0b00011011]), 4: bytes([0x01, 0x23])}[bits]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    np.testing.assert_array_equal(encoding.read_label_file(data + chunk(b"IEND", b"")), [[0, 1, 2, 3]])


def test_label_files_without_ids_are_refused():
    with pytest.raises(ValueError, match="holds colours"):
        encoding.read_label_file(_bytes(Image.new("RGB", (2, 2))))
    with pytest.raises(ValueError, match="is JPEG; labels must be PNG"):
        encoding.read_label_file(_bytes(Image.new("L", (2, 2)), "JPEG"))
    with pytest.raises(ValueError, match="holds the id 300"):
        encoding.read_label_file(_bytes(Image.fromarray(np.full((2, 2), 300, np.uint16))))


def test_tensorflow_is_never_imported():
    code = "import sys, jaxuda.prepare, jaxuda.data.encoding as e, jaxuda.data.datasets as d; d.names()\n"
    code += "e.features(depth=True)\nassert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
