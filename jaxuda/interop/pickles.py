"""Reads the pickles in torch files without running anything that they ask for.

A pickle is a program: Python's own reader imports and calls whatever it names. This reader is a small machine for the
operations that plain data and tensors need. The names that it accepts are those of `pickle_names`: they stand for
functions of ours, which only record the properties of a tensor. A file with any other name or operation is refused.
Python's `pickletools` splits the bytes into operations; it runs nothing either.
"""

from __future__ import annotations

import pickletools
import struct
from typing import Any, BinaryIO

import numpy as np

from jaxuda.errors import UserError
from jaxuda.interop.pickle_names import NAMES, TYPES, Call, Opaque, Storage, Type, Unread, of_type, opaque, set_item

# A checkpoint of ResNet-101 with its optimizer's state has about 60,000 operations.
_MAX_OPERATIONS = 2_000_000
_MAX_BITS = 128
# Operations that put their own argument on the stack.
_PLAIN = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def load(data: BinaryIO, where: str) -> Any:
    """The value of a pickle; see `load_with_storages`."""
    return load_with_storages(data, where)[0]


def load_with_storages(data: BinaryIO, where: str) -> tuple[Any, list[Storage]]:
    """The value of the pickle that begins at the position of `data`; afterwards the position is its end.

    Args:
      data: with read, readline and tell; they never return more bytes than there are.
      where: names the file in messages.

    Returns:
      The value: None, bool, int, float, str, bytes, list, tuple, dict, `Tensor`, `Unread`, `Storage` or `Opaque`.
      Its parts may be shared and, in a hostile file, it may contain itself. And all storages that it names, also those
      of tensors that are not read.

    Raises:
      UserError: it names something that tensors do not need, or it is corrupt.
    """
    machine = _Machine(where)
    try:
        for done, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if done > _MAX_OPERATIONS:
                raise UserError(f"{where} is refused: its list of tensors is longer than any network's")
            if operation.name == "STOP":
                return machine.stack.pop(), machine.storages
            machine.step(operation.name, argument)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error) as error:
        raise UserError(f"{where} is corrupt: its list of tensors cannot be read") from error
    raise UserError(f"{where} is corrupt: its list of tensors has no end")


class _Machine:
    """The stack, the marks on it and the memo of one pickle."""

    def __init__(self, where: str):
        self.stack: list[Any] = []
        self.storages: list[Storage] = []
        self._below: list[list[Any]] = []  # what lies under each mark
        self._memo: dict[int, Any] = {}
        self._where = where

    def step(self, name: str, argument: Any) -> None:
        """One operation."""
        if name in _PLAIN:
            too_large = isinstance(argument, int) and argument.bit_length() > _MAX_BITS  # for a size of a tensor
            self.stack.append(Opaque() if too_large else argument)
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

    def _empty_set(self, _: None) -> None:
        self.stack.append(Opaque())

    def _frozenset(self, _: None) -> None:
        self._pop_to_mark()
        self.stack.append(Opaque())

    def _additems(self, _: None) -> None:
        self._pop_to_mark()

    def _append(self, _: None) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], Opaque):
            of_type(self.stack[-1], list).extend(items)

    def _setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _setitems(self, _: None) -> None:
        self._update(self._pop_to_mark())

    def _update(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], Opaque):
            return
        target = of_type(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            set_item(target, key, value)

    def _global(self, name: str) -> None:
        if TYPES.fullmatch(name):
            self.stack.append(Type(name.removeprefix("torch ")))
            return
        name = name.replace("__builtin__ ", "builtins ")  # as Python 2 called it
        if name not in NAMES:
            raise self._refusal(f"asks for {shown(name.replace(' ', '.'))}")
        self.stack.append(NAMES[name])

    def _stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._global(f"{of_type(module, str)} {of_type(name, str)}")

    def _reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Call):
            raise self._refusal("calls something that is not a function")
        self.stack.append(function.build(*of_type(arguments, tuple)))

    def _newobj(self, _: None) -> None:
        self.stack.pop()
        function = self.stack.pop()
        if not isinstance(function, Call) or function.build is not opaque:
            raise self._refusal("uses the pickle operation NEWOBJ")
        self.stack.append(Opaque())

    def _build(self, _: None) -> None:
        self.stack.pop()  # attributes, such as the versions in a state_dict, are not needed
        if not isinstance(self.stack[-1], dict | Opaque | Unread):
            raise self._refusal("sets attributes")

    def _binpersid(self, _: None) -> None:
        kind, dtype, key, _location, count, *view = of_type(self.stack.pop(), tuple)
        if kind not in ("storage", b"storage") or not isinstance(dtype, np.dtype):
            raise ValueError("a persistent id that is not a storage")
        # In files of torch 0.x it may be a part of another storage: (its own key, offset, length).
        _, start, length = (view and view[0]) or (None, 0, count)
        numbers = (of_type(number, int) for number in (count, start, length))
        self.storages.append(Storage(str(of_type(key, str)), dtype, *numbers))
        self.stack.append(self.storages[-1])


def shown(name: str) -> str:
    """A name from a file in a form that is safe to print: short, without control characters."""
    text = ascii(name)[1:-1]
    return text if len(text) <= 100 else f"{text[:97]}..."
