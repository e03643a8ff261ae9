"""Compiles the train steps of recipes for a GPU, on a machine that needs none, and shows what will run there.

    python experiments/gpu/compile_steps.py configs/minent.py:gta5
    python experiments/gpu/compile_steps.py --card A100 configs/minent.py:gta5 --config.model.dtype=bfloat16
    python experiments/gpu/compile_steps.py --check configs/{minent,sdca,daformer}.py:gta5
    python experiments/gpu/compile_steps.py --stages adapt --convolutions configs/minent.py:gta5

Each training stage's step, of one device with the stage's batch, becomes a row. Times are not known, all else is: which
kernels of cuDNN are called, and with which windows; arithmetic, memory and traffic; what would run on the host. The
compiler is that of JAX's plugin for NVIDIA GPUs, of the version of JAX that is installed. Unless it is installed too,
its wheels (0.7 GB) are put into the folder `--wheels`; nothing else is changed. A step takes about half a minute.

useful: operations of the network with XLA's own convolutions, two per multiply-add, in 10^12; compiled: those of the
    program, convolutions and matrix products.
forward, input, kernel: calls of cuDNN for the result and for both gradients; +N: N calls with a window that is larger
    than any kernel of the network (a gradient that is computed as a huge forward convolution).
GiB: state, images and temporary memory. GB: what the kernels read and write, if no cache helps.
kernels: those and calls of libraries; moves: how many of these only transpose or copy, and their GB.

With `--check` the command fails (1) if there is such a window; if kernels' gradients are not computed as such; if the
program has 2% more operations than are useful; if anything needs the host; if anything is float64.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.gpu import program
from experiments.gpu.cards import CARDS, target

ROOT, SPARE = Path(__file__).resolve().parents[2], 1.02
HEAD = ("recipe", "stage", "card", "type", "useful", "compiled", "forward", "input", "kernel", "GiB", "GB", "kernels")
HEAD += ("moves", "host", "float64", "seconds")


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The options, and the fields of the recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="configs/NAME.py:BENCHMARK")
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--stages", default="", help="names of stages, with commas; default: all that train")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plain", action="store_true", help="with XLA's own convolutions everywhere")
    parser.add_argument("--convolutions", action="store_true", help="list the calls of cuDNN, by their windows")
    parser.add_argument("--text", type=Path, help="a folder for the programs' text")
    folder = Path(tempfile.gettempdir()) / f"jaxuda-gpu-compiler-{version('jax')}"
    parser.add_argument("--wheels", type=Path, default=folder, help="default: %(default)s")
    options, fields = parser.parse_known_args()
    if wrong := [field for field in fields if not field.startswith("--config.")]:
        parser.error(f"unknown: {' '.join(wrong)}")
    return options, fields


def install(folder: Path) -> None:
    """Puts the compiler's wheels into a folder, unless they are there or installed."""
    if importlib.util.find_spec("jax_plugins.xla_cuda13") if importlib.util.find_spec("jax_plugins") else None:
        return
    done = folder / "complete"
    if done.exists():
        return
    release = version("jax")
    wheels = [f"jax-cuda13-plugin=={release}", f"jax-cuda13-pjrt=={release}", "nvidia-cuda-nvcc", "nvidia-nvvm"]
    print(f"getting {' '.join(wheels)} into {folder}", file=sys.stderr)
    # Without what they depend on: cuDNN and cuBLAS are only needed to run a program.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
    if subprocess.run([*command, *wheels]).returncode:
        sys.exit(
            f"cannot compile for a GPU here: pip could not install {' '.join(wheels)} (see above). They exist for "
            "Linux and released versions of JAX; try again with network access, or give a folder with them: --wheels"
        )
    done.touch()


def restart(folder: Path) -> int:
    """Runs this command again in the compiler's environment."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    chosen = {
        "JAXUDA_COMPILES": "1",
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",  # no GPU is asked for
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the plugin need not find CUDA's libraries
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if version("jax").startswith("0.10."):  # otherwise some steps stop at "Couldn't find output tile sizes"
        chosen["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"
    return subprocess.run([sys.executable, *sys.argv], env={**os.environ, **chosen}).returncode


def main() -> int:
    """Prints a row per training stage; 1 if `--check` finds something."""
    options, fields = parse()
    if "JAXUDA_COMPILES" not in os.environ:
        install(options.wheels)
        return restart(options.wheels)

    from jaxuda.cli import parse as parse_recipe
    from jaxuda.errors import UserError
    from jaxuda.pipeline import cost

    device, wrong = describe(options.card), []
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|", flush=True)
    for word in options.recipes:
        try:
            config = parse_recipe(["compile_steps", f"--config={ROOT / word}", *fields]).config
            stages, classes = cost.training_stages(config, Path("runs"))
        except UserError as error:
            sys.exit(f"{word}: {error}")
        for stage in stages:
            if not options.stages or stage.name in options.stages.split(","):
                name = f"{Path(word).stem}:{config.benchmark}"
                wrong += [
                    f"{name} {stage.name}: {what}" for what in compile_stage(name, stage, classes, device, options)
                ]
    if options.check:
        print("\n".join(wrong) or "nothing to mend", file=sys.stderr)
    return int(options.check and bool(wrong))


def describe(card: str) -> Any:
    """Where all arrays of a step are: on one GPU that is not here."""
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=target(card), topology="1x1x1")
    except Exception as error:
        sys.exit(f"cannot compile for a GPU here: JAX's plugin for NVIDIA GPUs does not load ({error})")
    return NamedSharding(topologies.make_mesh(topology, (1,), ("d",)), PartitionSpec())


def compile_stage(recipe: str, stage: Any, classes: int, device: Any, options: argparse.Namespace) -> list[str]:
    """Compiles one stage's step, prints its row, and returns what is wrong with it."""
    import jax

    from jaxuda.models.layers import compile_for
    from jaxuda.pipeline import cost
    from jaxuda.pipeline.tracing import abstract_step

    config = stage.config
    step, arguments = abstract_step(config, classes, config.batch, config.model.get("depth", False))
    with compile_for("any"):
        useful = cost.operations(jax.make_jaxpr(lambda *given: step(*given))(*arguments).jaxpr)
    began = time.perf_counter()
    with compile_for("any" if options.plain else "gpu"):
        jitted = jax.jit(step, in_shardings=device, out_shardings=device, donate_argnums=0)
        compiled = jitted.trace(*arguments).lower().compile()
    seconds, plan, text = time.perf_counter() - began, compiled.memory_analysis(), compiled.as_text()
    if options.text:
        options.text.mkdir(parents=True, exist_ok=True)
        (options.text / f"{recipe}-{stage.name}-{config.model.dtype}.txt".replace(":", "-")).write_text(text)
    found = program.read(text)

    kernels = [x.shape for x in jax.tree.leaves((arguments[0].params, arguments[1])) if x.ndim == 4]
    large = [c for c in found.convolutions if not any(k[0] >= c.window[0] and k[1] >= c.window[1] for k in kernels)]
    counts = []
    for kind in ("Forward", "BackwardInput", "BackwardFilter"):
        calls, huge = (sum(c.calls for c in some if c.kind == kind) for some in (found.convolutions, large))
        counts.append(f"{calls - huge}+{huge}" if huge else str(calls))
    row = [
        recipe,
        stage.name,
        options.card,
        config.model.dtype,
        f"{useful / 1e12:.3g}",
        f"{found.operations / 1e12:.3g}",
    ]
    row += [*counts, f"{(plan.argument_size_in_bytes + plan.temp_size_in_bytes) / 2**30:.1f}"]
    row += [f"{found.traffic / 1e9:.0f}", str(found.kernels), f"{found.moves[0]}, {found.moves[1] / 1e9:.1f}"]
    row += [str(len(found.host)), str(len(found.double)), f"{seconds:.0f}"]
    print("| " + " | ".join(row) + " |", flush=True)
    if options.convolutions:
        listing(found.convolutions)
    return problems(found, large, kernels, useful)


def listing(convolutions: list) -> None:
    """Prints the calls of cuDNN: how many, of which kind and window, and their operations."""
    groups: dict = {}
    for call in convolutions:
        groups.setdefault((call.kind, call.window), []).append(call)
    for (kind, window), calls in sorted(groups.items()):
        total = sum(call.calls * call.operations for call in calls)
        print(f"  {sum(c.calls for c in calls):4} {kind:15} {'x'.join(map(str, window)):8} {total / 1e12:8.3f} TFLOP")


def problems(found: Any, large: list, kernels: list, useful: float) -> list[str]:
    """What `--check` fails on; `kernels`: the shapes (height, width, in, out) of the network's kernels."""
    wrong = [f"a window of {'x'.join(map(str, c.window))} in {c.where}" for c in large]
    sizes = {(*sorted((out, into)), *size) for *size, into, out in kernels}
    wrong += [
        f"the gradient of a kernel is no BackwardFilter but {c.kind}: {c.where}"
        for c in found.convolutions
        if c.kind != "BackwardFilter" and c not in large and (*sorted(c.result[:2]), *c.result[2:]) in sizes
    ]
    if found.operations > SPARE * useful:
        wrong.append(f"{found.operations / useful:.3f} times the useful operations")
    if found.host:
        wrong.append(f"on the host: {', '.join(found.host[:5])}")
    if found.double:
        wrong.append(f"float64: {', '.join(found.double[:5])}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
