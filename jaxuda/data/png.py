"""PNG files as chunks: whether one is complete, what it holds, and palette indices as grey values without encoding.

Every chunk of a PNG ends with a checksum and the last one is IEND, so that a corrupt or truncated file is found
without decompression, some fifty times faster than by decoding it (PNG specification, third edition, 5.3).
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Pillow's limit for an image (16 bytes of memory per pixel while it is decoded and checked): a file of a few kilobytes
# may declare more than any memory holds.
MOST_PIXELS = 89_478_485
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6


class Header(NamedTuple):
    """The content of IHDR: the size in pixels, the bits per sample, and the colour type (`GREY`, `RGB`, ...)."""

    width: int
    height: int
    bits: int
    colour: int


def is_png(data: bytes) -> bool:
    """Whether the bytes begin like a PNG."""
    return data.startswith(SIGNATURE)


def header(data: bytes) -> Header:
    """The header of a PNG; raises ValueError if it is missing."""
    if not is_png(data) or len(data) < 33 or data[12:16] != b"IHDR":
        raise ValueError("cannot be read as an image (its header is missing)")
    return Header(*struct.unpack(">IIBB", data[16:26]))


def check(data: bytes) -> Header:
    """The header of a complete PNG, in which all checksums are right.

    Raises:
      ValueError: what is wrong with it.
    """
    found = header(data)
    kinds = {kind for kind, _, _ in _chunks(data)}
    if b"IDAT" not in kinds:
        raise ValueError("cannot be read as an image (it has no pixels)")
    if found.width < 1 or found.height < 1:
        raise ValueError(f"cannot be read as an image (its header says {found.width}x{found.height})")
    check_size(found.width, found.height)
    return found


def check_size(width: int, height: int) -> None:
    """Raises ValueError if an image is too large to be decoded."""
    if width * height > MOST_PIXELS:
        raise ValueError(f"is {width}x{height}, more than the {MOST_PIXELS:,} pixels that are read: cut or shrink it")


def has(data: bytes, kind: bytes) -> bool:
    """Whether a complete PNG has a chunk of this kind."""
    return any(name == kind for name, _, _ in _chunks(data, checked=False))


def as_grey(data: bytes) -> bytes:
    """A palette or grey PNG as a grey one whose values are the palette's indices.

    The pixels of both are stored alike, so only the header is rewritten; chunks that could colour them are dropped.
    """
    parts = [SIGNATURE]
    for kind, start, end in _chunks(data, checked=False):
        if kind == b"IHDR":
            content = kind + data[start : start + 9] + bytes([GREY]) + data[start + 10 : end]
            parts += [struct.pack(">I", end - start), content, struct.pack(">I", zlib.crc32(content))]
        elif kind in (b"IDAT", b"IEND"):
            parts.append(data[start - 8 : end + 4])
    return b"".join(parts)


def _chunks(data: bytes, checked: bool = True) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the content of every chunk up to IEND; raises ValueError if the file is corrupt."""
    view, start = memoryview(data), len(SIGNATURE) + 8
    while True:
        if start > len(data):
            raise ValueError("cannot be read as an image (it is truncated)")
        length, kind = struct.unpack(">I4s", view[start - 8 : start])
        end = start + length
        if end + 4 > len(data):
            raise ValueError("cannot be read as an image (it is truncated)")
        if checked and zlib.crc32(view[start - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError(f"cannot be read as an image (a checksum is wrong, at byte {start})")
        yield kind, start, end
        if kind == b"IEND":
            return
        start = end + 12
