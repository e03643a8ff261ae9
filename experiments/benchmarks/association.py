"""Streaming cycle association against the dense formulation, in JAX and in PyTorch: memory and time.

    python experiments/benchmarks/association.py                  # a 730x730 pair: 92 x 92 positions, 2048 channels
    python experiments/benchmarks/association.py --metric kl --channels 19
    python experiments/benchmarks/association.py --side 46        # a sixteenth of the work

One image pair, value and gradients for both maps, with aggregation, float32. A check tests that all compute the same
numbers: values to a 10,000th, norms of gradients to a 100th, since if two positions are almost equally similar to a
third one, the order of additions decides which of them gets the gradient. Each form runs in its own process. Memory is
what is needed in addition to the maps and their gradients: for JAX the figure of the compiled code, for PyTorch the
growth of the process's peak. Times are medians of the repeats, after one run that compiles: wall-clock time, and the
time of all processor cores together, which is the one to compare on a busy machine. Without PyTorch its row is skipped.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CLASSES = 19


def problem(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source and target (1, side, side, channels), not negative, like features after a ReLU, and labels."""
    rng = np.random.default_rng(0)
    shape = (1, options.side, options.side, options.channels)
    centres = rng.standard_normal((CLASSES, options.channels), np.float32)
    labels = rng.integers(0, CLASSES, shape[:3])
    maps = [centres[labels] + 2 * rng.standard_normal(shape, np.float32) for _ in range(2)]
    maps = [np.maximum(x, 0) for x in maps]
    if options.metric == "kl":
        maps = [np.exp(x) / np.sum(np.exp(x), axis=-1, keepdims=True) for x in maps]
    return *maps, labels.astype(np.int32)


def measure(step: Callable, repeats: int) -> dict[str, float]:
    """Median seconds of `step`: wall-clock time and processor time."""
    clock, processor = [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        step()
        clock.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    return {"seconds": float(np.median(clock)), "processor": float(np.median(processor))}


def run_jax(options: argparse.Namespace, loss: Callable) -> dict:
    """Measures a function of source, target, labels and metric."""
    import jax

    source, target, labels = jax.device_put(problem(options))
    step = jax.jit(jax.value_and_grad(partial(loss, metric=options.metric), (0, 1))).lower(source, target, labels)
    step = step.compile()
    memory = step.memory_analysis().temp_size_in_bytes
    value, gradients = jax.block_until_ready(step(source, target, labels))
    times = measure(lambda: jax.block_until_ready(step(source, target, labels)), options.repeats)
    norms = [float(np.linalg.norm(gradient)) for gradient in gradients]
    device = f"{jax.devices()[0].platform} ({jax.devices()[0].device_kind})"
    return {
        "value": float(value),
        "norms": norms,
        "bytes": memory,
        **times,
        "device": device,
    }


def ours(options: argparse.Namespace) -> dict:
    """The streaming form."""
    from jaxuda.losses.association import cycle_association

    return run_jax(options, cycle_association)


def dense(options: argparse.Namespace) -> dict:
    """The oracle of the tests, compiled as a whole."""
    import dense_association

    return run_jax(options, dense_association.loss)


def torch_loss(source, target, labels, metric: str):
    """The same loss in simple PyTorch code."""
    import torch
    from torch.nn.functional import normalize

    def similarities(x, y):
        if metric == "cosine":
            return normalize(x, dim=1) @ normalize(y, dim=1).T
        return x @ torch.log(y + 1e-10).T - torch.sum(x * torch.log(x + 1e-10), dim=1, keepdim=True)

    def contrast(s):
        return (s - s.mean(1, keepdim=True).detach()) / (s.std(1, keepdim=True).detach() + 1e-10)

    x, y, label = source.flatten(0, 2), target.flatten(0, 2), labels.flatten()
    own = similarities(y, y)
    y = 0.5 * y + 0.5 * torch.softmax(contrast(own) if metric == "cosine" else own, dim=1) @ y
    there = similarities(x, y)
    back = there.T if metric == "cosine" else similarities(y, x)
    there, middle = torch.softmax(contrast(there), dim=1).max(1)
    back, end = torch.softmax(contrast(back), dim=1).max(1)
    positive = (label[end[middle]] == label) & (label != 255)
    return -torch.log(there * back[middle])[positive].mean()


def torch_dense(options: argparse.Namespace) -> dict:
    """The dense form in PyTorch, on a GPU if PyTorch finds one, else on the CPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source, target, labels = (torch.from_numpy(x).to(device) for x in problem(options))
    source.requires_grad_(), target.requires_grad_()
    source.grad, target.grad = torch.zeros_like(source), torch.zeros_like(target)

    def peak() -> int:
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def step() -> float:
        source.grad.zero_(), target.grad.zero_()
        value = torch_loss(source, target, labels, options.metric)
        value.backward()
        return value.item()

    before, value = peak(), step()
    times = measure(step, options.repeats)
    norms = [float(x.grad.norm()) for x in (source, target)]
    return {
        "value": value,
        "norms": norms,
        "bytes": peak() - before,
        **times,
        "device": device,
    }


FORMS = {"streaming": ours, "dense": dense, "dense, PyTorch": torch_dense}


def main() -> None:
    """Runs every form in its own process and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=92)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--metric", choices=("cosine", "kl"), default="cosine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--form", choices=FORMS, help="run this one alone and print what was measured")
    options = parser.parse_args()
    if options.form:
        print(json.dumps(FORMS[options.form](options)))
        return
    rows = {}
    for form in FORMS:
        if form.endswith("PyTorch") and importlib.util.find_spec("torch") is None:
            print("PyTorch is not installed: its row is skipped")
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
        rows[form] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    first = rows["streaming"]
    print(f"{options.side**2} positions, {options.channels} channels, {options.metric}, {first['device']}")
    columns = {"seconds": 1, "processor": 1, "bytes": 1e6}
    print(" " * 16 + "".join(f"{name:>12}{'ratio':>8}" for name in ("seconds", "processor s", "MB")))
    for form, row in rows.items():
        cells = (f"{row[key] / unit:12.2f}{row[key] / first[key]:8.2f}" for key, unit in columns.items())
        print(f"{form:16}" + "".join(cells))
    for row in rows.values():
        np.testing.assert_allclose(row["value"], first["value"], rtol=1e-4)
        np.testing.assert_allclose(row["norms"], first["norms"], rtol=1e-2)


if __name__ == "__main__":
    main()
