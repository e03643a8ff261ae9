"""Every method gives the same update on any number of devices, and in parts."""

import gc
import math
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from methods.test_contract import METHODS, TOY, assert_close, make_batch, setup

from jaxuda import parallel
from jaxuda.training.state import TrainState

# Methods whose losses are means over equally many pixels in each part of a batch, and compute nothing over the batch.
MEANS = ("source_only", "control", "minent", "advent", "fada", TOY)


@pytest.fixture(autouse=True)
def _forget_compiled_steps():
    """No test runs the step of another, and those for eight devices take hundreds of megabytes each."""
    yield
    jax.clear_caches()
    gc.collect()


def run(method: str, devices: int, steps: int, **options) -> TrainState:
    start, _, constants, step = setup(method, **options)
    chosen = jax.local_devices()[:devices]
    compiled, state = parallel.compile_step(step, chosen), parallel.replicate(start, chosen)
    constants = parallel.replicate(constants, chosen)
    # No test compiles a step for several devices twice, and jaxlib 0.10.1 crashed once while it stored one.
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least if devices == 1 else math.inf)
    for index in range(steps):
        state, _ = compiled(state, constants, 0, parallel.shard(make_batch(index), chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    return parallel.first(state, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize("method", METHODS)
def test_devices_agree(method: str, norm: str) -> None:
    """1, 2 and 8 devices have the same parameters after 3 steps on the same global batches."""
    counts = (1, 2, 8) if norm == "batch" else (1, 8)  # each is compiled
    with jax.enable_x64(True):
        one, *others = (run(method, devices, 3, dtype="float64", norm=norm) for devices in counts)
    assert one.params["model"]["head"]["kernel0"].dtype == np.float64
    for other in others:
        assert_close(other, one, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["advent", TOY])
def test_shard_map_could_replace_pmap(method: str) -> None:
    """The step needs nothing of pmap, which JAX only maintains: on the day it goes, `parallel` alone changes."""
    with jax.enable_x64(True):
        start, _, constants, step = setup(method, dtype="float64")
        same, split = PartitionSpec(), PartitionSpec(parallel.AXIS)
        mapped = jax.shard_map(
            partial(step, axis_name=parallel.AXIS),
            mesh=Mesh(np.asarray(jax.local_devices()[:2]), (parallel.AXIS,)),
            in_specs=(same, same, same, split),
            out_specs=same,
            check_vma=False,  # gradients are summed by the step, as under pmap
        )
        compiled, state = jax.jit(mapped), start
        for index in range(2):
            state, _ = jax.block_until_ready(compiled(state, constants, 0, make_batch(index)))
        assert_close(jax.device_get(state), run(method, 2, 2, dtype="float64"), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("method", MEANS)
def test_parts_of_a_batch_are_the_batch(method: str) -> None:
    with jax.enable_x64(True):
        options = {"dtype": "float64", "norm": "frozen"}
        whole = run(method, 1, 2, **options)
        for devices in (1, 2) if method in ("advent", TOY) else (2,):
            assert_close(run(method, devices, 2, accumulate=2, **options), whole, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name not in MEANS])
def test_devices_agree_on_parts(method: str) -> None:
    """A part of a batch is the same part on any number of devices."""
    with jax.enable_x64(True):
        one, two = (run(method, devices, 2, dtype="float64", accumulate=2) for devices in (1, 2))
    assert_close(two, one, 1e-10)
