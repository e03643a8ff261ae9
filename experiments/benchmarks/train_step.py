"""Whole train steps against PyTorch: forward, loss, backward and update of the same network and losses.

    python experiments/benchmarks/train_step.py                                  # network of configs/minent.py:streets
    python experiments/benchmarks/train_step.py --method advent
    python experiments/benchmarks/train_step.py --network resnet101 --width 64 --batch 1 --source 513x257
    python experiments/benchmarks/train_step.py --network resnet101 --width 64 --levels 2 --method sdca --memory
    python experiments/benchmarks/train_step.py --network lite0 --source 240x180 --one_core --layout channels_last
    python experiments/benchmarks/train_step.py --network lite0 --method daformer --one_core --layout channels_last

Both start from the same weights and use the same images; a check tests that their losses agree over the first steps.
Then their steps take turns in one process, on the same number of threads, and the medians are compared. If other
programs use the processor, threads that wait for each other lose most: `--one_core` compares the processor time of one
thread each. PyTorch runs eagerly with the memory layout (`--layout`) that is faster: on the CPU the plain one, on a GPU
channels_last. With `--memory` each also runs in its own process, and reports the memory of a step in addition to
weights, momentum and batch: for JAX the figure of the compiled code, for PyTorch the growth of the peak. Both run with
`jaxuda.training.allocation.keep_freed_memory`, unless `--default_allocator` is set.

On a GPU (needs CUDA builds of both; written for one, not yet run there):

    python experiments/benchmarks/train_step.py --network resnet101 --width 64 --levels 2 --method advent \
        --batch 2 --source 1280x720 --target 1024x512 --dtype bfloat16

float32 means TF32 for both, bfloat16 means AMP for PyTorch. The rate is also given as a share of the rate of a matrix
product of 8192 x 8192 with the same dtype, measured before. Operations are those of the convolutions and products in
the trace of the plain forms, two per multiply-add, whatever forms run.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import flax
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxuda import methods
from jaxuda.data.records import Domains
from jaxuda.interop import torch_checkpoint
from jaxuda.methods import Keys, selftraining
from jaxuda.models import layers, make_model
from jaxuda.models.discriminator import FCDiscriminator
from jaxuda.optimizers import make_optimizer
from jaxuda.parallel import jit_step
from jaxuda.pipeline.cost import operations
from jaxuda.pipeline.stages import plan
from jaxuda.training.allocation import keep_freed_memory
from jaxuda.training.start import new_state
from jaxuda.training.state import TrainState
from jaxuda.training.step import make_step

CLASSES = 19


def stage_config(options: argparse.Namespace):
    """The stage `adapt` of the method's quick recipe (MinEnt's `source_only`) with the chosen network."""
    name = {"source_only": "minent"}.get(options.method, options.method)
    lite = options.network == "lite0"
    config = importlib.import_module(f"configs.{name}").get_config("streets,lite" if lite else "streets")
    config.model.dtype = options.dtype
    if lite:
        config.optim.head_factor = 1.0  # as in the reference, whose optimizer has one learning rate
    else:
        variant = "torchvision" if options.network == "resnet18" else "caffe"
        config.model.update({"backbone": options.network, "variant": variant, "width": options.width})
        config.model.aux = options.levels == 2
        for stage in ("source_only", "adapt"):
            # The first steps of a deep network from scratch are huge: they would amplify rounding errors at once.
            config[stage].lr = 1e-4 if options.network == "resnet18" else 1e-7
    known = SimpleNamespace(fingerprint="", labelled=True)
    stages = {stage.name: stage for stage in plan(config, Path("runs"), Domains(known, known, (known,)))}
    return stages["source_only" if options.method == "source_only" else "adapt"].config


def make_batch(options: argparse.Namespace) -> dict:
    """Blurred noise as images, blobs as labels, 5% of them unlabelled."""
    rng = np.random.default_rng(0)

    def maps(size: str, channels: int) -> np.ndarray:
        width, height = map(int, size.split("x"))
        coarse = rng.standard_normal((options.batch, -(-height // 16), -(-width // 16), channels))
        return coarse.repeat(16, 1).repeat(16, 2)[:, :height, :width]

    def images(size: str) -> np.ndarray:
        values = 128 + 50 * maps(size, 3)
        return (values + rng.normal(0, 10, values.shape)).clip(0, 255).astype(np.uint8)

    label = maps(options.source, CLASSES).argmax(-1).astype(np.uint8)
    label[rng.random(label.shape) < 0.05] = 255
    return {"source": {"image": images(options.source), "label": label}, "target": {"image": images(options.target)}}


def draws(options: argparse.Namespace, config, label: np.ndarray, steps: int) -> list[dict]:
    """What DAFormer's step draws in each of the first steps, as arrays: classes to paste, and changes of colour."""

    @jax.jit
    def draw(step: int) -> dict:
        keys = Keys(jax.random.fold_in(jax.random.key(config.seed), step), jnp.arange(options.batch))
        present = selftraining.present_classes(label.astype(np.int32), CLASSES)
        coins = selftraining.flip_coins(keys.use("mixed coins"))
        colours = selftraining.augment_parameters(keys.use("mixed colours"), config.strength, jnp.float32)
        drawn = dict(zip(("factors", "order", "sigma"), colours, strict=True))
        return {**drawn, **coins._asdict(), "pasted": selftraining.draw_classes(keys.use("mixed classes"), present)}

    found = []
    for step in range(steps):
        drawn = jax.device_get(draw(step))
        values = np.array([*range(CLASSES), 255])
        drawn["classes"] = [values[chosen] for chosen in drawn.pop("pasted")]
        found.append(drawn)
    return found


def torch_weights(variables: dict, layout: torch_checkpoint.Layout) -> dict[str, np.ndarray]:
    """A torch state dict."""
    flat = flax.traverse_util.flatten_dict(jax.device_get(variables))
    return {layout.name(path): np.array(torch_checkpoint.to_torch(x)) for path, x in flat.items()}


class Ours:
    """jaxuda's step, compiled."""

    def __init__(self, options: argparse.Namespace, batch: dict):
        config = stage_config(options)
        model, method = make_model(config.model, CLASSES), methods.load(config.train)
        tx = make_optimizer(config, model)
        if options.method == "source_only":
            batch = {"source": batch["source"]}
        self.batch, image = jax.device_put(batch), batch["source"]["image"]

        key = partial(jax.random.key, impl="rbg")  # compiles sooner

        def start() -> TrainState:
            variables = model.init(key(0), jnp.zeros((1, *image.shape[1:])))
            given = methods.Start()
            if hasattr(method, "init"):
                # The network itself takes the place of other weights (DAFormer's ImageNet network).
                other = {"artifacts": {}, "weights": lambda name: variables}
                given = method.init(key(1), model=model, variables=variables, batch=batch, config=config, **other)
            return new_state(variables, given, tx), jax.tree.map(jnp.array, given.constants)

        self.state, self.constants = jax.jit(start)()
        update = make_step(method, model, tx, config)

        def step(state: TrainState, constants: dict, batch: dict) -> tuple[TrainState, dict]:
            return update(state, constants, config.seed, batch)

        self.model = model
        self.layout = "lite" if options.network == "lite0" else ("one_level", "two_level")[options.levels - 1]
        arguments = self.state, self.constants, self.batch
        self.plain = partial(jax.make_jaxpr(lambda *given: step(*given)), *arguments)
        started = time.perf_counter()
        self.compiled = jit_step(step, jax.devices()[0]).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - started

    def step(self) -> float:
        self.state, metrics = self.compiled(self.state, self.constants, self.batch)
        return float(metrics["loss"])

    def weights(self) -> tuple[dict, dict]:
        """Torch state dicts of the network and the discriminators."""
        discriminators = self.state.params.get("discriminator", {})
        fields = {"params": self.state.params["model"], "batch_stats": self.state.batch_stats}
        network = self.model.torch_layouts()[self.layout]
        (layout,) = FCDiscriminator().torch_layouts().values()
        return torch_weights(fields, network), {
            level: torch_weights({"params": params}, layout) for level, params in discriminators.items()
        }

    def operations(self) -> float:
        """Number of operations of one step, with XLA's own convolutions."""
        with layers.compile_for("any"):
            return operations(self.plain().jaxpr)

    def memory(self) -> float:
        """Bytes in addition to the arguments; results count if they do not replace an argument."""
        needs = self.compiled.memory_analysis()
        return needs.temp_size_in_bytes + max(needs.output_size_in_bytes - needs.alias_size_in_bytes, 0)


class Theirs:
    """PyTorch's step, eager."""

    def __init__(self, options: argparse.Namespace, batch: dict, weights: tuple[dict, dict] | None = None):
        import torch
        from torch_networks import Trainer

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        layout = options.layout or {"cpu": "contiguous_format", "cuda": "channels_last"}[self.device]
        config, drawn = stage_config(options), []
        if options.method == "daformer":
            drawn = draws(options, config, batch["source"]["label"], options.repeats + 3)
        colours = np.array(layers.denormalise(jnp.array([[0.0] * 3, [1.0] * 3]), config.preprocess)) / 255
        colours = torch.from_numpy(np.stack([colours[0], colours[1] - colours[0]])).to(self.device)
        layout = getattr(torch, layout)
        self.trainer = Trainer(
            options.method, config, CLASSES, self.device, layout, jax.tree.map(torch.tensor, drawn), colours
        )
        weights = weights or ({}, {})
        self.trainer.load(jax.tree.map(torch.from_numpy, weights))
        images = [np.array(layers.normalise(batch[d]["image"], config.preprocess)) for d in ("source", "target")]
        source, target = (self.trainer.place(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in images)
        label = torch.from_numpy(batch["source"]["label"]).long().to(self.device)
        self.batch = source, label, target

    def step(self) -> float:
        return self.trainer.step(*self.batch).item()

    def memory(self) -> float:
        """Bytes by which the peak grew over two steps, without the momentum that the first one creates."""
        before = self.peak(reset=True)
        self.step(), self.step()
        moments = [x for o in self.trainer.optimizers for s in o.state.values() for x in s.values()]
        kept = sum(x.numel() * x.element_size() for x in moments if hasattr(x, "numel"))
        return self.peak() - before - kept

    def peak(self, reset: bool = False) -> int:
        if self.device == "cuda":
            if reset:
                self.torch.cuda.reset_peak_memory_stats()
            return self.torch.cuda.max_memory_allocated()
        return peak_of_process(reset)


def peak_of_process(reset: bool = False) -> int:
    """The most memory in bytes that this process has used, or has used since the last reset, which may be now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def matmul_rate(dtype: str, side: int) -> float:
    """Operations per second of a product of two square matrices."""
    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda x: x @ x)
    step = lambda: jax.block_until_ready(product(x))  # noqa: E731
    step()
    return 2 * side**3 / interleaved([step], 5).min()


def interleaved(steps: list, repeats: int, clock: Callable[[], float] = time.perf_counter) -> np.ndarray:
    """(repeats, len(steps)) seconds; the steps take turns."""
    seconds = np.zeros((repeats, len(steps)))
    for row in seconds:
        for index, step in enumerate(steps):
            time.sleep(0.02)  # lets idle threads of the other one, which still spin, go to sleep
            started = clock()
            step()
            row[index] = clock() - started
    return seconds


def main() -> None:
    """Prints losses, times, rates and, with --memory, memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ("source_only", "minent", "advent", "sdca", "daformer")
    parser.add_argument("--method", choices=known, default="source_only")
    parser.add_argument("--network", choices=("resnet18", "resnet50", "resnet101", "lite0"), default="resnet18")
    parser.add_argument("--width", type=int, default=32, help="channels of the stem; 64 in the literature")
    parser.add_argument("--levels", type=int, choices=(1, 2), default=1)
    parser.add_argument("--batch", type=int, default=4, help="images of each domain")
    parser.add_argument("--source", default="256x128", help="WIDTHxHEIGHT of source images")
    parser.add_argument("--target", help="of target images, where they differ")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--layout", choices=("contiguous_format", "channels_last"), help="of PyTorch's maps")
    parser.add_argument("--default_allocator", action="store_true")
    parser.add_argument("--one_core", action="store_true", help="one thread each, and its processor time")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--alone", choices=("ours", "theirs", "first"), help="one's memory, or only a step")
    options = parser.parse_args()
    if options.network == "lite0" and (options.method in ("advent", "sdca") or options.levels != 1):
        parser.error("the reference trains lite0 with source_only, minent or daformer, and with one level")
    if options.method == "daformer" and options.levels != 1:
        parser.error("the reference of DAFormer's step has one level")
    options.target = options.target or options.source
    if options.one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if not options.default_allocator:
        keep_freed_memory()
    batch = make_batch(options)
    if options.alone == "first":
        Ours(options, batch).step()
        return
    if options.alone:
        print(json.dumps({"ours": Ours, "theirs": Theirs}[options.alone](options, batch).memory()))
        return

    ours = Ours(options, batch)
    theirs = Theirs(options, batch, ours.weights())
    if options.one_core:
        theirs.torch.set_num_threads(1)
    device = jax.devices()[0]
    rate = matmul_rate(options.dtype, 2048 if device.platform == "cpu" else 8192)
    size = options.source + (f" + {options.target}" if options.method != "source_only" else "")
    print(f"{options.method}, {options.network} of width {options.width}, {options.levels} level(s), ", end="")
    print(f"{options.batch} x {size}, {options.dtype}, {device.platform} ({device.device_kind})")
    losses = np.array([[form.step() for form in (ours, theirs)] for _ in range(3)])
    print("losses of the first steps: " + ", ".join(f"{a:.6f} / {b:.6f}" for a, b in losses))
    exact = options.dtype == "float32"
    np.testing.assert_allclose(*losses[0], rtol=1e-4 if exact else 3e-2)
    np.testing.assert_allclose(*losses[1:].T, rtol=1e-3 if exact else 3e-2)

    clock = time.process_time if options.one_core else time.perf_counter
    seconds = np.median(interleaved([ours.step, theirs.step], options.repeats, clock), axis=0)
    work = ours.operations()
    threads = theirs.torch.get_num_threads() if device.platform == "cpu" else 1
    print(f"{work / 1e9:.0f} GFLOP a step; a matrix product runs at {rate / 1e9:.0f} GFLOP/s; ", end="")
    print(f"{threads} thread(s); compiled in {ours.compile_seconds:.0f} s")
    print(f"{'':10}{'seconds':>10}{'ratio':>8}{'GFLOP/s':>10}{'of product':>12}")
    for name, value in zip(("ours", "PyTorch"), seconds, strict=True):
        share = work / value / rate
        print(f"{name:10}{value:10.4f}{value / seconds[1]:8.2f}{work / value / 1e9:10.0f}{share:12.0%}")
    if options.memory:
        command = [sys.executable, __file__, *sys.argv[1:], "--alone"]
        run = partial(subprocess.run, check=True, capture_output=True, text=True, env=os.environ)
        sizes = [json.loads(run([*command, form]).stdout.splitlines()[-1]) for form in ("ours", "theirs")]
        print(f"memory of a step: {sizes[0] / 1e6:.0f} MB, PyTorch {sizes[1] / 1e6:.0f} MB, ", end="")
        print(f"ratio {sizes[0] / sizes[1]:.2f}")


if __name__ == "__main__":
    main()
