"""Exchange with other frameworks."""

from jaxuda.interop.torch_checkpoint import load_torch

__all__ = ["load_torch"]
