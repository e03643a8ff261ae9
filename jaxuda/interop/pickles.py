"""Reads the pickles in torch files without running anything that they ask for.

A pickle is a program: Python's own reader imports and calls whatever it names. This reader is a small machine for the
operations that plain data and tensors need. The few names that it accepts stand for functions of this file, which only
record the properties of a tensor; a file with any other name or operation is refused. Python's `pickletools` splits
the bytes into operations; it runs nothing either.
"""

from __future__ import annotations

import pickletools
import struct
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxuda.errors import UserError

# A checkpoint of ResNet-101 with its optimizer's state has about 60,000 operations.
_MAX_OPERATIONS = 2_000_000
_MAX_BITS = 128


class Storage(NamedTuple):
    """A run of numbers in the file. `count` is its length; `start` and `length` are the part of it that is used."""

    key: str
    dtype: np.dtype
    count: int
    start: int
    length: int


class Tensor(NamedTuple):
    """The place of a tensor's numbers in its storage; offset and strides count elements. Nothing is checked yet."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any


class _Call:
    """A name that a pickle may call; `build` makes its value, which does nothing."""

    def __init__(self, build: Any):
        self.build = build


class _Opaque:
    """A value that weights do not need (a NumPy scalar, a device): its content is dropped."""


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without numbers")
    return Tensor(storage, offset, shape, strides)


def _ordered_dict(items: Any = ()) -> dict:
    made: dict = {}
    for key, value in items:
        _set_item(made, key, value)
    return made


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _opaque(*_: Any) -> _Opaque:
    return _Opaque()


STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_NAMES: dict[str, Any] = {
    "collections OrderedDict": _Call(_ordered_dict),
    "torch._utils _rebuild_tensor": _Call(_tensor),
    "torch._utils _rebuild_tensor_v2": _Call(_tensor),
    "torch._utils _rebuild_parameter": _Call(_parameter),
    "torch Size": _Call(_opaque),
    "torch device": _Call(_opaque),
    # Scores that training loops save beside the weights.
    "numpy dtype": _Call(_opaque),
    "numpy.core.multiarray scalar": _Call(_opaque),
    "numpy._core.multiarray scalar": _Call(_opaque),
    "_codecs encode": _Call(_opaque),
    **{f"torch {name}": np.dtype(dtype) for name, dtype in STORAGES.items()},
    **{f"torch.cuda {name}": np.dtype(dtype) for name, dtype in STORAGES.items()},
}
# Operations that put their own argument on the stack.
_PLAIN = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def load(data: BinaryIO, where: str) -> Any:
    """The value of the pickle that begins at the position of `data`; afterwards the position is its end.

    Args:
      data: with read, readline and tell; they never return more bytes than there are.
      where: names the file in messages.

    Returns:
      None, bool, int, float, str, bytes, list, tuple, dict (with str or int keys), `Tensor`, `Storage` or `_Opaque`.
      Its parts may be shared and, in a hostile file, it may contain itself.

    Raises:
      UserError: it names something that tensors do not need, or it is corrupt.
    """
    machine = _Machine(where)
    try:
        for done, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if done > _MAX_OPERATIONS:
                raise UserError(f"{where} is refused: its list of tensors is longer than any network's")
            if operation.name == "STOP":
                return machine.stack.pop()
            machine.step(operation.name, argument)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error) as error:
        raise UserError(f"{where} is corrupt: its list of tensors cannot be read") from error
    raise UserError(f"{where} is corrupt: its list of tensors has no end")


class _Machine:
    """The stack, the marks on it and the memo of one pickle."""

    def __init__(self, where: str):
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # what lies under each mark
        self._memo: dict[int, Any] = {}
        self._where = where

    def step(self, name: str, argument: Any) -> None:
        """One operation."""
        if name in _PLAIN:
            if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
                raise ValueError("a number that is too large for a size")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif name not in ("PROTO", "FRAME"):
            method = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise self._refusal(f"uses the pickle operation {name}")
            method(argument)

    def _refusal(self, what: str) -> UserError:
        return UserError(
            f"{self._where} is refused: it {what}, which weights do not need and which could run a program. Nothing "
            "in it was run. If you trust its origin, load it in torch and save only its state_dict()"
        )

    def _pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def _mark(self, _: None) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def _empty_list(self, _: None) -> None:
        self.stack.append([])

    def _empty_dict(self, _: None) -> None:
        self.stack.append({})

    def _tuple(self, _: None) -> None:
        items = self._pop_to_mark()
        self.stack.append(tuple(items))

    def _tuple1(self, _: None) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self, _: None) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: None) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _append(self, _: None) -> None:
        value = self.stack.pop()
        _of_type(self.stack[-1], list).append(value)

    def _appends(self, _: None) -> None:
        items = self._pop_to_mark()
        _of_type(self.stack[-1], list).extend(items)

    def _setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_item(_of_type(self.stack[-1], dict), key, value)

    def _setitems(self, _: None) -> None:
        items = self._pop_to_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set_item(_of_type(self.stack[-1], dict), key, value)

    def _global(self, name: str) -> None:
        if name not in _NAMES:
            raise self._refusal(f"asks for {shown(name.replace(' ', '.'))}")
        self.stack.append(_NAMES[name])

    def _stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._global(f"{_of_type(module, str)} {_of_type(name, str)}")

    def _reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Call):
            raise self._refusal("calls something that is not a function")
        self.stack.append(function.build(*_of_type(arguments, tuple)))

    def _build(self, _: None) -> None:
        self.stack.pop()  # attributes, such as the versions in a state_dict, are not needed
        if not isinstance(self.stack[-1], dict | _Opaque):
            raise self._refusal("sets attributes")

    def _binpersid(self, _: None) -> None:
        kind, dtype, key, _location, count, *view = _of_type(self.stack.pop(), tuple)
        if kind not in ("storage", b"storage") or not isinstance(dtype, np.dtype):
            raise ValueError("a persistent id that is not a storage")
        # In files of torch 0.x it may be a part of another storage: (its own key, offset, length).
        _, start, length = (view and view[0]) or (None, 0, count)
        numbers = (_of_type(number, int) for number in (count, start, length))
        self.stack.append(Storage(str(_of_type(key, str)), dtype, *numbers))


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"not a {kind.__name__}")
    return value


def _set_item(target: dict, key: Any, value: Any) -> None:
    # Tensors have no other keys, and hashing nested tuples can take forever.
    if type(key) not in (str, int):
        raise TypeError("a key that is neither text nor a number")
    target[key] = value


def shown(name: str) -> str:
    """A name from a file in a form that is safe to print: short, without control characters."""
    text = ascii(name)[1:-1]
    return text if len(text) <= 100 else f"{text[:97]}..."
