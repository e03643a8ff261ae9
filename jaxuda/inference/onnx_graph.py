"""Writes a traced JAX function as a graph of ONNX: each operation of the jaxpr becomes a few nodes.

The function may have sizes that are only known later (`jax.export.symbolic_shape`), if each is a size of an argument.
Operations on numbers that are known already are computed here, so that the graph has only what depends on the
arguments. Broadcasts are left to the nodes that read them, most of which broadcast by themselves.

The operations are those that networks for inference use; another one is an error that names the layer it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

from jaxuda.errors import UserError
from jaxuda.inference.onnx_nodes import Graph, Unsupported, Value
from jaxuda.inference.onnx_operations import OPERATIONS

OPSET, IR_VERSION = 18, 9  # of 2023; releases of onnxruntime read all older ones
# Operations that call a function, which is written in their place.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_CALLS |= {"checkpoint", "remat", "remat2"}


def write(closed: core.ClosedJaxpr, known: Sequence[np.ndarray], inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """The ONNX model of a traced function.

    Args:
      closed: the function, as `jax.jit(f).trace(...).jaxpr` gives it.
      known: the values of its first arguments, which become parts of the model.
      inputs: names for the other arguments.
      outputs: names for its results.

    Raises:
      UserError: an operation, or a size, has no form in ONNX here; or the package onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError("--export FILE.onnx needs the package onnx: pip install 'jaxuda[export]'") from error
    variables = closed.jaxpr.invars[len(known) :]
    sizes = {
        str(size): (name, axis)
        for name, variable in reversed(list(zip(inputs, variables, strict=True)))
        for axis, size in enumerate(variable.aval.shape)
        if not isinstance(size, int)
    }
    graph, helper = Graph(onnx, sizes), onnx.helper
    given = [Value(name, v.aval.shape, v.aval.shape) for name, v in zip(inputs, variables, strict=True)]
    found = run(graph, closed.jaxpr, closed.consts, [*map(np.asarray, known), *given])
    for name, value in zip(outputs, found, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.expanded(value)], [name]))

    def described(name: str, variable: Any) -> Any:
        shape = [size if isinstance(size, int) else str(size) for size in variable.aval.shape]
        return helper.make_tensor_value_info(name, graph.type_of(variable.aval.dtype), shape)

    body = helper.make_graph(
        graph.nodes,
        "jaxuda",
        [described(*pair) for pair in zip(inputs, variables, strict=True)],
        [described(*pair) for pair in zip(outputs, closed.jaxpr.outvars, strict=True)],
        graph.initializers,
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def run(
    graph: Graph, jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Value | np.ndarray], place: str = ""
) -> list[Value | np.ndarray]:
    """Adds the operations of a jaxpr to the graph.

    Args:
      graph: where to.
      jaxpr, consts: the function, and the numbers that it brings.
      arguments: what it is called with.
      place: the layer that calls it, for messages.

    Returns:
      Its results; numbers where they depend on no input of the graph.

    Raises:
      UserError: as for `write`.
    """
    env: dict[Any, Value | np.ndarray] = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    env |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Value | np.ndarray:
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, core.Literal) else env[atom]

    for equation in jaxpr.eqns:
        values, name = [read(atom) for atom in equation.invars], equation.primitive.name
        layer = "/".join(filter(None, (place, str(equation.source_info.name_stack))))
        if name in _CALLS:
            inner = next(equation.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params)
            body, own = (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())
            results = run(graph, body, own, values, layer)
        elif _is_known(equation, values):
            found = equation.primitive.bind(*values, **equation.params)
            results = list(map(np.asarray, found if equation.primitive.multiple_results else [found]))
        elif name in OPERATIONS:
            try:
                results = OPERATIONS[name](graph, equation, values)
            except Unsupported as reason:
                raise UserError(_unsupported(f"{name}: {reason}", layer)) from reason
            results = results if isinstance(results, list) else [results]
        else:
            raise UserError(_unsupported(name, layer))
        env |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _unsupported(operation: str, layer: str) -> str:
    return (
        f"ONNX: the layer {layer or '(without a name)'} needs an operation that is not supported ({operation}): export "
        "FILE.stablehlo, or write the operation in jaxuda/inference/onnx_operations.py"
    )


def _is_known(equation: Any, values: Sequence[Any]) -> bool:
    """Whether an operation is on numbers alone, and its results are not far larger than these."""
    shapes = [variable.aval.shape for variable in equation.outvars]
    if equation.primitive.name == "dim_as_value" or not all(isinstance(value, np.ndarray) for value in values):
        return False
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return False
    most = max([2**16, *(value.size for value in values)])
    return sum(int(np.prod(shape)) for shape in shapes) <= most
