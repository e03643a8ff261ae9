#!/usr/bin/env bash
# On CPUs the compiler of jaxlib 0.10.1 drops optimization barriers before it decides on the order of operations, so
# that `jax.checkpoint` saves no memory, and gradients that wait for each other by `jax.lax.optimization_barrier` are
# computed side by side, with the activations of both in memory. Results are right, and nothing is said. With the option
# `xla_disable_hlo_passes=cse_barrier_expander` the barriers are kept. By default they are in 0.11.2 and 0.12.0.1, which
# need a newer Python than 3.11 (tried by hand).
#
# The program prints what the compiler plans as working memory for a gradient of twelve layers: as it is, with each layer
# under jax.checkpoint, and for the sum of two gradients with a barrier between them.
#
# Output seen (Python 3.11, Linux on x86-64):
#   jaxlib 0.10.1, gradient: 77.6 MB, 77.6 MB with barriers kept
#   jaxlib 0.10.1, checkpointed: 77.6 MB, 33.6 MB with barriers kept
#   jaxlib 0.10.1, one_after_the_other: 153.1 MB, 77.6 MB with barriers kept
#
# It needs Python 3.11 to 3.13. It exits with 1 if the release behaves otherwise.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

cat > "$folder/barriers.py" <<'PROGRAM'
import sys

import jax
import jax.numpy as jnp
import jaxlib

LAYERS, ROWS, WIDTH = 12, 8192, 64
KEEP = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def layer(weights, rows):
    rows = jnp.tanh(rows @ weights)
    return jnp.tanh(rows @ weights) * rows


def loss(network, rows, block):
    for weights in network:
        rows = block(weights, rows)
    return jnp.mean(rows)


def gradient(network, first, second, block=layer):
    return jax.grad(loss)(network, first, block)


def checkpointed(network, first, second):
    return gradient(network, first, second, jax.checkpoint(layer))


def one_after_the_other(network, first, second):
    """The sum of two gradients; the second one waits for the first."""
    grads = jax.grad(loss)(network, first, layer)
    network, grads = jax.lax.optimization_barrier((network, grads))
    return jax.tree.map(jnp.add, grads, jax.grad(loss)(network, second, layer))


network = [jnp.eye(WIDTH)] * LAYERS
rows = jnp.ones((ROWS, WIDTH))
seen, plain = {}, None
for f in (gradient, checkpointed, one_after_the_other):
    sizes = []
    for options in ({}, KEEP):
        compiled = jax.jit(f, compiler_options=options).lower(network, rows, rows + 1).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes / 1e6)
    print(f"jaxlib {jaxlib.__version__}, {f.__name__}: {sizes[0]:.1f} MB, {sizes[1]:.1f} MB with barriers kept")
    plain = plain or sizes[0]
    seen[f.__name__] = [size / plain for size in sizes]
expected = {"gradient": [1, 1], "checkpointed": [1, 0.43], "one_after_the_other": [1.97, 1]}
sys.exit(any(abs(a - b) > 0.1 for name in expected for a, b in zip(seen[name], expected[name], strict=True)))
PROGRAM

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.1 jaxlib==0.10.1 numpy==2.4.6 scipy==1.17.1 ml_dtypes==0.6.0 opt_einsum==3.4.0
if ! JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/barriers.py"; then
    echo "jaxlib behaves otherwise than is written here" >&2
    exit 1
fi
