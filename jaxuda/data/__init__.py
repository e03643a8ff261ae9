"""Datasets, label spaces and the input pipeline."""

from jaxuda.data import orders
from jaxuda.data.input import make_input, prefetch_to_device, sweep_batches
from jaxuda.data.joined import Joined, domain_transform
from jaxuda.data.pseudo import PseudoLabelled
from jaxuda.data.records import Records, load
from jaxuda.data.transforms import build_transform

__all__ = [
    "Joined",
    "PseudoLabelled",
    "Records",
    "build_transform",
    "domain_transform",
    "load",
    "make_input",
    "orders",
    "prefetch_to_device",
    "sweep_batches",
]
