"""The one training loop: batches -> step -> metrics -> evaluation -> checkpoint."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxuda import accumulation, checkpoints, data, files, methods, parallel, weights
from jaxuda.data import pairing, sampling
from jaxuda.data.records import EASY, HARD, Subset, read_split
from jaxuda.errors import Interrupted, UserError
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.layers import normalise
from jaxuda.optim import make_optimizer
from jaxuda.stages import Domains, Stage
from jaxuda.sweeps.evaluate import make_evaluator
from jaxuda.train_state import TrainState
from jaxuda.writers import RunLog, is_interactive, progress_bar

PyTree = Any
# Figures that choose a checkpoint without labels, and whether the highest (1) or the lowest (-1) is chosen.
LABEL_FREE = {"entropy": -1, "diversity": 1, "snd": 1}


def make_model(config: Any, num_classes: int) -> DeepLabV2:
    """The network that `config.model` describes."""
    fields = dict(config.model)
    fields["blocks"] = None if fields["blocks"] is None else tuple(fields["blocks"])
    return DeepLabV2(num_classes=num_classes, **fields)


def abstract_variables(model: DeepLabV2, config: Any) -> PyTree:
    """Shapes and types of the variables of `model`, found without computing them."""
    width, height = config.evaluation.size
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)


def make_step(method: Any, model: DeepLabV2, tx: optax.GradientTransformation, config: Any) -> Callable:
    """`step(state, batch, axis_name=None)`: a method's update on uint8 batches as the input gives them."""
    train_step = partial(method.train_step, model=model, config=config)
    update = accumulation.in_parts(train_step, tx, config.get("accumulate", 1))

    def step(state: TrainState, batch: PyTree, axis_name: str | None = None) -> tuple[TrainState, dict]:
        # Randomness is derived from the step, never carried along.
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        return update(state, _to_float(batch, config.preprocess), key, axis_name)

    return step


def _to_float(batch: PyTree, preprocess: str) -> PyTree:
    """Normalised float32 images and int32 labels."""
    convert = {
        "image": lambda image: normalise(image, preprocess),
        "label": lambda label: label.astype(jnp.int32),
    }
    return {
        domain: {name: convert.get(name, lambda x: x)(value) for name, value in arrays.items()}
        for domain, arrays in batch.items()
    }


def init_state(
    method: Any,
    model: DeepLabV2,
    tx: optax.GradientTransformation,
    stage: Stage,
    batch: PyTree,
    artifacts: dict[str, Path],
    say: Callable[[str], None] = print,
) -> TrainState:
    """The state before the first step, on the host; independent of the number of devices.

    Args:
      stage: its seed decides the weights, or `stage.init` says which checkpoint they come from.
      batch: any batch as the input gives it; only its shapes and types matter.
      artifacts: what earlier stages left for the method, stage -> folder.
      say: told which parts of the network are not from that checkpoint.
    """
    model_key, method_key = jax.random.split(jax.random.key(stage.config.seed))
    images = jnp.zeros((1, *batch["source"]["image"].shape[1:]), jnp.float32)
    variables = jax.device_get(jax.jit(partial(model.init, train=False))(model_key, images))
    if stage.init is not None:
        arrays, _ = checkpoints.read_variables(*stage.init)
        variables, notes = weights.fit(arrays, variables, str(stage.init[0].parent))
        for note in notes:
            say(f"{stage.name}: {note}")
    batch = _to_float(batch, stage.config.preprocess)
    extra_params, extra = method.init(method_key, model=model, batch=batch, config=stage.config, artifacts=artifacts)
    params = {"model": variables["params"], **extra_params}
    return jax.device_get(TrainState.create(params, tx, variables.get("batch_stats", {}), extra))


def train(stage: Stage, run_config: ConfigDict, domains: Domains, log: RunLog) -> None:
    """Runs or continues a training stage, and writes its `results.json`.

    Args:
      stage: what to train.
      run_config: the run's config, for what does not decide the result (devices, workers, logging).
      domains: the datasets.
      log: where progress is told.

    Raises:
      UserError: a loss is not finite, or a checkpoint cannot be written.
      Interrupted: on SIGTERM or SIGINT, after saving.
    """
    config = stage.config
    # Each of the parts that a step accumulates is spread over the devices.
    part = config.batch // config.get("accumulate", 1)
    devices = parallel.choose_devices(part, run_config.devices, run_config.platform)
    artifacts = stage.artifacts()
    labelled, unlabelled = training_records(config, domains, artifacts)
    model = make_model(config, labelled.label_space.num_classes)
    method, tx = methods.load(config.train), make_optimizer(config)
    saved = None
    if parallel.is_first():
        saved = checkpoints.Checkpoints(stage.folder / "checkpoints", log.say, keep_every=run_config.keep_every)
    try:
        start = parallel.on_first(lambda: saved.newest() or 0)
        with _input(stage, run_config, labelled, unlabelled, start, artifacts) as batches:
            loop = _Loop(stage, run_config, domains.target_val, log, devices, saved)
            if start < config.steps:
                first = next(batches)
                # What is restored, or comes from the first process, needs no other start.
                beginning = stage._replace(init=None) if start or saved is None else stage
                state = init_state(method, model, tx, beginning, _arrays(first), artifacts, log.say)
                if start:
                    state = saved.restore(start, state) if saved else state
                    log.say(f"{stage.name}: continues from step {start}")
                state = parallel.from_first(state)
                loop.rewind(start)
                step = parallel.compile_step(make_step(method, model, tx, config), devices)
                evaluate = make_evaluator(model, method, config, evaluation_devices(config, devices))
                loop.run(step, evaluate, state, start, itertools.chain([first], batches))
        parallel.on_first(lambda: files.write_json(stage.folder / "results.json", loop.results()))
    finally:
        if saved:
            saved.close()


def training_records(config: Any, domains: Domains, artifacts: dict[str, Path]) -> tuple[Any, Any]:
    """The records a stage learns from, labelled and unlabelled (None if it uses none).

    They are those of `config.domains`; `config.split` takes the easy and the hard part of a ranking instead of all,
    `config.labels` puts pseudo-labels in the place of labels.
    """
    labelled, unlabelled = domains.source, None
    if config.domains[0] == "target":
        labelled = domains.target
    if len(config.domains) == 2:
        unlabelled = domains.target
    if config.split:
        labelled = Subset(labelled, read_split(artifacts[config.split], EASY))
        unlabelled = Subset(unlabelled, read_split(artifacts[config.split], HARD))
    if config.labels:
        labelled = data.PseudoLabelled(labelled, artifacts[config.labels], domains.source.label_space)
    return labelled, unlabelled


def evaluation_devices(config: Any, devices: list[jax.Device]) -> list[jax.Device]:
    """As many of `devices` as divide the evaluation batch."""
    return devices[: max(n for n in range(1, len(devices) + 1) if config.evaluation.batch % n == 0)]


def _input(
    stage: Stage,
    run_config: ConfigDict,
    labelled: Any,
    unlabelled: Any,
    start: int,
    artifacts: dict[str, Path],
) -> data.input.BatchIterator:
    config = stage.config
    order, draws = None, config.steps * config.batch
    if config.class_balanced:
        present = sampling.classes_of_images(labelled, labelled.label_space.num_classes)
        order = sampling.class_balanced_order(present, draws, config.seed)
    elif config.get("pairing"):
        folder = artifacts[config.pairing]
        order = pairing.partners(folder, labelled, unlabelled, draws, config.seed, config.pairing_pool)
    return data.make_input(
        labelled,
        unlabelled,
        batch=config.batch,
        steps=config.steps,
        start=start,
        seed=config.seed,
        source_transform=_transform(config.source),
        target_transform=None if unlabelled is None else _transform(config.target),
        target_labels=config.get("target_label_figures", False),
        num_workers=run_config.num_workers,
        source_order=order,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _transform(domain: Any) -> data.transforms.Transform:
    return data.build_transform({k: v for k, v in dict(domain).items() if k not in ("name", "path", "split")})


def _arrays(batch: PyTree) -> PyTree:
    """A batch without the ids, which stay on the host."""
    return {domain: {k: v for k, v in arrays.items() if k != "id"} for domain, arrays in batch.items()}


class _StopSignals:
    """While entered, SIGTERM and SIGINT only set `asked`; the loop then stops between two steps.

    Several processes must stop after the same step: they tell each other at every tenth.
    """

    def __enter__(self) -> _StopSignals:
        self.asked = ""
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def after(self, step: int) -> str:
        """The signal that stops the loop after this step, or ""; to be called after each step."""
        if jax.process_count() > 1 and step % 10:
            return ""
        return next(filter(None, parallel.exchange(self.asked)), "")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Loop:
    """The loop of one stage and what it remembers between steps."""

    def __init__(
        self,
        stage: Stage,
        run_config: ConfigDict,
        validation: data.Records | None,
        log: RunLog,
        devices: list[jax.Device],
        saved: checkpoints.Checkpoints | None,
    ):
        self._stage, self._config, self._validation = stage, run_config, validation
        self._log, self._devices, self._saved = log, devices, saved
        self._history = stage.folder / "evaluations.jsonl"
        self._pending: list[tuple[int, dict, dict]] = []  # steps whose metrics are still on the device
        self._since, self._waited, self._told = time.perf_counter(), 0.0, 0.0

    def rewind(self, step: int) -> None:
        """Forgets evaluations and metrics of steps that will run again."""
        if self._saved:
            rows = [row for row in files.read_json_lines(self._history) if row["step"] <= step]
            files.write_json_lines(self._history, rows)
        self._log.rewind(self._stage.name, step)

    def run(self, step: Callable, evaluate: Callable, state: TrainState, start: int, batches: Iterator) -> None:
        """Steps `start` + 1 .. config.steps, from a state on the host."""
        name, last = self._stage.name, self._stage.config.steps
        state = parallel.replicate(state, self._devices)
        placed = data.prefetch_to_device(batches, partial(parallel.shard, devices=self._devices))
        self._since, self._waited, self._told = time.perf_counter(), 0.0, 0.0
        with _StopSignals() as stop, progress_bar(last, name, "step", initial=start) as bar:
            for done in range(start + 1, last + 1):
                waiting = time.perf_counter()
                batch = next(placed)
                self._waited += time.perf_counter() - waiting
                ids = {domain: arrays["id"] for domain, arrays in batch.items()}
                state, metrics = step(state, _arrays(batch))
                self._pending.append((done, metrics, ids))
                bar.update()

                stopping = stop.after(done)  # read once: a signal may come at any moment
                evaluates = done == last or done % self._config.eval_every == 0
                saves = bool(stopping) or evaluates or done % self._config.checkpoint_every == 0
                if saves or done % self._config.log_every == 0:
                    # Before saving: a state after a non-finite loss must not become a checkpoint.
                    bar.set_postfix_str(self._write_metrics())
                if saves:
                    host = parallel.first(state, self._devices)
                    self._check_state(done, host, ids)
                    self._save(done, host, evaluate if evaluates else None)
                if stopping and done < last:
                    raise Interrupted(
                        f"{stopping}: saved step {done} of {last} of the stage '{name}'; "
                        "the same command continues from there"
                    )

    def _save(self, step: int, state: TrainState, evaluate: Callable | None) -> None:
        scores = self._evaluation(evaluate, state, step) if evaluate else None
        parallel.on_first(lambda: self._saved.save(step, state, scores))
        self._since = time.perf_counter() - self._told

    def _write_metrics(self) -> str:
        """Fetches the metrics since the last call, checks them, and logs their mean."""
        if not self._pending:
            return ""
        rows = parallel.first([metrics for _, metrics, _ in self._pending], self._devices)
        for (step, _, ids), row in zip(self._pending, rows, strict=True):
            for metric, value in row.items():
                if not np.isfinite(value):
                    raise self._not_finite(f"{metric} is {value} at", step, ids)
        began = time.perf_counter()
        seconds = began - self._since
        step, config = self._pending[-1][0], self._stage.config
        values = {metric: float(np.mean([row[metric] for row in rows])) for metric in rows[0]}
        # Figures by class are for the curves.
        text = "  ".join(f"{metric} {value:.4g}" for metric, value in values.items() if "/" not in metric)
        values["images_per_s"] = round(len(rows) * config.batch * len(self._pending[-1][2]) / seconds, 2)
        # Shares of the time since the last call, which the devices may have spent idle: for data, and for telling.
        values["input_wait"] = round(self._waited / seconds, 4)
        values["log_wait"] = round(self._told / seconds, 4)
        self._log.scalars(self._stage.name, step, values)
        if not is_interactive():
            left = seconds / len(rows) * (config.steps - step)
            self._log.say(
                f"{self._stage.name} {step}/{config.steps}  {text}  "
                f"{values['images_per_s']:.1f} images/s  wait {100 * (self._waited + self._told) / seconds:.1f}%  "
                f"ETA {left / 60:.1f} min"
            )
        self._pending.clear()
        self._since, self._waited, self._told = began, 0.0, time.perf_counter() - began
        return text

    def _check_state(self, step: int, state: TrainState, ids: dict[str, list[str]]) -> None:
        """A loss can be finite and its gradient not: what has come of that must not become a checkpoint either."""
        checked = {"params": state.params, "batch_stats": state.batch_stats}
        for path, leaf in jax.tree_util.tree_leaves_with_path(checked):
            if not np.isfinite(leaf).all():
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise self._not_finite(f"{name} is not finite after", step, ids)

    def _not_finite(self, what: str, step: int, ids: dict[str, list[str]]) -> UserError:
        good, name = parallel.on_first(lambda: self._saved.newest()), self._stage.name
        kept = f"Step {good} is kept as the last good checkpoint" if good else "There is no checkpoint yet"
        return UserError(
            f"{what} step {step} of the stage '{name}', on the images {ids}. {kept}. A lower learning rate "
            f"(--config.{name}.lr, now {self._stage.config.lr}) is the usual remedy"
        )

    def _evaluation(self, evaluate: Callable, state: TrainState, step: int) -> dict[str, float] | None:
        """Evaluates on the target's validation split, logs and remembers it."""
        if self._validation is None:
            return None
        variables = {"params": state.params["model"], "batch_stats": state.batch_stats}
        summary = evaluate(variables, self._validation).summary()
        if self._saved:
            files.append_json_line(self._history, {"step": step, **summary})
        scalars = {f"val/{name}": value for name, value in summary.items() if isinstance(value, float)}
        self._log.scalars(self._stage.name, step, scalars)
        if "miou" not in summary:
            return None
        self._log.say(f"{self._stage.name} step {step}: mIoU {100 * summary['miou']:.2f} on {self._validation.name}")
        return {"miou": summary["miou"]}

    def results(self) -> dict[str, Any]:
        """The last evaluation, the mean of the last few, the best (which needs target labels), and what needs none."""
        rows = files.read_json_lines(self._history)
        if self._validation is not None and (not rows or rows[-1].get("step") != self._stage.config.steps):
            name = self._stage.name
            raise UserError(f"{self._history} has lost the last evaluation: add --from_stage {name}, which repeats it")
        if not rows or "miou" not in rows[-1]:
            return {"step": self._stage.config.steps, "last": rows[-1] if rows else None}
        tail = [row["miou"] for row in rows[-self._stage.config.mean_of_last :]]
        best = max(rows, key=lambda row: (row["miou"], row["step"]))  # of several the last, as checkpoints.best
        return {
            "step": self._stage.config.steps,
            "last": rows[-1],
            "mean_of_last": {"count": len(tail), "miou": float(np.mean(tail))},
            "best_on_val_using_target_labels": {"step": best["step"], "miou": best["miou"]},
            "chosen_without_labels": {
                figure: {"step": row["step"], "miou": row["miou"], figure: row[figure]}
                for figure, sign in LABEL_FREE.items()
                if all(figure in row for row in rows)
                for row in [max(rows, key=lambda row: sign * row[figure])]
            },
        }
