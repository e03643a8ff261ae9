"""SePiCo's projection head against golden numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden

from jaxuda.models.heads import Projection

CASES = {"single": (40, 16, (3,)), "fused": (16, 24, (0, 1, 2, 3))}


def _variables(arrays: dict[str, np.ndarray]) -> dict:
    params, stats = {}, {}
    for index in (0, 1):
        params[f"conv{index}"] = {"kernel": arrays[f"layer{index}_conv_weight"].transpose(2, 3, 1, 0)}
        bn = {name: arrays[f"layer{index}_bn_{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
        params[f"bn{index}"] = {"scale": bn["weight"], "bias": bn["bias"]}
        stats[f"bn{index}"] = {"mean": bn["running_mean"], "var": bn["running_var"]}
    return {"params": params, "batch_stats": stats}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_projection_matches_golden(name: str, train: bool) -> None:
    hidden, channels, numbers = CASES[name]
    arrays = {key.removeprefix(f"{name}_"): x for key, x in golden("sepico_projection").items() if key.startswith(name)}
    run = "train" if train else "eval"
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda x: jnp.asarray(x, float), _variables(arrays))
        maps = [jnp.asarray(arrays[f"input{number}"], float) for number in numbers]
        head = Projection(hidden, channels, "float64")

        def project(params: dict, maps: list) -> tuple[jax.Array, dict]:
            return head.apply({**variables, "params": params}, maps, train, mutable=["batch_stats"])

        features, pullback, moved = jax.vjp(project, variables["params"], maps, has_aux=True)
        gradients, by_map = pullback(jnp.asarray(arrays["cotangent"], float))

    np.testing.assert_allclose(features, arrays[f"{run}_output_f64"], rtol=1e-10, atol=1e-12)
    for number, gradient in zip(numbers, by_map, strict=True):
        _close(gradient, arrays[f"{run}_grad_input{number}_f64"], 1e-10)
    if not train:
        return
    for index in (0, 1):
        kernel = arrays[f"train_grad_layer{index}_conv_weight"].transpose(2, 3, 1, 0)
        _close(gradients[f"conv{index}"]["kernel"], kernel, 1e-5)
        for ours, theirs in (("scale", "weight"), ("bias", "bias")):
            _close(gradients[f"bn{index}"][ours], arrays[f"train_grad_layer{index}_bn_{theirs}"], 1e-5)
        for kind in ("mean", "var"):
            expected = arrays[f"train_after_layer{index}_bn_running_{kind}_f64"]
            _close(moved["batch_stats"][f"bn{index}"][kind], expected, 1e-10)


def _close(ours: jax.Array, theirs: np.ndarray, rtol: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


def test_new_head() -> None:
    """Unit vectors, and zeros where nothing passes the last ReLU; weights as published."""
    head = Projection(2048, 512)
    shapes = jax.eval_shape(head.init, jax.random.key(0), [jnp.zeros((1, 1, 1, 2048))])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 5_248_000
    small = Projection(64, 32)
    maps = [jax.random.normal(jax.random.key(1), (2, 4, 6, 64))]
    variables = small.init(jax.random.key(0), maps)
    np.testing.assert_allclose(np.std(variables["params"]["conv1"]["kernel"]), np.sqrt(2 / 32), rtol=0.05)
    features = small.apply(variables, maps)
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, rtol=1e-5)
    variables["params"]["bn1"]["bias"] = jnp.full((32,), -1e6)
    value, gradient = jax.value_and_grad(lambda maps: jnp.sum(small.apply(variables, maps)))(maps)
    assert value == 0 and not np.any(gradient[0])
