"""What a graph of ONNX is built from: tensors, nodes, shapes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Unsupported(Exception):
    """A variant of an operation that is not supported."""


class Value(NamedTuple):
    """A tensor of the graph.

    name: its name.
    shape: what it has, (1, A) for a broadcast that is not done yet; sizes are integers or symbolic.
    full: the shape that it has in JAX.
    """

    name: str
    shape: tuple[Any, ...]
    full: tuple[Any, ...]


class Graph:
    """Nodes and initializers under construction.

    Args:
      onnx: the package.
      sizes: symbolic size -> (name of an input, axis).
    """

    def __init__(self, onnx: Any, sizes: dict[str, tuple[str, int]]):
        self.onnx, self.nodes, self.initializers = onnx, [], []
        self._sizes, self._size_names, self._count = sizes, {}, 0

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or a list of several."""
        names = [self._new(kind) for _ in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: Any) -> str:
        """Adds numbers; returns their name."""
        name = self._new("constant")
        self.initializers.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def ints(self, numbers: Sequence[int]) -> str:
        """A vector of int64, as many nodes take shapes and axes."""
        return self.constant(np.asarray(numbers, np.int64).reshape(-1))

    def size(self, size: Any) -> str:
        """A size as a vector of one int64.

        Raises:
          Unsupported: it is a computed one, other than a multiple of a size of an argument.
        """
        if isinstance(size, int | np.integer):
            return self.ints([size])
        if match := re.fullmatch(r"(\d+)\*(\w+)", str(size)):
            return self.node("Mul", self.ints([int(match[1])]), self.size(match[2]))
        if str(size) not in self._sizes:
            raise Unsupported(f"the computed size {size}; sizes must be numbers or those of the images")
        if str(size) not in self._size_names:
            source, axis = self._sizes[str(size)]
            self._size_names[str(size)] = self.node("Shape", source, start=axis, end=axis + 1)
        return self._size_names[str(size)]

    def sizes(self, shape: Sequence[Any]) -> str:
        """A shape as a vector of int64."""
        if all(isinstance(size, int | np.integer) for size in shape):
            return self.ints(shape)
        return self.node("Concat", *(self.size(size) for size in shape), axis=0)

    def reshape(self, name: str, shape: Sequence[Any]) -> str:
        """Reshapes a tensor; one of the sizes may be a computed one, which follows from the others."""
        unknown = [place for place, size in enumerate(shape) if not isinstance(size, int | np.integer)]
        if len(unknown) == 1:  # no need to look it up
            return self.node(
                "Reshape", name, self.ints([-1 if place in unknown else n for place, n in enumerate(shape)])
            )
        return self.node("Reshape", name, self.sizes(shape))

    def expanded(self, value: Value | np.ndarray) -> str:
        """The name of a tensor with its full shape."""
        if isinstance(value, np.ndarray):
            return self.constant(value)
        if value.shape == value.full:
            return value.name
        return self.node("Expand", value.name, self.sizes(value.full))

    def plain(self, value: Value | np.ndarray) -> str:
        """The name of a tensor for a node that broadcasts by itself."""
        return self.constant(value) if isinstance(value, np.ndarray) else value.name

    def type_of(self, dtype: Any) -> int:
        """ONNX's number of a type."""
        return self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def _new(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"
