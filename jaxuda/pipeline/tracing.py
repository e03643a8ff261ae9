"""Traces a stage's step on abstract values, to find its cost and its errors without running it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxuda import methods, sweeps
from jaxuda.data import orders
from jaxuda.errors import UserError
from jaxuda.models import make_model
from jaxuda.optimizers import make_optimizer
from jaxuda.pipeline.stages import Stage
from jaxuda.training.loop import phases
from jaxuda.training.pictures import make_look
from jaxuda.training.start import evaluated, method_start, new_state
from jaxuda.training.state import TrainState
from jaxuda.training.step import make_update, to_float

PyTree = Any


def abstract_step(
    config: Any,
    classes: int,
    batch: int,
    depth: bool = False,
    phase: int | None = None,
    value_and_grad: Callable = jax.value_and_grad,
) -> tuple[Callable, tuple[TrainState, PyTree, PyTree]]:
    """A stage's step on one device, and the shapes of its arguments: state, constants, `batch` images of each domain.

    Args:
      config: a stage's resolved config. Artifacts of earlier stages are not needed.
      classes: the number of classes of the label space.
      batch: see above.
      depth: whether the source has depth.
      phase: see `make_step`; None: the last one.
      value_and_grad: see `make_update`.
    """
    model, method = make_model(config.model, classes), methods.load(config.train)
    tx = make_optimizer(config, model)
    arguments = _abstract_arguments(model, method, tx, config, batch, depth)
    evaluated(method, arguments[0], config)
    phase = phases(method, config)[-1] if phase is None else phase
    update = make_update(method, model, tx, config, phase, value_and_grad)

    def step(state: TrainState, constants: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        return update(state, constants, config.seed, to_float(batch, config.preprocess))

    return step, arguments


def _abstract_arguments(
    model: Any, method: ModuleType, tx: optax.GradientTransformation, config: Any, batch: int, depth: bool
) -> tuple[TrainState, PyTree, PyTree]:
    """The shapes of state, constants and `batch` images of each domain."""
    shapes = {}
    for domain in ("source", "target"):
        if domain in config:
            width, height = image_size(config[domain])
            shapes[domain] = {"image": jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)}
    if "target" in config and config.target.get("reference", False):
        shapes["target"]["reference"] = shapes["target"]["image"]
    if "target" in config and config.target.get("margins", None):
        shapes["target"]["trusted"] = jax.ShapeDtypeStruct(shapes["target"]["image"].shape[:3], jnp.uint8)
    image = shapes["source"]["image"]
    shapes["source"]["label"] = jax.ShapeDtypeStruct(image.shape[:3], jnp.uint8)
    if depth:
        shapes["source"]["depth"] = jax.ShapeDtypeStruct(image.shape[:3], jnp.float32)

    def begin() -> tuple[TrainState, PyTree]:
        variables = model.init(jax.random.key(0), jnp.zeros((1, *image.shape[1:])))
        zeros = to_float(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), config.preprocess)
        given = method_start(method, jax.random.key(1), model, zeros, config, {}, None, variables)
        return new_state(variables, given, tx), given.constants

    return *jax.eval_shape(begin), shapes


def image_size(domain: Any) -> tuple[int, int]:
    """(width, height) of a domain's images: the largest for `fit`; 256x128 if only the image files decide it."""
    return tuple(domain.crop or domain.resize or domain.get("fit") or (256, 128))


def check_steps(stages: Sequence[Stage], classes: int, depth: bool) -> None:
    """Traces the step of each training stage, so that an error in any of them is reported before training starts.

    Args:
      stages: those that will run; sweeps are skipped.
      classes: the number of classes of the label space.
      depth: whether the source has depth.

    Raises:
      UserError: the message names the stage, and what is wrong.
    """
    seen = []
    for stage in stages:
        config = stage.config
        if "sweep" in config:
            sweeps.load(config.sweep)
            continue
        _check_few(stage)
        sizes = {domain: image_size(config[domain]) for domain in ("source", "target") if domain in config}
        if (settings := {**config.to_dict(), **sizes}) in seen:
            continue  # source only and the oracle differ only in their images
        seen.append(settings)
        orders.load(config.order)
        try:
            for phase in phases(methods.load(config.train), config):
                step, arguments = abstract_step(config, classes, config.batch, depth, phase, _without_gradient)
                jax.eval_shape(step, *arguments)
            _check_pictures(config, classes, arguments)
        except UserError as error:
            raise UserError(f"the stage '{stage.name}' cannot be trained: {error}") from error
        except (AttributeError, KeyError) as error:
            if (missing := missing_field(error, config)) is None:
                raise
            raise UserError(
                f"{missing.reader} reads config.{missing.section or stage.name}.{missing.field}, which the config "
                "lacks: add it to that section"
            ) from error


def _check_few(stage: Stage) -> None:
    """Raises a UserError if a stage's labelled target images and source images could not be in one batch."""
    source = stage.config.source
    if "few" not in source or stage.config.batch == 1:
        return
    if (ours := image_size(source)) != (theirs := image_size(source.few)):
        raise UserError(
            f"the stage '{stage.name}' cannot be trained: source images are {ours[0]}x{ours[1]} and labelled target "
            f"images {theirs[0]}x{theirs[1]}, but config.target.labelled puts both into one batch: set resize, or "
            "crop, of config.source and config.target to one size"
        )


def _check_pictures(config: Any, classes: int, arguments: tuple[TrainState, PyTree, PyTree]) -> None:
    """Traces the method's `pictures`, if it has them; `arguments` are those of the step."""
    method = methods.load(config.train)
    if hasattr(method, "pictures"):
        look = make_look(method, make_model(config.model, classes), config)
        state, constants, batch = arguments
        jax.eval_shape(look, state, constants, config.seed, batch)


def _without_gradient(function: Callable, has_aux: bool) -> Callable:
    """The value alone, which takes a quarter of the time; returns the parameters in place of their gradient."""
    return lambda params: (function(params), params)


class Missing(NamedTuple):
    """A field that a config lacks, its section ("" for the stage's own), and the "FILE, line N," that reads it."""

    field: str
    section: str
    reader: str


def missing_field(error: Exception, config: Any) -> Missing | None:
    """The field of a stage's config that an error says is missing; None for an error of any other origin."""
    frames = list(traceback.walk_tb(error.__traceback__))
    found = re.search(r"'(\w+)\\?'", str(error))  # quotes are escaped where a similar name is suggested
    if not found or not _in_config(frames[-1][0]):
        return None
    asked = frames[-1][0].f_locals.get("self")  # ml_collections' error does not tell which section was asked
    section = next((name for name, value in config.items() if isinstance(value, ConfigDict) and value == asked), "")
    frame, line = [(frame, line) for frame, line in frames if not _in_config(frame)][-1]
    return Missing(found[1], section, f"{frame.f_code.co_filename}, line {line},")


def _in_config(frame: FrameType) -> bool:
    return "ml_collections" in frame.f_code.co_filename
