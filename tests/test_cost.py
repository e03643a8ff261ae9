"""The cost of a training stage, found before it runs."""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxuda import parallel
from jaxuda.cli import parse
from jaxuda.main import main
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.pipeline import cost
from jaxuda.pipeline.stages import resolve

pytestmark = pytest.mark.usefixtures("all_optimizations")

ROOT = Path(__file__).parents[1]


def trace(function, *shapes):
    return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr


def test_operations_of_products_convolutions_and_loops() -> None:
    product = lambda a, b: a @ b  # noqa: E731
    assert cost.operations(trace(product, (3, 4), (4, 5))) == 2 * 3 * 4 * 5
    conv = lambda x, k: lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    assert cost.operations(trace(conv, (2, 9, 7, 4), (3, 3, 4, 8))) == 2 * (2 * 4 * 3 * 8) * (3 * 3 * 4)
    loop = lambda a, b: lax.scan(lambda carry, row: (carry, row @ b), 0.0, a)[1]  # noqa: E731
    assert cost.operations(trace(loop, (7, 3, 4), (4, 5))) == 7 * 2 * 3 * 4 * 5


def test_bytes_alive_at_once() -> None:
    """The argument, and at each operation its input and its output."""
    chain = lambda x: jnp.sum(jnp.exp(jnp.sin(jnp.cos(x))))  # noqa: E731
    assert cost.traced_bytes(trace(chain, (1000,))) == 3 * 4000


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_computing_twice_needs_less_memory(backbone: str) -> None:
    """tests/methods/test_plca.py tests that the gradients do not change."""
    plain, twice = (
        DeepLabV2(4, backbone, "torchvision", width=8, blocks=(2, 2, 2, 2), remat=flag) for flag in (False, True)
    )
    images = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    shapes = jax.eval_shape(plain.init, jax.random.key(1), images)

    def gradient(model: DeepLabV2):
        def loss(params: dict, images: jax.Array) -> jax.Array:
            variables = {"params": params, "batch_stats": jax.tree.map(jnp.ones_like, shapes["batch_stats"])}
            return jnp.mean(model.apply(variables, images, train=True, mutable=["batch_stats"])[0].main ** 2)

        return jax.grad(loss)

    kept, less = (
        cost.traced_bytes(jax.make_jaxpr(gradient(m))(shapes["params"], images).jaxpr) for m in (plain, twice)
    )
    assert less < 0.85 * kept


def test_barriers_hold_on_cpus() -> None:
    """A pass that waits for another one's gradient needs no memory beside it; blocks computed twice need less."""

    def block(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ kernel) @ kernel) * x

    def gradient(params: jax.Array, images: jax.Array, block: Callable = block) -> jax.Array:
        def loss(params: jax.Array, images: jax.Array) -> jax.Array:
            for _ in range(8):
                images = block(images, params)
            return jnp.mean(images)

        return jax.grad(loss)(params, images)

    def twice(params: jax.Array, images: jax.Array) -> jax.Array:
        return gradient(params, images, jax.checkpoint(block))

    def both(params: jax.Array, images: jax.Array) -> jax.Array:
        first = gradient(params, images)
        params, first = lax.optimization_barrier((params, first))
        return first + gradient(params, images + 1)

    arguments = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((4096, 16), jnp.float32)
    one = planned(gradient, *arguments)
    assert planned(both, *arguments) < 1.2 * one
    assert planned(twice, *arguments) < 0.85 * one


def planned(function, params, images) -> int:
    """Bytes of working memory of `function(params, images)`, compiled as a train step is."""

    def step(state, constants, seed, batch, axis_name):
        return function(state, batch), {}

    compiled = parallel.compile_step(step, jax.local_devices()[:1], donate=False)
    return compiled.lower(params, {}, 0, images).compile().memory_analysis().temp_size_in_bytes


def test_memory_and_parts_of_all_stages_by_one_field() -> None:
    """Configs that do not set the fields resolve as if there were no such fields."""
    config = parse(["jaxuda", f"--config={ROOT}/configs/minent.py"]).config
    plain = resolve("adapt", config).to_dict()
    assert "accumulate" not in plain and "remat" not in plain["model"]
    config = parse(["jaxuda", f"--config={ROOT}/configs/minent.py", "--config.accumulate=2", "--config.remat"]).config
    asked = resolve("adapt", config).to_dict()
    assert asked.pop("accumulate") == 2 and asked["model"].pop("remat") is True
    assert asked == plain


@pytest.mark.slow
def test_dry_run_trains_nothing(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--config=tests/small_recipe.py:camvid", f"--workdir={tmp_path / 'run'}", "--config.devices=2"]
    words += ["--config.model.dtype=float32", f"--config.data_dir={tmp_path}"]  # a folder without data
    assert main(["jaxuda", *words, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    row = re.search(r"source_only +([\d.]+) M +(\d+) +([\d.e-]+) +([\d.]+) +([\d.]+) +[\d.e-]+\*? +3 ", printed)
    assert row and row[2] == "2" and float(row[1]) > 0.05 and float(row[3]) > 0
    assert "statistics" not in printed and not (tmp_path / "run").exists()
