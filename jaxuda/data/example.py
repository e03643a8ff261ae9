"""Records as tf.train.Example messages, the format in which tfds stores them, without a protocol buffer library.

An Example of byte strings is these strings with tags and lengths between them: one copy is enough. tfds copies an
image half a dozen times, which takes longer than all other work of `prepare`.
"""

from collections.abc import Mapping

_BYTES = 2  # the wire type of texts, byte strings and messages


def serialise(record: Mapping[str, bytes | str]) -> bytes:
    """The message Example(features(feature = {name: Feature(bytes_list([value]))})) of a record.

    Protocol Buffers Documentation, "Encoding"; the fields are those of example.proto and feature.proto of TensorFlow.
    """
    entries = []
    for name, value in record.items():
        content = value.encode() if isinstance(value, str) else value
        feature = _field(1, _field(1, [content]))  # Feature.bytes_list, BytesList.value
        entries += _field(1, _field(1, [name.encode()]) + _field(2, feature))  # Features.feature: key, value
    return b"".join(_field(1, entries))  # Example.features


def _field(number: int, content: list[bytes]) -> list[bytes]:
    """A field whose content is the parts of `content` one after another; returned in parts, too."""
    return [bytes([number << 3 | _BYTES]) + _varint(sum(map(len, content))), *content]


def _varint(value: int) -> bytes:
    """A varint: seven bits per byte, the lowest first; all but the last byte have the highest bit set."""
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])
