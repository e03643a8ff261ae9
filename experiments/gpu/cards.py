"""What the compiler must know of a GPU, from data sheets and NVIDIA's table of compute capabilities."""

from typing import NamedTuple


class Card(NamedTuple):
    """Compute capability, multiprocessors, float32 units and threads of each; GHz; shared memory (bytes) of a
    multiprocessor and the most that one block can use of it; bytes per second; bytes of cache and of memory."""

    capability: tuple[int, int]
    cores: int
    units: int
    threads: int
    clock: float
    shared: int
    shared_block: int
    bandwidth: int
    cache: int
    memory: int


CARDS = {
    "H100": Card((9, 0), 132, 128, 2048, 1.98, 233472, 232448, 3352320000000, 52428800, 84942979072),  # SXM, 80 GB
    "A100": Card((8, 0), 108, 64, 2048, 1.41, 167936, 166912, 2039000000000, 41943040, 84942979072),  # SXM, 80 GB
    "RTX4090": Card((8, 9), 128, 128, 1536, 2.52, 102400, 101376, 1008000000000, 75497472, 25757220864),
}


def target(name: str) -> str:
    """The description of a card that XLA's compiler reads: a `GpuTargetConfigProto` as text."""
    card = CARDS[name]
    # With a name of the device, or a version of CUB, the compiler would ask a device how to sort.
    return f"""
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
gpu_device_info {{
  cuda_compute_capability {{ major: {card.capability[0]} minor: {card.capability[1]} }}
  core_count: {card.cores}
  fpus_per_core: {card.units}
  clock_rate_ghz: {card.clock}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: {card.threads}
  shared_memory_per_block: 49152
  shared_memory_per_core: {card.shared}
  shared_memory_per_block_optin: {card.shared_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {card.bandwidth}
  l2_cache_size: {card.cache}
  device_memory_size: {card.memory}
}}
"""
