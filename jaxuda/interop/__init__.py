"""Exchange with other frameworks."""

from jaxuda.interop.tensor_files import read_tensors
from jaxuda.interop.torch_checkpoint import load_torch, save_torch

__all__ = ["load_torch", "read_tensors", "save_torch"]
