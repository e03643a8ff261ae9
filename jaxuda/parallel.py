"""Devices: one train step on all of them. The only file that knows about pmap.

A training state lives once per device (leading axis = device), a batch is cut along its first axis. With a
single device nothing is stacked and the step is plainly jitted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxuda.errors import UserError

PyTree = Any
AXIS = "device"


def choose_devices(
    batch: int, requested: int = 0, platform: str = "", field: str = "the stage's field `batch`"
) -> list[jax.Device]:
    """The local devices that a global batch of `batch` is spread over.

    Args:
      batch: examples per step, all devices together.
      requested: how many devices the user asked for (`config.devices`); 0 = the largest number that divides.
      platform: "gpu" or "cpu" if the user insists (`config.platform`), "" for whatever JAX finds.
      field: what the message calls the field that `batch` comes from.

    Raises:
      UserError: JAX runs on another platform, or `requested` is too many or does not divide the batch.
    """
    devices = jax.local_devices()
    found = devices[0].platform
    if platform and platform not in (found, {"cuda": "gpu", "rocm": "gpu"}.get(found, found)):
        raise UserError(
            f"config.platform asks for {platform}, but JAX only found {found}: install the matching jaxlib "
            f"(for NVIDIA: pip install 'jax[cuda13]') and check the driver, or set --config.platform={found}"
        )
    if requested > len(devices):
        raise UserError(f"config.devices={requested}, but only {len(devices)} {found} device(s) are here")
    if requested and batch % requested:
        fitting = [n for n in range(1, len(devices) + 1) if batch % n == 0]
        raise UserError(
            f"config.devices={requested} does not divide the batch of {batch}: use one of {fitting}, or change {field}"
        )
    count = requested or max(n for n in range(1, len(devices) + 1) if batch % n == 0)
    return devices[:count]


def compile_step(step: Callable, devices: list[jax.Device]) -> Callable:
    """`step(state, batch, axis_name=...) -> (state, metrics)` compiled for `devices`; the state is donated.

    The compiled function takes and gives states as `replicate` makes them, batches as `shard` makes them, and
    metrics with a leading device axis when there are several devices.
    """
    if len(devices) == 1:
        return jax.jit(partial(step, axis_name=None), donate_argnums=0)
    compiled = jax.pmap(partial(step, axis_name=AXIS), axis_name=AXIS, devices=devices, donate_argnums=0)
    if devices[0].platform != "cpu":
        return compiled
    # Steps that queue up on fake CPU devices share one thread pool, where their collectives can wait for each
    # other for ever.
    return lambda state, batch: jax.block_until_ready(compiled(state, batch))


def replicate(tree: PyTree, devices: list[jax.Device]) -> PyTree:
    """A host pytree on every device, with a leading device axis if there are several."""
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    stacked = jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (len(devices), *np.shape(x))), tree)
    return jax.device_put(stacked, _sharding(devices))


def first(tree: PyTree, devices: list[jax.Device]) -> PyTree:
    """The inverse of `replicate`, as host arrays: what the first device holds (all hold the same)."""
    if len(devices) == 1:
        return jax.device_get(tree)
    # Not x[0]: indexing would be a computation of all devices for every array.
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)


def shard(batch: PyTree, devices: list[jax.Device]) -> PyTree:
    """A host batch on the devices for `compile_step`: (N, ...) becomes (devices, N / devices, ...) if several."""
    if len(devices) == 1:
        return jax.device_put(batch, devices[0])
    cut = jax.tree.map(lambda x: x.reshape(len(devices), x.shape[0] // len(devices), *x.shape[1:]), batch)
    return jax.device_put(cut, _sharding(devices))


def _sharding(devices: list[jax.Device]) -> NamedSharding:
    return NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec(AXIS))


def spread(batch: PyTree, devices: list[jax.Device]) -> PyTree:
    """A host batch cut over `devices` for plainly jitted code, whose work then follows the data."""
    return jax.device_put(batch, _sharding(devices))


def everywhere(tree: PyTree, devices: list[jax.Device]) -> PyTree:
    """A host pytree whole on each of `devices`, to be used beside `spread` batches."""
    return jax.device_put(tree, NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec()))
