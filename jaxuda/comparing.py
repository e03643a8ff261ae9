"""Which runs may stand in one table: those that were scored on the same classes, images and input size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxuda.errors import UserError


def check(runs: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuses runs whose scores do not mean the same.

    Args:
      runs: the name of each and what its scores depend on, such as {"classes": ("road", "sky")}; None for what is not
        known.

    Raises:
      UserError: two runs differ; it says in what, with both values.
    """
    first: dict[str, tuple[str, Any]] = {}
    for name, facts in runs:
        for what, value in facts.items():
            if value is None:
                continue
            other, known = first.setdefault(what, (name, value))
            if known != value:
                raise UserError(
                    f"{other} and {name} cannot be compared, their {what} differ: {_shown(known)} against "
                    f"{_shown(value)}. Compare runs of one benchmark"
                )


def _shown(value: Any) -> str:
    return f"{len(value)} ({', '.join(map(str, value))})" if isinstance(value, tuple) and len(value) > 2 else str(value)
