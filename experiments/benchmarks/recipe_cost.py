"""What a published recipe takes: GPU memory and arithmetic of one step of each of its training stages.

    python experiments/benchmarks/recipe_cost.py configs/sdca.py:gta5 [...]

Nothing is computed: the step is traced at full size, with the forms of the layers that a GPU gets. Memory is what is
alive at once if every operation runs in the order of the trace and nothing is fused; compilers do better. Arithmetic
counts convolutions and matrix products, two operations per multiply-add; hours are for 40 TFLOP/s sustained.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxuda import methods
from jaxuda.data.labels import label_space
from jaxuda.models import layers
from jaxuda.optim import make_optimizer
from jaxuda.stages import Domains, plan
from jaxuda.train import make_model, make_step
from jaxuda.train_state import TrainState

SUSTAINED = 40e12


def trace(stage, num_classes: int):
    """The jaxpr of one step."""
    model, method, tx = make_model(stage.config, num_classes), methods.load(stage.config.train), None
    tx = make_optimizer(stage.config)
    batch = {}
    for domain in ("source", "target"):
        if domain in stage.config:
            place = stage.config[domain]
            width, height = place.crop or place.resize or place.fit
            batch[domain] = {"image": jax.ShapeDtypeStruct((stage.config.batch, height, width, 3), jnp.uint8)}
    image = batch["source"]["image"]
    batch["source"]["label"] = jax.ShapeDtypeStruct(image.shape[:3], jnp.uint8)
    batch["source"]["depth"] = jax.ShapeDtypeStruct(image.shape[:3], jnp.float32)

    def start():
        variables = model.init(jax.random.key(0), jnp.zeros((1, *image.shape[1:])))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
        params, extra = method.init(jax.random.key(1), model=model, batch=zeros, config=stage.config, artifacts={})
        return TrainState.create({"model": variables["params"], **params}, tx, variables.get("batch_stats", {}), extra)

    return jax.make_jaxpr(make_step(method, model, tx, stage.config))(jax.eval_shape(start), batch).jaxpr


def size(variable) -> int:
    """Bytes of a value."""
    return int(np.prod(variable.aval.shape)) * getattr(variable.aval.dtype, "itemsize", 8)


def inner(equation) -> list:
    """The jaxprs that an operation runs."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found


def operations(jaxpr) -> float:
    """Of convolutions and matrix products."""
    total = 0.0
    for equation in jaxpr.eqns:
        total += sum(operations(part) for part in inner(equation))
        if equation.primitive.name == "conv_general_dilated":
            kernel, features = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod(kernel) / kernel[features]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * depth
    return total


def peak(jaxpr) -> int:
    """Bytes alive at once, beside the inputs, in the order of the trace."""
    last = {v: len(jaxpr.eqns) for v in jaxpr.outvars if isinstance(v, core.Var)}
    for index, equation in reversed(list(enumerate(jaxpr.eqns))):
        for variable in used(equation):
            last.setdefault(variable, index)
    alive = most = 0
    mine = set()
    for index, equation in enumerate(jaxpr.eqns):
        results = sum(size(variable) for variable in equation.outvars)
        within = max([peak(part) for part in inner(equation)], default=0)
        alive += results
        mine.update(equation.outvars)
        most = max(most, alive + max(0, within - results))
        for variable in {*used(equation), *equation.outvars} & mine:
            if last.get(variable, index) <= index:
                alive -= size(variable)
                mine.discard(variable)
    return most


def used(equation) -> list:
    """The variables that an operation reads."""
    return [variable for variable in equation.invars if isinstance(variable, core.Var)]


def main() -> None:
    """Prints a line per training stage."""
    layers.use_cpu_forms = lambda: False
    sys.path.insert(0, str(Path(__file__).parents[2]))
    known = SimpleNamespace(fingerprint="", labelled=True)
    for word in sys.argv[1:]:
        file, _, benchmark = word.partition(":")
        config = importlib.import_module(f"configs.{Path(file).stem}").get_config(benchmark)
        classes = label_space(config.label_space).num_classes
        for stage in plan(config, Path("runs"), Domains(known, known, known)):
            if "train" not in stage.config or "sweep" in stage.config:
                continue
            jaxpr = trace(stage, classes)
            state = sum(size(variable) for variable in jaxpr.invars)
            tera = operations(jaxpr) / 1e12
            print(
                f"{word} {stage.name}: {(peak(jaxpr) + state) / 2**30:.0f} GiB, {tera:.1f} TFLOP a step, "
                f"{stage.config.steps} steps, {tera * 1e12 * stage.config.steps / SUSTAINED / 3600:.0f} h",
                flush=True,
            )


if __name__ == "__main__":
    main()
