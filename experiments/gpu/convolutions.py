"""Times dilated 3x3 convolutions and DeepLab's head on a GPU: XLA's own against the forms that jaxuda uses there.

    python experiments/gpu/convolutions.py [--dtype bfloat16]

Value and both gradients of one call, on the map of a 1280x720 image (91x161): the fastest of 20, in milliseconds. The
two forms' results are compared first.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxuda.models import layers

LAYERS = {  # dilations, channels in and out
    "layer3, not dilated": ((1,), 256, 256),
    "layer3": ((2,), 256, 256),
    "layer4": ((4,), 512, 512),
    "DeepLab's head": ((6, 12, 18, 24), 2048, 19),
}


def main() -> None:
    """Prints a row per layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--size", default="161x91", help="width and height of the map, default: %(default)s")
    options = parser.parse_args()
    (width, height), rng = map(int, options.size.split("x")), np.random.default_rng(0)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.dtype}")
    print("| layer | XLA's own, ms | jaxuda's, ms | largest difference, relative |\n|---|---|---|---|")
    for name, (dilations, into, out) in LAYERS.items():
        x = jnp.asarray(rng.normal(size=(1, height, width, into)), options.dtype)
        kernels = [jnp.asarray(rng.normal(size=(3, 3, into, out)) * 0.02, options.dtype) for _ in dilations]
        g = jnp.asarray(rng.normal(size=(1, height, width, out)), options.dtype)
        plain, ours = (compiled(platform, dilations, x, kernels, g) for platform in ("any", "gpu"))
        differences = jax.tree.map(relative, plain(x, kernels, g), ours(x, kernels, g))
        times = [1e3 * min(timed(call, x, kernels, g) for _ in range(20)) for call in (plain, ours)]
        print(f"| {name} | {times[0]:.3f} | {times[1]:.3f} | {max(jax.tree.leaves(differences)):.1e} |", flush=True)


def compiled(platform: str, dilations: tuple[int, ...], *arguments: object) -> Callable:
    """Value and gradients of a layer in the forms of a platform, compiled for this device."""

    def both(x: jax.Array, kernels: list[jax.Array], g: jax.Array) -> tuple:
        def layer(x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
            if len(kernels) > 1:
                return layers.conv2d_sum(x, kernels, dilations)
            return layers.conv2d(x, kernels[0], dilation=dilations[0], padding=dilations[0])

        y, pullback = jax.vjp(layer, x, kernels)
        return y, pullback(g)

    with layers.compile_for(platform):
        return jax.jit(both).lower(*arguments).compile()


def relative(a: jax.Array, b: jax.Array) -> float:
    """The largest difference, as a share of the largest entry."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return float(np.abs(a - b).max() / np.abs(a).max())


def timed(call: Callable, *arguments: object) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
