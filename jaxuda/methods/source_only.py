"""Source only: supervised training on one labelled domain, the baseline and the first stage of most recipes.

There is no forward pass on the target, since it would move the statistics of batch normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxuda.methods.supervised import source_pass


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """One pass, on the source."""
    return (source_pass,)
