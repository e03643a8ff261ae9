"""AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019), as torch computes it."""

from __future__ import annotations

from typing import Any

import optax

from jaxuda.errors import UserError
from jaxuda.optimizers import GROUPS
from jaxuda.optimizers.schedules import poly_schedule

_NUMBERS = ("head_factor", "weight_decay", "power", "warmup_steps", "warmup_ratio")


def make(group: str, config: Any, start: int = 0) -> optax.GradientTransformation:
    """The optimizer of one group of a network's parameters.

    Args:
      group: one of `optimizers.GROUPS`.
      config: the stage's settings. It reads `lr`, `schedule_steps`, and from `optim`: `head_factor` (the learning rate
        of heads is this many times larger), `weight_decay`, `undecayed` (the groups without it), `power`,
        `warmup_steps` and `warmup_ratio` (see `poly_schedule`).
      start: the step of its first update.

    Raises:
      UserError: `optim` lacks one of these fields, or its value is of the wrong kind.
    """
    optim = config["optim"]
    if lacking := [field for field in (*_NUMBERS, "undecayed") if field not in optim]:
        raise UserError(
            f"config.optim lacks {', '.join(lacking)}, which optim.name=adamw needs: make the section with "
            "configs.common.adamw"
        )
    for field in _NUMBERS:
        if type(optim[field]) not in (int, float):
            raise UserError(f"config.optim.{field}={optim[field]!r} must be a number")
    undecayed = optim["undecayed"]
    if not isinstance(undecayed, tuple | list) or not all(name in GROUPS for name in undecayed):
        raise UserError(f"config.optim.undecayed={undecayed!r} must be a tuple of groups ({', '.join(GROUPS)})")
    schedule = poly_schedule(
        config["lr"] * (optim["head_factor"] if group == "head" else 1.0),
        config["schedule_steps"],
        optim["power"],
        optim["warmup_steps"],
        optim["warmup_ratio"],
        start,
    )
    return adamw(schedule, 0.0 if group in undecayed else optim["weight_decay"])


def adamw(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """One update is `weight *= 1 - lr * weight_decay; weight -= lr * m / (sqrt(v) + 1e-8)`.

    m and v are the running means of the gradient (decay 0.9) and of its square (0.999), divided by 1 - decay ** k in
    the k-th update. `schedule` gives lr for each update, counted from 0.
    """
    return optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)
