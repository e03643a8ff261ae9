"""Cost of the published recipes: memory and arithmetic of one step of each training stage, as a Markdown table.

    python experiments/benchmarks/recipe_cost.py configs/sdca.py:gta5 [...] [--config.model.dtype=bfloat16 ...]

Nothing is computed: the step is traced at full size, with the forms of the layers for a GPU. Memory is the largest sum
of arrays that are alive at the same time, if operations run in the order of the trace and none are fused; compilers do
better. Arithmetic counts convolutions and matrix products, two operations per multiply-add; hours are for 40 TFLOP/s
sustained. On the training machine, `python -m jaxuda.main --config ... --dry_run` compiles the steps too.
"""

import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxuda.cli import parse
from jaxuda.models import layers
from jaxuda.pipeline import cost
from jaxuda.pipeline.tracing import abstract_step

ROOT, SUSTAINED = Path(__file__).resolve().parents[2], 40e12


def main() -> None:
    """Prints a row per training stage."""
    print("| recipe | stage | batch | GiB | TFLOP per step | steps | hours |\n|---|---|---|---|---|---|---|")
    fields = [word for word in sys.argv[1:] if word.startswith("--")]
    for word in (word for word in sys.argv[1:] if word not in fields):
        config = parse(["recipe_cost", f"--config={ROOT / word}", *fields]).config
        stages, classes = cost.training_stages(config, Path("runs"))
        for stage in stages:
            settings = stage.config
            step, arguments = abstract_step(settings, classes, settings.batch, settings.model.get("depth", False))
            with layers.compile_for("gpu"):
                jaxpr = jax.make_jaxpr(step)(*arguments).jaxpr
            count = cost.operations(jaxpr)
            hours = count * settings.steps / SUSTAINED / 3600
            print(
                f"| {Path(word).stem}:{config.benchmark} | {stage.name} | {settings.batch} | "
                f"{cost.traced_bytes(jaxpr) / cost.GIB:.1f} | {count / 1e12:.1f} | {settings.steps} | {hours:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
