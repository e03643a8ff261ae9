"""The state before the first step, and the networks in a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxuda.errors import UserError
from jaxuda.methods import Start
from jaxuda.training import checkpoints, weights
from jaxuda.training.classes import fit_classes
from jaxuda.training.state import TrainState
from jaxuda.training.step import to_float

PyTree = Any


def start(
    task: Any,
    method: ModuleType,
    model: Any,
    tx: optax.GradientTransformation,
    batch: PyTree,
    restoring: bool = False,
    say: Callable[[str], None] = print,
    classes: Sequence[str] = (),
) -> tuple[TrainState, PyTree]:
    """The state before the first step and the method's constants, on the host; independent of the number of devices.

    Args:
      task: a `loop.Task`. The weights come from the checkpoint `task.init`, or are random and its seed decides them.
      method, model, tx: as for `step.make_step`.
      batch: any batch of the input; only its shapes and types matter.
      restoring: a saved state will replace this state. The checkpoint of `task.init` is then only read if the method
        makes constants from it.
      say: called with a line of text for each part of the network that is not as in that checkpoint.
      classes: the names of the network's classes in their order; (): they are not compared with the checkpoint's.

    Raises:
      UserError: that checkpoint is missing or of another network, or the method cannot start.
    """
    model_key, method_key = jax.random.split(jax.random.key(task.config.seed))
    images = jnp.zeros((1, *batch["source"]["image"].shape[1:]), jnp.float32)
    variables = jax.device_get(jax.jit(partial(model.init, train=False))(model_key, images))
    zeros = to_float(jax.tree.map(jnp.zeros_like, batch), task.config.preprocess)
    begin = partial(method_start, method, method_key, model, zeros, task.config, task.artifacts, task.weights)
    given = begin(variables) if restoring else None
    if task.init is not None and (given is None or jax.tree.leaves(given.constants)):
        arrays, _ = checkpoints.read_variables(*task.init)
        variables, notes = fit_classes(arrays, variables, model, task.init[0].parent, classes)
        given = None
        for note in notes if not restoring else ():
            say(f"{task.name}: {note}")
    given = given or begin(variables)
    return jax.device_get((new_state(variables, given, tx), given.constants))


def method_start(
    method: ModuleType,
    key: jax.Array,
    model: Any,
    batch: PyTree,
    config: Any,
    artifacts: Mapping[str, Path],
    converted: Mapping[str, Path] | None,
    variables: PyTree,
) -> Start:
    """What the method's `init` adds; nothing if it has no `init`. If `converted` is None, other weights are zeros."""
    if not hasattr(method, "init"):
        return Start()

    def other_weights(name: str) -> PyTree:
        if converted is None:
            return jax.tree.map(jnp.zeros_like, variables)
        if name not in converted:
            raise UserError(
                f"the method {config.train} asks for the weights '{name}': name them in the stage's `weights`"
            )
        arrays, _ = checkpoints.read_variables(converted[name])
        return weights.fit(arrays, variables, model, str(converted[name].parent))[0]

    return method.init(
        key,
        model=model,
        variables=variables,
        batch=batch,
        config=config,
        artifacts=artifacts,
        weights=other_weights,
    )


def new_state(variables: PyTree, given: Start, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first update, made of a network's variables and what its method adds."""
    params = {"model": variables["params"], **given.params}
    return TrainState.create(params, tx, variables.get("batch_stats", {}), given.extra)


def evaluated(method: ModuleType, state: TrainState, config: Any) -> dict[str, PyTree]:
    """The networks in a state by name, each as variables {"params", "batch_stats"}.

    Raises:
      UserError: there is no network of the name `config.evaluation.network`.
    """
    student = {"params": state.params["model"], "batch_stats": state.batch_stats}
    networks = (
        method.evaluated(state, config=config) if hasattr(method, "evaluated") else {checkpoints.STUDENT: student}
    )
    if config.evaluation.network not in networks:
        raise UserError(
            f"evaluation.network={config.evaluation.network!r}, but the networks of the method {config.train} are: "
            f"{', '.join(networks)}. A stage has its own choice: --config.STAGE.evaluation.network=NAME"
        )
    return networks
