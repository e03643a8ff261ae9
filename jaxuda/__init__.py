"""Unsupervised domain adaptation for semantic segmentation, in JAX and Flax."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxuda.inference.predictor import Predictor

__version__ = version("jaxuda")
__all__ = ["load"]


def load(checkpoint: str, network: str = "") -> Predictor:
    """A trained network: `load("runs/minent-streets-seed0/adapt").predict(image)` gives labels and probabilities.

    Args:
      checkpoint: the folder of a training stage, finished or running; its last valid checkpoint is used.
      network: its name, if the method has several ("student", "teacher"); default: the one that was evaluated.

    Returns:
      See `jaxuda.inference.predictor.Predictor`.

    Raises:
      jaxuda.errors.UserError: there is no such stage, it has no valid checkpoint or no such network, or its network or
        method is code outside jaxuda that is not imported.
    """
    from jaxuda.inference import predictor  # here: `import jaxuda` and the command line's help must not wait for JAX

    return predictor.load(checkpoint, network)
