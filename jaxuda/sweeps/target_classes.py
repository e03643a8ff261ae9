"""Which classes the network predicts in each target image, to choose source partners by (`data.orders.paired`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import files, parallel
from jaxuda.data.orders.paired import FILE
from jaxuda.data.records import Domains
from jaxuda.sweeps.scores import make_scores, score_grid, shown_pixels, sweep
from jaxuda.training.logs import progress_bar

PyTree = Any


def run(
    variables: PyTree,
    domains: Domains,
    folder: Path,
    *,
    model: nn.Module,
    method: Any,
    config: Any,
    devices: list[jax.Device],
    say: Callable[[str], None],
) -> None:
    """Writes `folder`/target_classes.json: the share of each class in the prediction of each target training image."""
    target, classes = domains.target.images_only(), domains.label_space.classes
    scores = make_scores(model, method, config)

    @jax.jit
    def shares(variables: PyTree, images: jax.Array, shown: jax.Array) -> jax.Array:
        predicted = jnp.argmax(scores(variables, images), -1)[..., None] == jnp.arange(len(classes))
        counts = jnp.sum(predicted & shown[..., None], (1, 2))
        return counts / jnp.maximum(jnp.sum(shown, (1, 2)), 1)[:, None]

    grid = score_grid(scores, variables, config)
    variables, images = parallel.everywhere(variables, devices), {}
    with progress_bar(len(target), "target classes", "img") as bar:
        for batch in sweep(target, config):
            arrays = parallel.spread((batch["image"], shown_pixels(batch, config, grid)), devices)
            found = np.asarray(shares(variables, *arrays))
            rows = [[round(float(share), 6) for share in row] for row in found]
            images |= dict(zip(batch["id"], rows, strict=False))
            bar.update(batch["count"])
    files.write_json(folder / FILE, {"classes": list(classes), "images": images})
    seen = np.mean([np.count_nonzero(row) for row in images.values()])
    say(f"{seen:.1f} of {len(classes)} classes are predicted in a target image, on average")
