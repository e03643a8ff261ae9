"""What a training stage costs, found without training it: parameters, arithmetic, memory and time of a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from ml_collections import ConfigDict

from jaxuda import parallel
from jaxuda.data.labels import label_space
from jaxuda.data.records import Domains
from jaxuda.pipeline import stages
from jaxuda.pipeline.domains import load_domains
from jaxuda.pipeline.tracing import abstract_step

PyTree = Any
GIB = 2**30
LONGEST = 10.0  # seconds: a step whose matrix products alone would take longer is not run
NOTES = """GiB on each device:
'compiled' is what its compiler plans for state, images and working memory; 'traced' is what is in use if the operations
run in the order of the program and none are fused. TFLOP per step: convolutions and matrix products, two operations per
multiply-add. s/step: measured on a step that was run on zeros; with *, a lower bound: the time that matrix products of
as many operations take here. Evaluations, sweeps and decoding are not included."""


class Cost(NamedTuple):
    """The cost of one training step. Bytes are per device, operations of all devices together.

    parameters: of the network and of what the method adds.
    operations: in convolutions and matrix products.
    traced, compiled: bytes, see `NOTES`.
    seconds: per step: measured, or the time that matrix products of as many operations take.
    measured: whether the step was run to measure `seconds`.
    """

    parameters: int
    operations: float
    traced: int
    compiled: int
    seconds: float
    measured: bool


def step_cost(config: Any, classes: int, devices: list[jax.Device], rate: float) -> Cost:
    """The cost of one step of a training stage.

    Args:
      config: the stage's resolved config.
      classes: the number of classes of the label space.
      devices: those that share the batch. The first one's share is compiled, and run if it is not too large.
      rate: operations per second of matrix products on the first device.
    """
    step, arguments = abstract_step(config, classes, config.batch // len(devices), config.model.get("depth", False))
    jaxpr = jax.make_jaxpr(step)(*arguments).jaxpr
    count = operations(jaxpr)
    compiled = parallel.jit_step(step, devices[0]).lower(*arguments).compile()
    plan = compiled.memory_analysis()
    # The state is donated: the new state takes the memory of the old one.
    total = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    seconds, measured = count / rate, False
    if seconds < LONGEST and total < _memory(devices[0]):
        seconds, measured = _try(compiled, arguments), True
    return Cost(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params)),
        operations=count * len(devices),
        traced=traced_bytes(jaxpr),
        compiled=total,
        seconds=seconds,
        measured=measured,
    )


def _memory(device: jax.Device) -> float:
    """Bytes of memory of a device; infinite where it does not report them (CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit", float("inf"))


def _try(compiled: Callable, arguments: PyTree) -> float:
    """Seconds per step: the faster of two steps, after one that is not counted."""
    state, constants, batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arguments)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, constants, batch))
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def matmul_rate(device: jax.Device, dtype: str) -> float:
    """Operations per second of a large matrix product on `device`: the best of five."""
    size = 1024 if device.platform == "cpu" else 8192
    matrix = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.matmul)
    taken = []
    for _ in range(6):
        began = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        taken.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(taken[1:])


def operations(jaxpr: Any) -> float:
    """The number of operations in convolutions and matrix products; a loop of unknown length counts once."""
    total = 0.0
    for equation in jaxpr.eqns:
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += turns * sum(operations(part) for part in _inner(equation))
        if equation.primitive.name == "conv_general_dilated":
            kernel, features = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod(kernel) / kernel[features]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * depth
    return total


def traced_bytes(jaxpr: Any) -> int:
    """Most bytes in use at once, inputs included, if operations run in the order of the trace and none are fused."""
    return _peak(jaxpr) + sum(map(_bytes, jaxpr.invars))


def _peak(jaxpr: Any) -> int:
    # A barrier returns its inputs: its outputs take no memory of their own.
    barriers = [equation for equation in jaxpr.eqns if equation.primitive.name == "optimization_barrier"]
    same: dict[Any, Any] = {}
    for equation in barriers:
        pairs = zip(equation.invars, equation.outvars, strict=True)
        same |= {out: same.get(given, given) for given, out in pairs if isinstance(given, core.Var)}
    last = {same.get(v, v): len(jaxpr.eqns) for v in jaxpr.outvars if isinstance(v, core.Var)}
    for index, equation in reversed(list(enumerate(jaxpr.eqns))):
        for variable in _used(equation):
            last.setdefault(same.get(variable, variable), index)
    alive = most = 0
    mine = set()
    for index, equation in enumerate(jaxpr.eqns):
        made = [] if equation in barriers else equation.outvars
        results = sum(map(_bytes, made))
        within = max([_peak(part) for part in _inner(equation)], default=0)
        alive += results
        mine.update(made)
        most = max(most, alive + max(0, within - results))
        for variable in {same.get(v, v) for v in (*_used(equation), *made)} & mine:
            if last.get(variable, index) <= index:
                alive -= _bytes(variable)
                mine.discard(variable)
    return most


def _bytes(variable: Any) -> int:
    return int(np.prod(variable.aval.shape)) * getattr(variable.aval.dtype, "itemsize", 8)


def _inner(equation: Any) -> list:
    """The jaxprs that an operation runs."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found


def _used(equation: Any) -> list:
    """The variables that an operation reads."""
    return [variable for variable in equation.invars if isinstance(variable, core.Var)]


def training_stages(config: ConfigDict, workdir: Path) -> tuple[list[stages.Stage], int]:
    """The training stages of a config and the number of classes; opens no data where the config names the classes."""
    if config.label_space:
        unseen = SimpleNamespace(fingerprint="", labelled=True)
        domains, classes = Domains(unseen, unseen, (unseen,)), label_space(config.label_space).num_classes
    else:
        domains = load_domains(config)
        classes = domains.label_space.num_classes
    planned = stages.plan(config, workdir, domains)
    return [stage for stage in planned if "sweep" not in stage.config], classes


def dry_run(config: ConfigDict, workdir: Path) -> str:
    """A table of what each training stage of a config costs on the devices that it would use."""
    planned, classes = training_stages(config, workdir)
    local = jax.local_devices()[0]
    rates = {dtype: matmul_rate(local, dtype) for dtype in {stage.config.model.dtype for stage in planned}}
    lines = [
        f"{'stage':16}{'parameters':>12}{'devices':>9}{'TFLOP':>9}{'traced':>9}{'compiled':>10}{'s/step':>10}"
        f"{'steps':>9}{'hours':>9}"
    ]
    for stage in planned:
        own = stage.config
        devices = parallel.choose_devices(own.batch // own.get("accumulate", 1), config.devices, config.platform)
        cost = step_cost(own, classes, devices, rates[own.model.dtype])
        seconds = f"{cost.seconds:.3g}" + ("" if cost.measured else "*")
        lines.append(
            f"{stage.name:16}{cost.parameters / 1e6:>10.2f} M{len(devices):>9}{cost.operations / 1e12:>9.3g}"
            f"{cost.traced / GIB:>9.2f}{cost.compiled / GIB:>10.2f}{seconds:>10}{own.steps:>9}"
            f"{cost.seconds * own.steps / 3600:>9.3g}"
        )
    speeds = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in rates.items())
    return "\n".join([*lines, "", f"On {local.platform} ({local.device_kind}), matrix products at {speeds}. {NOTES}"])
