#!/usr/bin/env bash
# A layer that works on parts of its input one after another, to save memory, is written with `jax.lax.map`. With
# several such layers in one program the compiler makes the arrays that they will fill, all of them, before the first
# layer runs, although each is only needed until the next layer is done: a network of 16 layers needs 16 maps at once.
# Results are right, and nothing is said. The zeros that every `lax.map` starts from are one constant to the compiler,
# of which it plans a copy for each loop, and nothing tells it how late a copy may be made. A loop that writes each part
# over the part of its input that it has read (`in_place` below) needs one, whatever the number of layers. The same
# is planned by 0.12.0.1; for an H100 the CUDA plugin of 0.10.1 plans 15.2 maps for 16 layers (both tried by hand).
#
# The program prints what the compiler plans as working memory, in maps (32 MiB each), for 4 and 16 layers.
#
# Output seen (Python 3.11, Linux on x86-64):
#   jaxlib 0.10.1, in_place: 1.1 maps for 4 layers, 1.1 for 16
#   jaxlib 0.10.1, by_map: 4.1 maps for 4 layers, 16.1 for 16
#
# It needs Python 3.11 to 3.13. It exits with 1 if the release behaves otherwise.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

cat > "$folder/layers.py" <<'PROGRAM'
import sys

import jax
import jax.numpy as jnp
import jaxlib
from jax import lax

PARTS, ROWS, WIDTH = 16, 4096, 128
MAP = PARTS * ROWS * WIDTH * 4


def by_map(layer, x):
    return lax.map(layer, x)


def in_place(layer, x):
    def step(x, place):
        part = layer(lax.dynamic_index_in_dim(x, place, keepdims=False))
        return lax.dynamic_update_index_in_dim(x, part, place, 0), None

    return lax.scan(step, x, jnp.arange(PARTS))[0]


def planned(over_parts, layers):
    def network(x, weights):
        for kernel in weights:
            x = over_parts(lambda part, kernel=kernel: jnp.tanh(part @ kernel), x)
        return jnp.sum(x)

    x = jax.ShapeDtypeStruct((PARTS, ROWS, WIDTH), jnp.float32)
    weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * layers
    return jax.jit(network).lower(x, weights).compile().memory_analysis().temp_size_in_bytes / MAP


seen = {f.__name__: [planned(f, layers) for layers in (4, 16)] for f in (in_place, by_map)}
for name, (few, many) in seen.items():
    print(f"jaxlib {jaxlib.__version__}, {name}: {few:.1f} maps for 4 layers, {many:.1f} for 16")
expected = {"in_place": [1.1, 1.1], "by_map": [4.1, 16.1]}
sys.exit(any(abs(a - b) > 0.3 for name in expected for a, b in zip(seen[name], expected[name], strict=True)))
PROGRAM

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.1 jaxlib==0.10.1 numpy==2.4.6 scipy==1.17.1 ml_dtypes==0.6.0 opt_einsum==3.4.0
if ! JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/layers.py"; then
    echo "jaxlib behaves otherwise than is written here" >&2
    exit 1
fi
