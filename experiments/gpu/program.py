"""Reads the optimized HLO of a program that is compiled for an NVIDIA GPU: kernels, arithmetic, traffic."""

import re
from collections import Counter
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
_HOST = {"infeed", "outfeed", "send", "recv"}
# Calls of cuDNN: which of result (-1) and operands are the kernel and the map with the kernel's outputs.
_PLACES = {"Forward": (1, -1), "BackwardInput": (1, 0), "BackwardFilter": (-1, 1)}


class Instruction(NamedTuple):
    """One line: name, type of the result as text, opcode, names of the operands, the rest of the line."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


class Convolution(NamedTuple):
    """A call of cuDNN.

    kind: "Forward", "BackwardInput" or "BackwardFilter".
    window: (height, width) of what the call takes for the kernel.
    result: its sizes: (examples, channels, height, width), or (out, in, height, width) of a kernel.
    where: the operation of the traced program.
    operations: two per multiply-add, in one call.
    calls: how often it is called.
    """

    kind: str
    window: tuple[int, ...]
    result: tuple[int, ...]
    where: str
    operations: float
    calls: int


class Program(NamedTuple):
    """What a program does in one run.

    convolutions: see above.
    operations: in convolutions and matrix products, two per multiply-add.
    traffic: bytes that the kernels read and write, if no cache helps.
    kernels: kernels and calls of libraries.
    moves: kernels that only transpose or copy, and the bytes that these read and write.
    host: instructions that need the host.
    double: instructions in float64.
    """

    convolutions: list[Convolution]
    operations: float
    traffic: float
    kernels: int
    moves: tuple[int, float]
    host: list[str]
    double: list[str]


def read(text: str) -> Program:
    """Reads the text of a compiled program (`jax.stages.Compiled.as_text`)."""
    computations, entry = _computations(text)
    types = {line.name: line.type for lines in computations.values() for line in lines}
    convolutions, counts, host, double = [], Counter(), [], []

    def visit(name: str, turns: int) -> None:
        for line in computations[name]:
            if line.opcode in ("while", "conditional", "call", "async-start"):
                for inner, often in _called(line):
                    visit(inner, turns * often)
                continue
            if line.opcode in _FREE or line.opcode.endswith("-done"):
                continue
            # Beside its result a library returns its workspace, which it need not touch.
            result = line.type.split("]")[0] + "]" if "__cu" in line.rest else line.type
            size = _size(result) + sum(_size(types[operand]) for operand in line.operands)
            counts["kernels"] += turns
            counts["traffic"] += turns * size
            if line.opcode in ("copy", "transpose") or (line.opcode == "fusion" and _moves(line.name)):
                counts["moves"] += turns
                counts["moved"] += turns * size
            if (found := _convolution(line, types, turns)) is not None:
                convolutions.append(found)
                counts["operations"] += turns * found.operations
            counts["operations"] += turns * _products(line, computations, types)

    visit(entry, 1)
    for lines in computations.values():
        host += [line.name for line in lines if _on_host(line)]
        double += [line.name for line in lines if "f64[" in line.type]
    return Program(
        convolutions,
        counts["operations"],
        counts["traffic"],
        counts["kernels"],
        (counts["moves"], counts["moved"]),
        host,
        double,
    )


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, by its name, and the name of the first one to run."""
    found: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif body := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            found[name].append(_instruction(body[1], body[2]))
    return found, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    end = _closing(text, start)
    return Instruction(name, kind, text[:start], tuple(re.findall(r"%([\w.\-]+)", text[start:end])), text[end + 1 :])


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"no closing bracket: {text[:200]}")


def _called(line: Instruction) -> list[tuple[str, int]]:
    """The computations that an instruction runs, and how often; of branches, all; of unknown length: once."""
    turns = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line.rest)
    often = int(turns[1]) if turns else 1
    names = re.findall(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line.rest)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line.rest):
        names += re.findall(r"%?([\w.\-]+)", branches[1])
    return [(name, often) for name in names]


def _shapes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a type: element type and sizes."""
    return [(dtype, tuple(map(int, sizes.split(","))) if sizes else ()) for dtype, sizes in _SHAPE.findall(kind)]


def _product(sizes: tuple[int, ...]) -> float:
    total = 1.0
    for size in sizes:
        total *= size
    return total


def _size(kind: str) -> float:
    """Bytes of a type. Arrays of integers of less than 8 bits count as 8."""
    return sum(
        _product(sizes) * _BYTES.get(dtype, max(1, int((re.findall(r"\d+", dtype) or ["8"])[0]) // 8))
        for dtype, sizes in _shapes(kind)
    )


def _moves(name: str) -> bool:
    return "transpose" in name or "copy" in name


def _on_host(line: Instruction) -> bool:
    target = re.search(r'custom_call_target="([^"]*)"', line.rest)
    called = target is not None and re.search("callback|host", target[1], re.IGNORECASE)
    return bool(called) or "S(5)" in line.type or line.opcode.split("-")[0] in _HOST


def _convolution(line: Instruction, types: dict[str, str], turns: int) -> Convolution | None:
    """The call of cuDNN in this line, if there is one."""
    called = re.search(r'custom_call_target="__cudnn\$conv(\w+)"', line.rest)
    if called is None:
        return None
    kind = next((kind for kind in ("BackwardInput", "BackwardFilter") if kind in called[1]), "Forward")
    arrays = [_shapes(types[operand])[0][1] for operand in line.operands] + [_shapes(line.type)[0][1]]
    kernel, made = (arrays[place] for place in _PLACES[kind])
    maps, kernels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", line.rest).group(2, 1)
    order = (
        [kernels.index(label) for label in "oi01"]
        if kind == "BackwardFilter"
        else [maps.index(label) for label in "bf01"]
    )
    window = re.search(r"window=\{size=([\dx]+)", line.rest)
    where = re.search(r'op_name="([^"]*)"', line.rest)
    return Convolution(
        kind,
        tuple(map(int, window[1].split("x"))) if window else (1, 1),
        tuple(arrays[-1][place] for place in order),
        where[1] if where else line.name,
        2.0 * _product(made) * _product(kernel) / made[maps.index("f")],
        turns,
    )


def _products(line: Instruction, computations: dict[str, list[Instruction]], types: dict[str, str]) -> float:
    """Operations of the matrix products in this line: a call of cuBLAS, a product, or those of a fusion."""
    if line.opcode == "fusion":
        return sum(_products(part, computations, types) for name, _ in _called(line) for part in computations[name])
    contracted = None
    if line.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
    elif 'custom_call_target="__cublas' in line.rest:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', line.rest)
    if contracted is None:
        return 0.0
    axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])]
    given = _shapes(types[line.operands[0]])[0][1]
    return 2.0 * _product(_shapes(line.type)[0][1]) * _product(tuple(given[axis] for axis in axes))
