"""Memory of one published step of PLCA: ResNet-101, 8 + 8 crops of 730x730; the step is compiled but not run.

    python experiments/benchmarks/plca_memory.py                                     # two or three minutes
    python experiments/benchmarks/plca_memory.py --config.model.remat=False          # without computing blocks twice

Any field of configs/plca.py:gta5 can be set. The convolutions are those for accelerators. On a CPU the
figures are XLA's plan for the arrays of the step; an accelerator's library may need some working memory in addition.
XLA's compiler for CPUs orders operations for speed; that is switched off here, as compilers for accelerators do not.
"""

import os
import sys
from pathlib import Path

# Before anything imports jax.
os.environ["XLA_FLAGS"] = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxuda.cli import parse
from jaxuda.models import layers
from jaxuda.parallel import jit_step
from jaxuda.pipeline.stages import resolve
from jaxuda.pipeline.tracing import abstract_step

ROOT, CLASSES = Path(__file__).resolve().parents[2], 19


def main() -> None:
    """Compiles the step and prints its memory."""
    config = parse(["plca_memory", f"--config={ROOT}/configs/plca.py:gta5", *sys.argv[1:]]).config
    stage, (width, height) = resolve("adapt", config), config.source.crop
    step, arguments = abstract_step(stage, CLASSES, stage.batch)
    with layers.compile_for("any"):
        compiled = jit_step(step, jax.devices()[0]).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    # The state is donated: the new state takes the memory of the old one.
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    print(f"{stage.batch} + {stage.batch} images of {width}x{height} in {stage.accumulate} parts, {stage.model.dtype}")
    print(f"state and images {memory.argument_size_in_bytes / 2**30:6.2f} GiB")
    print(f"while computing  {memory.temp_size_in_bytes / 2**30:6.2f} GiB")
    print(f"together         {total / 2**30:6.2f} GiB")


if __name__ == "__main__":
    main()
