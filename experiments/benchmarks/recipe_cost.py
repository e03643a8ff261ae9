"""What a published recipe takes: GPU memory and arithmetic of one step of each of its training stages.

    python experiments/benchmarks/recipe_cost.py configs/sdca.py:gta5 [...]

Nothing is computed: the step is traced at full size, with the forms of the layers that a GPU gets. Memory is what is
alive at once if every operation runs in the order of the trace and nothing is fused; compilers do better. Arithmetic
counts convolutions and matrix products, two operations per multiply-add; hours are for 40 TFLOP/s sustained. On the
machine that is to train, `python -m jaxuda.main --config ... --dry_run` compiles the steps too.
"""

import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxuda.cli import parse
from jaxuda.models import layers
from jaxuda.pipeline import cost

ROOT, SUSTAINED = Path(__file__).resolve().parents[2], 40e12


def main() -> None:
    """Prints a line per training stage."""
    layers.use_cpu_forms = lambda: False
    for word in sys.argv[1:]:
        config = parse(["recipe_cost", f"--config={ROOT / word}"]).config
        stages, classes = cost.training_stages(config, Path("runs"))
        for stage in stages:
            step, arguments = cost.abstract_step(stage.config, classes, stage.config.batch)
            jaxpr = jax.make_jaxpr(step)(*arguments).jaxpr
            tera = cost.operations(jaxpr) / 1e12
            print(
                f"{word} {stage.name}: {cost.traced_bytes(jaxpr) / cost.GIB:.0f} GiB, {tera:.1f} TFLOP a step, "
                f"{stage.config.steps} steps, {tera * 1e12 * stage.config.steps / SUSTAINED / 3600:.0f} h",
                flush=True,
            )


if __name__ == "__main__":
    main()
