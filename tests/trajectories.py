"""Train steps of a reduced golden network, and their parameters under the names of the golden files."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
from golden_weights import state_dict
from ml_collections import ConfigDict
from updates import begin, update

from jaxuda import methods
from jaxuda.interop.torch_checkpoint import load_torch, to_torch
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.optimizers import make_optimizer
from jaxuda.training.state import TrainState


@functools.cache
def start(model: DeepLabV2, layout: str) -> dict:
    """The generated weights of a reduced network, as our variables."""
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 65, 65, 3)))
    parts: dict = {}
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items():
        key = model.torch_layouts()[layout].name(path)
        # SDCA's files keep two dictionaries, and its keys are seeded without their names.
        part, _, inner = key.partition(".") if layout == "split" else ("", "", key)
        parts.setdefault(part, []).append((inner, to_torch(np.empty(leaf.shape, bool)).shape))
    weights = state_dict(parts)
    return load_torch(weights if layout == "split" else weights[""], model)


def by_torch_name(tree: dict, collection: str, model: DeepLabV2, layout: str) -> dict[str, np.ndarray]:
    """The leaves of `params` or `batch_stats` in double precision, by their torch name."""
    flat = flax.traverse_util.flatten_dict({collection: tree})
    name = model.torch_layouts()[layout].name
    return {name(path): np.asarray(leaf, np.float64) for path, leaf in flat.items()}


def run(
    method: str,
    config: ConfigDict,
    arrays: dict[str, np.ndarray],
    steps: int = 5,
    *,
    model: DeepLabV2,
    layout: str,
    players: dict | None = None,
) -> tuple[list, list]:
    """States (before the first step and after each) and metrics of each step, in double precision."""
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), start(model, layout))
    batch = {
        "source": {"image": arrays["src_images"].astype(np.float64), "label": arrays["src_labels"]},
        "target": {"image": arrays.get("trg_images", np.zeros(())).astype(np.float64)},
    }
    if "src_depth" in arrays:
        batch["source"]["depth"] = arrays["src_depth"].astype(np.float64)
    tx, module = make_optimizer(config, model), methods.load(method)
    extra = begin(module, model, config, batch, variables=variables).extra
    players = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), players or {})
    states = [TrainState.create({"model": variables["params"], **players}, tx, variables["batch_stats"], extra)]
    step = jax.jit(update(module, model, tx, config))
    metrics = []
    for _ in range(steps):
        state, row = step(states[-1], batch)
        states.append(state)
        metrics.append(row)
    return states, metrics
