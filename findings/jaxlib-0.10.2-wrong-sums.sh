#!/usr/bin/env bash
# jaxlib 0.10.2 silently computes wrong sums on CPUs (jax issue 39103). It is why pyproject.toml excludes this release.
#
# The program multiplies every row of a (rows, 3) array with a 3x3 matrix and sums the squares of each product, once
# compiled and once operation by operation; a float64 computation in NumPy is the truth.
# Compiled by jaxlib 0.10.2, every row from number 32,768 on is wrong where there are 32,769 to some 43,600 rows. With
# fewer or more rows, or with 1, 2, 4, 5, 8 or 19 columns in place of 3, none was wrong. Operation by operation none is,
# nor compiled by jaxlib 0.10.1 (nor, on Python 3.13, by 0.11.0, 0.11.1 and 0.11.2).
#
# Output seen (Python 3.11, Linux on x86-64, two cores):
#   jaxlib 0.10.1, 32768 rows: 0 wrong compiled, 0 wrong stepwise
#   jaxlib 0.10.1, 40000 rows: 0 wrong compiled, 0 wrong stepwise
#   jaxlib 0.10.2, 32768 rows: 0 wrong compiled, 0 wrong stepwise
#   jaxlib 0.10.2, 40000 rows: 7232 wrong compiled from row 32768 on, the worst by a factor of 4156, 0 wrong stepwise
#
# It needs Python 3.11 to 3.13 and a gigabyte in a temporary folder. It exits with 1 if a release behaves otherwise.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

cat > "$folder/sums.py" <<'PROGRAM'
import sys

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np


def sums(matrix, rows):
    return jax.vmap(lambda row: jnp.sum(jnp.square(matrix @ row)))(rows)


def wrong(found, truth):
    return np.abs(np.asarray(found) - truth) > 1e-4 * truth + 1e-6


seen = {}
for count in (32_768, 40_000):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, 3)).astype(np.float32)
    matrix = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
    truth = np.square(rows.astype(np.float64) @ matrix.T.astype(np.float64)).sum(1)
    compiled = np.asarray(jax.jit(sums)(matrix, rows))
    places = np.flatnonzero(wrong(compiled, truth))
    with jax.disable_jit():
        stepwise = int(wrong(sums(matrix, rows), truth).sum())
    worst = (compiled / truth)[places].max(initial=0)
    where = f" from row {places[0]} on, the worst by a factor of {worst:.0f}" if len(places) else ""
    print(f"jaxlib {jaxlib.__version__}, {count} rows: {len(places)} wrong compiled{where}, {stepwise} wrong stepwise")
    seen[count] = (len(places), stepwise)
expected = {"right": {32_768: (0, 0), 40_000: (0, 0)}, "wrong": {32_768: (0, 0), 40_000: (7232, 0)}}[sys.argv[1]]
sys.exit(seen != expected)
PROGRAM

others=(numpy==2.4.6 scipy==1.17.1 ml_dtypes==0.6.0 opt_einsum==3.4.0)
changed=0
for release in "0.10.1 right" "0.10.2 wrong"; do
    read -r version expected <<< "$release"
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version" "${others[@]}"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/sums.py" "$expected" || changed=1
done
if [ "$changed" = 1 ]; then
    echo "jaxlib behaves otherwise than is written here" >&2
fi
exit "$changed"
