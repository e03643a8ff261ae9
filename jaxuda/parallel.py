"""Devices and processes: one train step on all of them. Only this file uses pmap.

Each device has a copy of the training state (leading axis = device); a batch is split along its first axis. With a
single device nothing is stacked, and the step is compiled by plain jit.

Each of several processes has its own devices and runs the same program in the same order. A list of devices always
means those of this process; the other processes have the same number. The first process writes all files (`on_first`),
to a folder that all can read. All data but gradients is exchanged (`exchange`) through the coordination service of
JAX, which can wait for hours; a collective of the devices would time out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordination service has no public interface (up to jax 0.11.2)
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxuda.errors import UserError

PyTree = Any
AXIS = "device"
PATIENCE = 7 * 24 * 3600 * 1000  # milliseconds that processes wait for each other; if one dies, the others end
_exchanges = itertools.count()  # numbers of the exchanges, the same in all processes; they name the exchanged values


def start_processes(coordinator: str = "", count: int = 0, index: int | None = None) -> None:
    """Connects this process with the others of the run; call it before JAX looks for devices.

    Args:
      coordinator: "host:port" of the first process; "" (with 0, None): ask the cluster (Slurm, Open MPI, TPU).
      count: number of processes.
      index: index of this process, from 0.

    Raises:
      UserError: no cluster was found, only some of the three are given, or the other processes cannot be reached.
    """
    given = [bool(coordinator), bool(count), index is not None]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator HOST:PORT, --processes N and --process K belong together: give all three or none"
        )
    jax.config.update("jax_enable_preemption_service", False)  # it would replace our handler of SIGTERM
    try:
        if all(given):
            # A detected cluster would give each process one device; here the user chooses the devices too.
            jax.distributed.initialize(coordinator, count, index, cluster_detection_method="deactivate")
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run could not connect ({error}): start them with srun or mpirun, or give each "
            "--coordinator HOST:PORT --processes N --process K"
        ) from error


def is_first() -> bool:
    """Whether this process writes files and messages. Always true for a single process; no device is touched then."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def exchange(value: Any) -> list[Any]:
    """The `value`s (plain JSON) of all processes, in their order. All processes must call it together."""
    if jax.process_count() == 1:
        return [value]
    client, number, mine = distributed.global_state.client, next(_exchanges), jax.process_index()
    client.key_value_set(f"jaxuda/{number}/{mine}", json.dumps(value))
    told = [client.blocking_key_value_get(f"jaxuda/{number}/{k}", PATIENCE) for k in range(jax.process_count())]
    # All processes have arrived here, so all have read the values of the exchange before.
    client.key_value_delete(f"jaxuda/{number - 1}/{mine}")
    return [json.loads(text) for text in told]


def on_first(work: Callable[[], Any]) -> Any:
    """Runs `work` in the first process and returns its result (plain JSON) in all; the others wait for it.

    Raises:
      UserError: in all processes, if `work` raised one in the first.
    """
    if jax.process_count() == 1:
        return work()
    told = None
    if jax.process_index() == 0:
        try:
            told = {"value": work()}
        except BaseException as error:
            exchange({"mistake": str(error)} if isinstance(error, UserError) else {"failure": repr(error)})
            raise
    told = exchange(told)[0]
    if "mistake" in told:
        raise UserError(told["mistake"])
    if "failure" in told:
        raise RuntimeError(f"the first process failed: {told['failure']}")
    return told["value"]


def from_first(tree: PyTree) -> PyTree:
    """The first process's host pytree, in all processes; the others pass one with the same shapes and dtypes."""
    if jax.process_count() == 1:
        return tree
    exchange(None)  # wait here: a collective of the devices would time out
    return multihost_utils.broadcast_one_to_all(tree)


def choose_devices(
    batch: int, requested: int = 0, platform: str = "", field: str = "the stage's field `batch`"
) -> list[jax.Device]:
    """The devices of this process that compute its part of the global batch.

    Args:
      batch: examples per step, all devices of all processes together.
      requested: how many devices of each process the user asked for (`config.devices`); 0 = the largest number that
        divides the batch.
      platform: "gpu" or "cpu" if the user insists (`config.platform`), "" for whatever JAX finds.
      field: how messages name the field that `batch` comes from.

    Raises:
      UserError: JAX runs on another platform, or `requested` is too many or does not divide the batch.
    """
    # All processes must choose the same number, however many devices they have.
    processes = jax.process_count()
    devices = jax.local_devices()[: min(len(jax.local_devices(process_index=k)) for k in range(processes))]
    found = devices[0].platform
    if platform and platform not in (found, {"cuda": "gpu", "rocm": "gpu"}.get(found, found)):
        raise UserError(
            f"config.platform asks for {platform}, but JAX only found {found}: install the matching jaxlib "
            f"(for NVIDIA: pip install 'jax[cuda13]') and check the driver, or set --config.platform={found}"
        )
    if requested > len(devices):
        raise UserError(f"config.devices={requested}, but there are only {len(devices)} {found} device(s)")
    if batch % processes:
        raise UserError(f"a batch of {batch} does not divide over {processes} processes: change {field}")
    batch //= processes
    if requested and batch % requested:
        fitting = [n for n in range(1, len(devices) + 1) if batch % n == 0]
        raise UserError(
            f"config.devices={requested} does not divide the batch of {batch}{' per process' * (processes > 1)}: "
            f"use one of {fitting}, or change {field}"
        )
    count = requested or max(n for n in range(1, len(devices) + 1) if batch % n == 0)
    return devices[:count]


def compile_step(step: Callable, devices: list[jax.Device], donate: bool = True) -> Callable:
    """`step(state, constants, seed, batch, axis_name=...) -> (state, metrics)` compiled for `devices`.

    The state is donated, unless `donate` is False: for a function that only looks at it. The compiled function takes
    state and constants as `replicate` makes them and a batch as `shard` makes it. It returns the new state in the same
    form, and metrics, with a leading device axis if there are several devices. The seed is an argument, a plain number,
    so that runs of several seeds share a program.
    """
    if not _stacked(devices):
        return jit_step(partial(step, axis_name=None), devices[0], donate)
    everyone = [d for k in range(jax.process_count()) for d in jax.local_devices(process_index=k)[: len(devices)]]
    compiled = jax.pmap(
        partial(step, axis_name=AXIS),
        axis_name=AXIS,
        devices=everyone,
        in_axes=(0, 0, None, 0),
        donate_argnums=(0,) if donate else (),
    )
    if devices[0].platform != "cpu":
        return compiled
    # Steps that are queued on simulated CPU devices share one thread pool, where their collectives can wait for
    # each other forever.
    return lambda *arguments: jax.block_until_ready(compiled(*arguments))


def jit_step(step: Callable, device: jax.Device, donate: bool = True) -> Callable:
    """`jax.jit` of a train step for one device; its first argument, the state, is donated, unless `donate` is False.

    XLA's compiler for CPUs drops barriers before it orders operations (in jaxlib 0.10.1, not in 0.11.2; see
    findings/jax-cpu-drops-barriers.sh): the passes of a step would run side by side, with the activations of all of
    them in memory, and `remat` would compute nothing twice. Here they are kept.
    """
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if device.platform == "cpu" else {}
    return jax.jit(step, donate_argnums=(0,) if donate else (), compiler_options=options)


def _stacked(devices: list[jax.Device]) -> bool:
    """Whether the arrays of a step have a leading device axis."""
    return len(devices) > 1 or jax.process_count() > 1


def replicate(tree: PyTree, devices: list[jax.Device]) -> PyTree:
    """A host pytree on every device, with a leading device axis if there are several."""
    if not _stacked(devices):
        return jax.device_put(tree, devices[0])
    stacked = jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (len(devices), *np.shape(x))), tree)
    return jax.device_put(stacked, _sharding(devices))


def first(tree: PyTree, devices: list[jax.Device]) -> PyTree:
    """The inverse of `replicate`, as host arrays: what the first device holds (all hold the same)."""
    if not _stacked(devices):
        return jax.device_get(tree)
    # Not x[0]: indexing would run a computation on all devices for every array.
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)


def shard(batch: PyTree, devices: list[jax.Device]) -> PyTree:
    """This process's host batch on the devices for `compile_step`: (N, ...) becomes (devices, N / devices, ...) if
    there are several."""
    if not _stacked(devices):
        return jax.device_put(batch, devices[0])
    cut = jax.tree.map(lambda x: x.reshape(len(devices), x.shape[0] // len(devices), *x.shape[1:]), batch)
    return jax.device_put(cut, _sharding(devices))


def _sharding(devices: list[jax.Device]) -> NamedSharding:
    return NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec(AXIS))


def spread(batch: PyTree, devices: list[jax.Device]) -> PyTree:
    """A host batch split over `devices`, for plain jit, which computes on the devices that hold the data."""
    return jax.device_put(batch, _sharding(devices))


def everywhere(tree: PyTree, devices: list[jax.Device]) -> PyTree:
    """A copy of a host pytree on each of `devices`, for use with `spread` batches."""
    return jax.device_put(tree, NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec()))


def evaluation_devices(config: Any, devices: list[jax.Device]) -> list[jax.Device]:
    """As many of `devices` as divide the evaluation batch."""
    return devices[: max(n for n in range(1, len(devices) + 1) if config.evaluation.batch % n == 0)]
