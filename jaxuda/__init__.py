"""Unsupervised domain adaptation for semantic segmentation, in JAX and Flax."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxuda.inference.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["load"]


def load(checkpoint: str) -> Predictor:
    """A trained network: `load("runs/minent-streets-seed0/adapt").predict(image)` gives labels and probabilities.

    Args:
      checkpoint: the folder of a training stage, finished or running; its last whole checkpoint is taken.

    Returns:
      See `jaxuda.predictor.Predictor`.

    Raises:
      jaxuda.errors.UserError: there is no such stage, or it has no whole checkpoint.
    """
    from jaxuda.inference import predictor  # here: `import jaxuda` and the command line's help must not wait for JAX

    return predictor.load(checkpoint)
