"""One file per adaptation method, found by its name.

A method defines what is computed in one update, as a few passes; `jaxuda.training.step` takes their gradients, averages
them over devices, accumulates and applies them. A method is a module with the function

    passes(config, step) -> tuple of functions

These functions run one after another in every update, each with its own gradient with respect to `params`; the
gradients are added. Each function has the form

    pass_(params, carry, batch, *, step, model, config, constants, keys, axis_name) -> (scalar, carry)

params: {"model": the network's parameters, and what `init` added}.
carry: a `Carry`: batch statistics, the method's own state, values and metrics, as the previous pass returned them.
batch: {"source": {"image" (N, H, W, 3) float, normalised; "label" (N, H, W) int32, 255 = ignore; "depth" (N, H, W)
  float if the data have it}, "target": {"image"; "reference" as "image", with `target.reference`: another image of the
  same place; "trusted" (N, H, W) uint8, with `target.margins`: 1 where labels for the image are trusted}}, for the
  domains of the stage; N: this device's share of the part.
step: int32 scalar, the number of updates done before this one.
model: the network, a Flax module; see `jaxuda.models`.
config: the stage's settings.
constants: those that `init` returned.
keys: `Keys`; take `keys.use("a name")` for each purpose.
axis_name: the device axis, or None on one device.

A pass returns GLOBAL values: losses and metrics reduce sums and counts over `axis_name` before they divide. The
library then averages the gradients over the devices, once. Metrics are scalars; the library adds the metric `loss`,
the sum of the scalars that the passes return. A method with pseudo-labels logs `share`, the share of pixels with a
confident one.

Optional functions:

    starts(config) -> steps
        The steps at which the tuple of passes changes. `passes` is called with 0 and with each of them.
    init(key, *, model, variables, batch, config, artifacts, weights) -> Start
        Further parameters, state and constants. variables: {"params", "batch_stats"} of the network before the first
        step, also when a checkpoint is restored. batch: zeros, with the right shapes. artifacts: stage -> folder of
        its artifacts, for the stages named in `reads`; {} while a recipe is checked. weights(name): the network's
        variables with the backbone of other converted weights, named in the stage's field `weights` ("imagenet":
        those of this network).
    before_passes(params, carry, batch, *, step, model, ...) -> carry
        Runs before the passes of each part, without a gradient: for a teacher's pseudo-labels, mixed images.
    after_update(state, *, config) -> state
        Runs once per update, for any number of parts of the batch: for an EMA teacher. `state` is a `TrainState`.
    evaluated(state, *, config) -> {"student": variables, "teacher": variables}
        The networks in a state; all their arrays are arrays of the state. Default: the student alone.
    pictures(carry, batch, *, config) -> {name: array}
        What there is to see while the stage trains, for its folder `pictures`, the report and TensorBoard: images
        (N, H, W, 3) float, normalised; labels (N, H, W) int, 255 = ignore; weights (N, H, W) float 0..1 or bool. It
        is called at each evaluation, with the carry of `before_passes` on the last batch (on several devices: on the
        share of the first one), and changes nothing. Names: "source", "target", "mixed", "mixed_label", "weights".
    predict(variables, images, *, model, config) -> probabilities (N, h, w, C)
        Needed if evaluation is more than the softmax of the network's main output.

Before training starts, each stage's step is traced on abstract values: a field that the config lacks, a value that no
pass kept, a changed structure or a metric written twice is reported by name at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax

from jaxuda import plugins
from jaxuda.errors import UserError

PyTree = Any


class Start(NamedTuple):
    """What a method adds before the first step.

    params: further learnable modules, by name ({"discriminator": ...}).
    extra: the method's own state, a pytree that training updates and checkpoints save.
    constants: a pytree that passes read; neither trained nor saved (a frozen network).
    """

    params: Mapping[str, PyTree] = {}
    extra: PyTree = ()
    constants: PyTree = ()


class Keys(NamedTuple):
    """Random keys that do not depend on the number of devices or of parts of a batch.

    batch: one key for the whole batch and update, the same on every device and in every accumulated part.
    index: (N,) int32, the place of each example of this part in the global batch.
    """

    batch: jax.Array
    index: jax.Array

    def use(self, name: str) -> Keys:
        """Keys for one purpose; those of different names are independent."""
        return self._replace(batch=jax.random.fold_in(self.batch, zlib.crc32(name.encode())))

    @property
    def examples(self) -> jax.Array:
        """(N,) keys, one per example."""
        return jax.vmap(jax.random.fold_in, (None, 0))(self.batch, self.index)


class Carry(NamedTuple):
    """What one pass hands to the next. Nothing in it is differentiated.

    batch_stats, extra: as in `TrainState`. They keep their structure, shapes and dtypes, and go on to the next part of
      the batch and to the next update.
    values: what later passes of the same part need, by name.
    metrics: scalars to log, by name, equal on all devices.
    """

    batch_stats: PyTree
    extra: PyTree
    values: Mapping[str, PyTree]
    metrics: Mapping[str, jax.Array]

    def log(self, **metrics: jax.Array) -> Carry:
        """The carry with more metrics; raises UserError if it has one of them already."""
        if twice := sorted(self.metrics.keys() & metrics.keys()):
            raise UserError(f"the metric '{twice[0]}' is written twice in one update: give each its own name")
        return self._replace(metrics={**self.metrics, **metrics})

    def keep(self, **values: PyTree) -> Carry:
        """The carry with more values for the passes that follow."""
        return self._replace(values={**self.values, **values})


def names() -> list[str]:
    """The methods of jaxuda: every module here that has `passes`."""
    return plugins.names(__name__, "passes")


def load(name: str, *, imported: bool = False) -> ModuleType:
    """The method called `name`: a method of jaxuda, or (a dotted path) of the user; see `plugins.load`."""
    return plugins.load(__name__, "passes", name, "train", imported=imported)
