"""Memory of CFContra's contrastive part against the number of pixels.

    python experiments/benchmarks/prototype_contrast.py            # up to 8 images of each domain
    python experiments/benchmarks/prototype_contrast.py --images 1,2

Everything that CFContra adds after the projection head is compiled as one function: pseudo-labels, four contrast
terms and their gradient on the features of both domains, class centres, and the two moved memories. Images are of
1280x640 (81 x 161 positions of 2048 channels) with 19 classes. Nothing is computed: the table has the compiler's figure
for memory in addition to arguments and results. The last column is the matrix of a contrast of pixels with pixels.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxuda.losses.contrastive import class_centres, nearest_prototype_labels, prototype_contrast, update_memory

ROWS, COLUMNS, CHANNELS, CLASSES = 81, 161, 2048, 19


def contrastive_part(source: jax.Array, target: jax.Array, labels: jax.Array, memories: tuple) -> tuple:
    """Gradients on both domains' features (N, h, w, A), and the moved memories, 2 x (C, A)."""
    pseudo = nearest_prototype_labels(target, memories[0], 0.05)

    def loss(features: tuple) -> jax.Array:
        pairs = [(maps, y, memory) for maps, y in zip(features, (labels, pseudo), strict=True) for memory in memories]
        return 0.001 * sum(prototype_contrast(*pair, 0.07) for pair in pairs)

    gradients = jax.grad(loss)((source, target))
    centres = class_centres(source, labels, CLASSES), class_centres(target, pseudo, CLASSES)
    moved = []
    for memory, order in zip(memories, ((1, 0), (0, 1)), strict=True):
        for domain in order:
            memory = update_memory(memory, *centres[domain], 0.9)
        moved.append(memory)
    return gradients, moved


def temporary_megabytes(images: int) -> float:
    """The memory of the compiled part for this many images of each domain."""
    features = jax.ShapeDtypeStruct((images, ROWS, COLUMNS, CHANNELS), jnp.float32)
    labels = jax.ShapeDtypeStruct(features.shape[:3], jnp.int32)
    memory = jax.ShapeDtypeStruct((CLASSES, CHANNELS), jnp.float32)
    compiled = jax.jit(contrastive_part).lower(features, features, labels, (memory, memory)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="1,2,4,8", help="of each domain, separated by commas")
    counts = [int(count) for count in parser.parse_args().images.split(",")]
    device, first = jax.devices()[0], None
    print(f"{CHANNELS} channels, {CLASSES} classes, {device.platform} ({device.device_kind})")
    print(f"{'images':>6}{'positions':>11}{'MB':>9}{'ratio':>7}{'per pixel':>11}{'features':>10}{'pixels^2':>10}")
    for count in counts:
        pixels = 2 * count * ROWS * COLUMNS
        megabytes = temporary_megabytes(count)
        first = first or (megabytes, pixels)
        ratio, linear = megabytes / first[0], pixels / first[1]
        own, square = 4 * pixels * CHANNELS / 1e6, 4 * (pixels / 2) ** 2 / 1e6
        print(f"{count:6}{pixels:11}{megabytes:9.0f}{ratio:7.2f}{ratio / linear:11.2f}{own:10.0f}{square:10.0f}")


if __name__ == "__main__":
    main()
