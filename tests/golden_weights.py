"""The deterministic weights and inputs with which the golden networks were evaluated."""

import json
import re
import zlib
from pathlib import Path

import jax
import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """All arrays of tests/golden/<name>.npz."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def golden_keys(name: str):
    """Content of tests/golden/<name>.keys.json: [key, shape] pairs, or a dict of such lists."""
    return json.loads((GOLDEN / f"{name}.keys.json").read_text())


def state_dict(keys, *, seed_prefix: str = "") -> dict[str, np.ndarray]:
    """Torch state dict for a list of [key, shape] pairs, or a dict of them as SDCA's files have it."""
    if isinstance(keys, dict):
        return {part: state_dict(pairs) for part, pairs in keys.items()}
    last = "bn3" if any(key.endswith("layer1.0.bn3.weight") for key, _ in keys) else "bn2"
    return {key: _tensor(key, tuple(shape), seed_prefix, last) for key, shape in keys}


def _tensor(key: str, shape: tuple[int, ...], seed_prefix: str, last_norm: str) -> np.ndarray:
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    z = np.random.default_rng(zlib.crc32((seed_prefix + key).encode())).standard_normal(shape)
    if key.endswith(("_token", "_tokens", "pos_embed")):
        return (0.5 * z).astype(np.float32)
    if key.endswith("running_var"):
        z = np.exp(0.1 * z)
    elif key.endswith(("running_mean", "bias")):
        z = 0.1 * z
    elif len(shape) >= 2:
        z = z * np.sqrt(2 / np.prod(shape[1:]))
        if "conv2d_list." in key or key.startswith("classifier."):
            z = 0.1 * z
    else:
        z = 1 + 0.1 * z
        if re.search(rf"layer\d\.\d+\.{last_norm}\.weight$", key):
            z = 0.2 * z
    return z.astype(np.float32)


def random_variables(model, *inputs):
    """Variables with the shapes of `init`, drawn by NumPy: compiling the initialisers takes seconds."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        if len(leaf.shape) < 2:
            value = np.full(leaf.shape, float(kind in ("scale", "var")))
        else:
            value = rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return value.astype(leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def network_input(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Input of a golden network: the stored one, or the drawn one, checked against the values stored of it."""
    if "input" in arrays:
        return arrays["input"]
    rng = np.random.default_rng(int(arrays["input_seed"]))
    x = (rng.standard_normal(tuple(arrays["input_shape"])) * float(arrays["input_scale"])).astype(np.float32)
    head = arrays["input_head"]
    np.testing.assert_array_equal(x[: len(head), :3, :4], head)
    return x
