"""The operations of JAX that networks use, as nodes of ONNX."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxuda.inference.onnx_nodes import Graph, Unsupported, Value

_TO_THE_END = np.iinfo(np.int64).max  # the end of a slice


Tensor = Value | np.ndarray
Operation = Callable[[Graph, Any, Sequence[Tensor]], "Tensor | list[Tensor]"]


def _made(equation: Any, name: str) -> Value:
    """The result of an operation, with its full shape."""
    shape = equation.outvars[0].aval.shape
    return Value(name, shape, shape)


def _same(graph: Graph, equation: Any, values: Sequence[Tensor]) -> list[Tensor]:
    return list(values)


def _joint(graph: Graph, equation: Any, values: Sequence[Tensor], write: Callable[..., str]) -> Value:
    """An operation on each entry. Operands that are still to be broadcast give such a result."""
    full = equation.outvars[0].aval.shape
    shapes = [np.shape(value) if isinstance(value, np.ndarray) else value.shape for value in values]
    padded = [(1,) * (len(full) - len(shape)) + tuple(shape) for shape in shapes]
    joint = tuple(next((n for n in column if n != 1), 1) for column in zip(*padded, strict=True))
    return Value(write(*(graph.plain(value) for value in values)), joint, full)


def _each(kind: str) -> Operation:
    def operation(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
        return _joint(graph, equation, values, partial(graph.node, kind))

    return operation


def _combined(*kinds: str) -> Operation:
    """Several nodes, one after another: the first on the operands, each other on the result before."""

    def operation(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
        def write(*names: str) -> str:
            name = graph.node(kinds[0], *names)
            for kind in kinds[1:]:
                name = graph.node(kind, name)
            return name

        return _joint(graph, equation, values, write)

    return operation


def _select(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    if len(values) != 3 or equation.invars[0].aval.dtype != np.bool_:
        raise Unsupported("a choice among more than two")
    return _joint(graph, equation, values, lambda which, no, yes: graph.node("Where", which, yes, no))


def _clamp(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    def write(low: str, x: str, high: str) -> str:
        return graph.node("Min", graph.node("Max", x, low), high)

    return _joint(graph, equation, values, write)


def _cast(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    number = graph.type_of(equation.params["new_dtype"])
    return _joint(graph, equation, values, lambda x: graph.node("Cast", x, to=number))


def _integer_power(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    power = graph.constant(np.asarray(equation.params["y"], equation.invars[0].aval.dtype))
    return _joint(graph, equation, values, lambda x: graph.node("Pow", x, power))


def _remainder(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    return _joint(graph, equation, values, partial(graph.node, "Mod", fmod=1))  # the sign of the first, as in JAX


def _erfc(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    """erfc(x) = 1 - erf(x)."""
    one = graph.constant(np.ones((), equation.invars[0].aval.dtype))
    return _joint(graph, equation, values, lambda x: graph.node("Sub", one, graph.node("Erf", x)))


def _broadcast(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    """Only puts the axes in their places; the nodes that read the result repeat it."""
    full, places = equation.outvars[0].aval.shape, equation.params["broadcast_dimensions"]
    value = values[0]
    old = np.shape(value) if isinstance(value, np.ndarray) else value.shape
    shape = [1] * len(full)
    for place, size in zip(places, old, strict=True):
        shape[place] = size
    if isinstance(value, np.ndarray):
        return Value(graph.constant(value.reshape(shape)), tuple(shape), full)
    if len(old) == len(full):
        return Value(value.name, tuple(shape), full)
    axes = graph.ints([axis for axis in range(len(full)) if axis not in places])
    return Value(graph.node("Unsqueeze", value.name, axes), tuple(shape), full)


def _reshape(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    if equation.primitive.name == "reshape" and equation.params["dimensions"] is not None:
        raise Unsupported("with a transposition")
    return _made(equation, graph.reshape(graph.expanded(values[0]), equation.outvars[0].aval.shape))


def _transpose(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    return _made(equation, graph.node("Transpose", graph.expanded(values[0]), perm=equation.params["permutation"]))


def _concatenate(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    names = [graph.expanded(value) for value in values]
    return _made(equation, graph.node("Concat", *names, axis=equation.params["dimension"]))


def _slice(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    steps = equation.params["strides"] or (1,) * len(starts)
    sizes = equation.invars[0].aval.shape
    cut = [axis for axis, size in enumerate(sizes) if (starts[axis], limits[axis], steps[axis]) != (0, size, 1)]
    ends = [_TO_THE_END if limits[axis] is sizes[axis] or limits[axis] == sizes[axis] else limits[axis] for axis in cut]
    chosen = ([starts[axis] for axis in cut], ends, cut, [steps[axis] for axis in cut])
    if not all(isinstance(number, int) for numbers in chosen for number in numbers):
        raise Unsupported(f"from {starts} to {limits}; places must be numbers")
    return _made(equation, graph.node("Slice", graph.expanded(values[0]), *map(graph.ints, chosen)))


def _gather(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    """One window at known places, as `x[:, 2:5, 3:7]` of an array with a symbolic size is traced."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    axes, operand = numbers.start_index_map, equation.invars[0].aval
    whole = all(sizes[axis] == size for axis, size in enumerate(operand.shape) if axis not in axes)
    if not isinstance(values[1], np.ndarray) or values[1].ndim != 1 or numbers.operand_batching_dims or not whole:
        raise Unsupported("a choice of several places, or of places that depend on the images")
    lengths = [sizes[axis] for axis in axes]
    if not all(isinstance(size, int) for size in (*lengths, *(operand.shape[axis] for axis in axes))):
        raise Unsupported("a window of a computed size")
    starts = [min(max(int(n), 0), operand.shape[a] - sizes[a]) for n, a in zip(values[1], axes, strict=True)]
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    name = graph.node("Slice", graph.expanded(values[0]), *map(graph.ints, (starts, ends, axes)))
    return _made(
        equation, graph.reshape(name, equation.outvars[0].aval.shape) if numbers.collapsed_slice_dims else name
    )


def _reverse(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    axes = equation.params["dimensions"]
    ends = graph.ints([-_TO_THE_END] * len(axes))
    backwards = graph.ints([-1] * len(axes))
    return _made(equation, graph.node("Slice", graph.expanded(values[0]), backwards, ends, graph.ints(axes), backwards))


def _pad(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    """Negative padding cuts; in ONNX too."""
    low, high, between = zip(*equation.params["padding_config"], strict=True)
    if any(between):
        raise Unsupported("between entries")
    value, fill = (graph.expanded(each) for each in values)
    return _made(equation, graph.node("Pad", value, graph.ints([*low, *high]), fill))


def _split(graph: Graph, equation: Any, values: Sequence[Tensor]) -> list[Value]:
    sizes, variables = equation.params["sizes"], equation.outvars
    value, axis = graph.expanded(values[0]), equation.params["axis"]
    names = graph.node("Split", value, graph.ints(sizes), outputs=len(sizes), axis=axis)
    names = [names] if len(sizes) == 1 else names
    return [Value(name, v.aval.shape, v.aval.shape) for name, v in zip(names, variables, strict=True)]


def _unstack(graph: Graph, equation: Any, values: Sequence[Tensor]) -> list[Value]:
    axis, shapes = equation.params["axis"], [variable.aval.shape for variable in equation.outvars]
    names = graph.node(
        "Split", graph.expanded(values[0]), graph.ints([1] * len(shapes)), outputs=len(shapes), axis=axis
    )
    names = [names] if len(shapes) == 1 else names
    return [Value(graph.node("Squeeze", n, graph.ints([axis])), s, s) for n, s in zip(names, shapes, strict=True)]


def _iota(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    full, axis = equation.outvars[0].aval.shape, equation.params["dimension"]
    zero, one = (graph.constant(np.int64(number)) for number in (0, 1))
    line = graph.node("Range", zero, graph.node("Squeeze", graph.size(full[axis])), one)
    line = graph.node("Cast", line, to=graph.type_of(equation.params["dtype"]))
    shape = [1] * len(full)
    shape[axis] = full[axis]
    line = graph.node("Reshape", line, graph.ints([-1 if place == axis else 1 for place in range(len(full))]))
    return Value(line, tuple(shape), full)


def _size(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    number = graph.node("Squeeze", graph.size(equation.params["dim"]))
    return _made(equation, graph.node("Cast", number, to=graph.type_of(equation.outvars[0].aval.dtype)))


def _reduce(kind: str) -> Operation:
    def operation(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
        axes, x = graph.ints(equation.params["axes"]), graph.expanded(values[0])
        if equation.invars[0].aval.dtype != np.bool_:
            return _made(equation, graph.node(kind, x, axes, keepdims=0))
        number = graph.node("Cast", x, to=graph.type_of(np.int32))
        found = graph.node(kind, number, axes, keepdims=0)
        return _made(equation, graph.node("Cast", found, to=graph.type_of(np.bool_)))

    return operation


def _arg(kind: str) -> Operation:
    def operation(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
        (axis,) = equation.params["axes"]
        found = graph.node(kind, graph.expanded(values[0]), axis=axis, keepdims=0, select_last_index=0)
        return _made(equation, graph.node("Cast", found, to=graph.type_of(equation.params["index_dtype"])))

    return operation


def _product(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    """Every product of tensors is a sum over letters: "nij,njk->nik"."""
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    letters = iter(string.ascii_letters)
    left = [next(letters) for _ in equation.invars[0].aval.shape]
    right = [next(letters) for _ in equation.invars[1].aval.shape]
    for ours, theirs in ((left_sum, right_sum), (left_batch, right_batch)):
        for i, j in zip(ours, theirs, strict=True):
            right[j] = left[i]
    batch = [left[i] for i in left_batch]
    shared = {left[i] for i in (*left_sum, *left_batch)}
    result = batch + [letter for letter in left + right if letter not in shared]
    rule = f"{''.join(left)},{''.join(right)}->{''.join(result)}"
    name = graph.node("Einsum", *(graph.expanded(value) for value in values), equation=rule)
    if equation.invars[0].aval.dtype != equation.outvars[0].aval.dtype:
        name = graph.node("Cast", name, to=graph.type_of(equation.outvars[0].aval.dtype))
    return _made(equation, name)


def _convolution(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    params = equation.params
    if params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
        raise Unsupported("a transposed convolution")
    image, kernel, result = params["dimension_numbers"]
    low, high = zip(*params["padding"], strict=True)
    if isinstance(values[1], np.ndarray):
        weight = graph.constant(values[1].transpose(kernel))
    else:
        weight = graph.node("Transpose", graph.expanded(values[1]), perm=kernel)
    name = graph.node(
        "Conv",
        graph.node("Transpose", graph.expanded(values[0]), perm=image),
        weight,
        strides=params["window_strides"],
        pads=[*low, *high],
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )
    return _made(equation, graph.node("Transpose", name, perm=np.argsort(result).tolist()))


def _max_pool(graph: Graph, equation: Any, values: Sequence[Tensor]) -> Value:
    params = equation.params
    windows, strides, pads = params["window_dimensions"], params["window_strides"], params["padding"]
    dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
    spatial = [axis for axis in range(len(windows)) if (windows[axis], strides[axis], *pads[axis]) != (1, 1, 0, 0)]
    others = [axis for axis in range(len(windows)) if axis not in spatial]
    if dilated or len(others) != 2:
        raise Unsupported(f"windows of {windows}")
    order = others + spatial
    low, high = zip(*(pads[axis] for axis in spatial), strict=True)
    name = graph.node(
        "MaxPool",
        graph.node("Transpose", graph.expanded(values[0]), perm=order),
        kernel_shape=[windows[axis] for axis in spatial],
        strides=[strides[axis] for axis in spatial],
        pads=[*low, *high],
    )
    return _made(equation, graph.node("Transpose", name, perm=np.argsort(order).tolist()))


OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(("stop_gradient", "copy", "copy_p", "reduce_precision", "optimization_barrier"), _same),
    **{name: _each(kind) for name, kind in {"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul"}.items()},
    **{name: _each(kind) for name, kind in {"div": "Div", "max": "Max", "min": "Min", "pow": "Pow"}.items()},
    **{name: _each(kind) for name, kind in {"and": "And", "or": "Or", "not": "Not", "eq": "Equal"}.items()},
    **{name: _each(kind) for name, kind in {"lt": "Less", "gt": "Greater", "neg": "Neg", "abs": "Abs"}.items()},
    **{name: _each(kind) for name, kind in {"le": "LessOrEqual", "ge": "GreaterOrEqual", "sign": "Sign"}.items()},
    **{name: _each(kind) for name, kind in {"exp": "Exp", "log": "Log", "sqrt": "Sqrt", "erf": "Erf"}.items()},
    **{name: _each(kind) for name, kind in {"tanh": "Tanh", "logistic": "Sigmoid", "floor": "Floor"}.items()},
    **{name: _each(kind) for name, kind in {"ceil": "Ceil", "sin": "Sin", "cos": "Cos"}.items()},
    "rsqrt": _combined("Sqrt", "Reciprocal"),
    "ne": _combined("Equal", "Not"),
    "erfc": _erfc,
    "integer_pow": _integer_power,
    "square": lambda graph, equation, values: _joint(graph, equation, values, lambda x: graph.node("Mul", x, x)),
    "rem": _remainder,
    "select_n": _select,
    "clamp": _clamp,
    "convert_element_type": _cast,
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "transpose": _transpose,
    "concatenate": _concatenate,
    "slice": _slice,
    "gather": _gather,
    "rev": _reverse,
    "pad": _pad,
    "split": _split,
    "unstack": _unstack,
    "iota": _iota,
    "dim_as_value": _size,
    **{name: _reduce(kind) for name, kind in {"reduce_sum": "ReduceSum", "reduce_prod": "ReduceProd"}.items()},
    **{name: _reduce(kind) for name, kind in {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}.items()},
    **{name: _reduce(kind) for name, kind in {"reduce_and": "ReduceMin", "reduce_or": "ReduceMax"}.items()},
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "reduce_window_max": _max_pool,
}
