"""The update of class statistics against the straightforward formulation, in time and in memory.

    python experiments/benchmarks/class_statistics.py                  # 2 images of 1280x720, ResNet-101
    python experiments/benchmarks/class_statistics.py --images 1 --limit 1

Both formulations compute the same numbers in one process, compiled for the device that JAX finds. The
straightforward one writes the features to a pixels x classes x channels array, as published code does, and computes
means and centred squares of that. "plain" runs it as it is written, one operation after the other, each with its
result in memory; "plain, compiled" gives it to XLA as a whole. Time is the median of the repeats; memory is what
compiled code needs in addition to its arguments and results, and for the uncompiled form its two largest arrays, which
exist at the same time. If they do not fit (`--limit`, in GB), the form runs on the largest part of the pixels that
fits, and its time is scaled up: it is linear in the pixels.

Measured on two busy CPU cores, 28,980 positions, --limit 2 (features alone: 237 MB):

                   seconds   ratio        MB   ratio
    ours             0.266     1.0       240     1.0
    plain, compiled 37.428   140.5      9024    37.6
    plain           39.657   148.9      9021    37.6
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

from jaxuda.losses.contrastive import ClassStatistics, empty_statistics, update_statistics

ROWS, COLUMNS, CHANNELS, CLASSES = 90, 161, 2048, 19
Update = Callable[[ClassStatistics, jax.Array, jax.Array], ClassStatistics]


def plain_update(stats: ClassStatistics, features: jax.Array, labels: jax.Array) -> ClassStatistics:
    """The same update with a (P, C, A) array."""
    members = jax.nn.one_hot(labels, CLASSES, dtype=features.dtype)[:, :, None]
    spread = features[:, None, :] * members
    count = jnp.sum(members, axis=(0, 2))
    divisor = jnp.maximum(count, 1)[:, None]
    mean = jnp.sum(spread, axis=0) / divisor
    var = jnp.sum(jnp.square(spread - mean * members), axis=0) / divisor
    new = (count / jnp.maximum(count + stats.count, 1))[:, None]
    return ClassStatistics(
        stats.mean * (1 - new) + mean * new,
        stats.var * (1 - new) + var * new + new * (1 - new) * jnp.square(stats.mean - mean),
        stats.count + count,
    )


def median_seconds(update: Update, arguments: tuple, repeats: int) -> float:
    """Median seconds of the update, after one call that compiles."""
    jax.block_until_ready(update(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(update(*arguments))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def compiled_megabytes(update: Update, arguments: tuple) -> float:
    """Temporary memory of the compiled update."""
    return jax.jit(update).lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 1e6


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=4.0, help="GB that the uncompiled plain form may take")
    options = parser.parse_args()

    pixels = options.images * ROWS * COLUMNS
    rng = np.random.default_rng(0)
    features = jax.device_put(rng.standard_normal((pixels, CHANNELS), np.float32))
    labels = jax.device_put(rng.choice(np.array([*range(CLASSES), 255], np.int32), pixels))
    everything = (empty_statistics(CLASSES, CHANNELS), features, labels)

    plain_bytes = 2 * 4 * CLASSES * CHANNELS  # per pixel: the spread features, and the same centred
    part = min(pixels, int(options.limit * 1e9 / plain_bytes))
    fitting = (everything[0], features[:part], labels[:part])
    ours, theirs = jax.jit(update_statistics)(*fitting), jax.jit(plain_update)(*fitting)
    for name, mine, other in zip(ClassStatistics._fields, ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4, err_msg=name)

    rows = {
        "ours": (
            median_seconds(jax.jit(update_statistics), everything, options.repeats),
            compiled_megabytes(update_statistics, everything),
        ),
        "plain, compiled": (
            median_seconds(jax.jit(plain_update), everything, options.repeats),
            compiled_megabytes(plain_update, everything),
        ),
        "plain": (
            median_seconds(plain_update, fitting, options.repeats) * pixels / part,
            plain_bytes * pixels / 1e6,
        ),
    }
    device = jax.devices()[0]
    print(f"{pixels} positions, {CHANNELS} channels, {CLASSES} classes, {device.platform} ({device.device_kind})")
    print(f"features alone: {features.nbytes / 1e6:.0f} MB; the uncompiled plain form was timed on {part} positions")
    print(f"{'':16}{'seconds':>10}{'ratio':>8}{'MB':>10}{'ratio':>8}")
    for name, (seconds, megabytes) in rows.items():
        ratios = seconds / rows["ours"][0], megabytes / rows["ours"][1]
        print(f"{name:16}{seconds:10.3f}{ratios[0]:8.1f}{megabytes:10.0f}{ratios[1]:8.1f}")


if __name__ == "__main__":
    main()
