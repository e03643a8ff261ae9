"""The one training loop: batches -> step -> metrics -> evaluation -> checkpoint."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxuda import data, files, methods, parallel
from jaxuda.data.few import FewLabels, source_order
from jaxuda.data.records import EASY, HARD, Domains, Subset, read_split
from jaxuda.errors import Interrupted, UserError
from jaxuda.models import make_model
from jaxuda.optimizers import make_optimizer
from jaxuda.training import checkpoints, pictures
from jaxuda.training.logs import RunLog, is_interactive, progress_bar
from jaxuda.training.start import evaluated, start
from jaxuda.training.state import TrainState
from jaxuda.training.step import make_step

PyTree = Any
# Figures that choose a checkpoint without labels, and whether the highest (1) or the lowest (-1) is chosen.
LABEL_FREE = {"entropy": -1, "diversity": 1, "snd": 1}


class Task(NamedTuple):
    """A stage as training needs it.

    name: the stage's name, for messages and curves.
    folder: the folder of its checkpoints, evaluations and results.
    config: its resolved settings.
    init: the checkpoint that its weights come from, (checkpoints folder, "last" | "best"); None: random ones.
    artifacts: the artifacts of earlier stages, stage -> folder.
    weights: converted weights that its method may ask for, name -> checkpoints folder; None: zeros in their place.
    """

    name: str
    folder: Path
    config: Any
    init: tuple[Path, str] | None
    artifacts: Mapping[str, Path]
    weights: Mapping[str, Path] | None


class Options(NamedTuple):
    """Settings that do not change a stage's result; fields of the config of the same names."""

    devices: int
    platform: str
    num_workers: int
    log_every: int
    checkpoint_every: int
    keep_every: int


def train(
    task: Task,
    options: Options,
    domains: Domains,
    log: RunLog,
    make_evaluator: Callable[..., Callable],
    make_labeller: Callable[..., Callable],
) -> None:
    """Runs or continues a training stage, and writes its `results.json`.

    Args:
      task: what to train.
      options: how to run it.
      domains: the datasets.
      log: reports the progress.
      make_evaluator: `make_evaluator(model, method, config, devices)` returns `evaluate(variables, records)`.
      make_labeller: `make_labeller(model, method, config, devices)` returns `label(variables, records)`, which gives
        the predicted train ids of each record, (H, W) uint8.

    Raises:
      UserError: a loss is not finite, or a checkpoint cannot be written.
      Interrupted: on SIGTERM or SIGINT, after saving.
    """
    config = task.config
    # The devices share each part of the batch.
    part = config.batch // config.get("accumulate", 1)
    devices = parallel.choose_devices(part, options.devices, options.platform)
    labelled, unlabelled = training_records(config, domains, task.artifacts)
    model = make_model(config.model, labelled.label_space.num_classes)
    method, tx = methods.load(config.train), make_optimizer(config, model)
    saved = None
    if parallel.is_first():
        saved = checkpoints.Checkpoints(task.folder / "checkpoints", log.say, keep_every=options.keep_every)
    try:
        done = parallel.on_first(lambda: saved.newest() or 0)
        with _input(task, options, labelled, unlabelled, done) as batches:
            loop = _Loop(task, options, domains, log, devices, saved, method)
            if done < config.steps:
                first = next(batches)
                # The other processes get the state of the first one; Orbax lets only the first read checkpoints.
                state, constants = start(
                    task if saved else task._replace(init=None, weights=None),
                    method,
                    model,
                    tx,
                    arrays(first),
                    bool(done) or saved is None,
                    log.say,
                    labelled.label_space.classes,
                )
                if done:
                    state = saved.restore(done, state) if saved else state
                    log.say(f"{task.name}: continues from step {done}")
                state, constants = parallel.from_first((state, constants))
                loop.rewind(done)
                evaluate = make_evaluator(model, method, config, parallel.evaluation_devices(config, devices))
                steps = {
                    phase: parallel.compile_step(make_step(method, model, tx, config, phase), devices)
                    for phase in phases(method, config)
                }
                show = pictures.make_show(task, model, method, domains, log, devices, make_labeller)
                loop.run(steps, evaluate, state, constants, done, itertools.chain([first], batches), show)
        parallel.on_first(lambda: files.write_json(task.folder / "results.json", loop.results()))
    finally:
        if saved:
            saved.close()


def phases(method: ModuleType, config: Any) -> list[int]:
    """The steps at which a method's tuple of passes begins or changes, in rising order, starting with 0."""
    return sorted({0, *(method.starts(config) if hasattr(method, "starts") else ())})


def training_records(config: Any, domains: Domains, artifacts: Mapping[str, Path]) -> tuple[Any, Any]:
    """The records that a stage learns from: labelled, and unlabelled (None if it uses none).

    They are those of `config.domains`. With `config.split` the labelled ones are the easy part of a ranking and the
    unlabelled ones the hard part; with `config.labels` pseudo-labels replace the labels. The few labelled images of the
    target, if there are any, are among the source's and among those with pseudo-labels.
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
        labelled = data.PseudoLabelled(labelled, artifacts[config.labels], domains.label_space)
        if isinstance(domains.source, FewLabels):
            labelled = FewLabels(labelled, domains.source.few)
    return labelled, unlabelled


def _input(task: Task, options: Options, labelled: Any, unlabelled: Any, done: int) -> data.input.BatchIterator:
    config = task.config
    count = config.steps * config.batch
    return data.make_input(
        labelled,
        unlabelled,
        batch=config.batch,
        steps=config.steps,
        start=done,
        seed=config.seed,
        source_transform=data.domain_transform(config.source),
        target_transform=None if unlabelled is None else data.domain_transform(config.target),
        target_labels=config.get("target_label_figures", False),
        num_workers=options.num_workers,
        source_order=source_order(labelled, unlabelled, count, config, task.artifacts),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def arrays(batch: PyTree) -> PyTree:
    """A batch without the ids, which stay on the host."""
    return {domain: {k: v for k, v in each.items() if k != "id"} for domain, each in batch.items()}


class _StopSignals:
    """Inside this context SIGTERM and SIGINT only set `asked`; the loop then stops between two steps.

    Several processes must stop after the same step: they exchange their signals at every tenth step.
    """

    def __enter__(self) -> _StopSignals:
        self.asked = ""
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def after(self, step: int) -> str:
        """The signal that stops the loop after this step, or ""; call it after each step."""
        if jax.process_count() > 1 and step % 10:
            return ""
        return next(filter(None, parallel.exchange(self.asked)), "")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Loop:
    """The loop of one stage, and its state between steps."""

    def __init__(
        self,
        task: Task,
        options: Options,
        domains: Domains,
        log: RunLog,
        devices: list[jax.Device],
        saved: checkpoints.Checkpoints | None,
        method: ModuleType,
    ):
        self._task, self._options, self._validation = task, options, domains.validation
        self._log, self._devices, self._saved, self._method = log, devices, saved, method
        self._history = task.folder / "evaluations.jsonl"
        self._pending: list[tuple[int, dict, dict]] = []  # steps whose metrics are still on the device
        self._since, self._waited, self._told = time.perf_counter(), 0.0, 0.0

    def rewind(self, step: int) -> None:
        """Removes evaluations, pictures and metrics of steps that will run again."""
        if self._saved:
            rows = [row for row in files.read_json_lines(self._history) if row["step"] <= step]
            files.write_json_lines(self._history, rows)
            pictures.rewind(self._task.folder, step)
        self._log.rewind(self._task.name, step)

    def run(
        self,
        steps: Mapping[int, Callable],
        evaluate: Callable,
        state: TrainState,
        constants: PyTree,
        start: int,
        batches: Iterator,
        show: Callable | None,
    ) -> None:
        """Runs steps `start` + 1 .. config.steps from a state on the host.

        `steps`: phase -> compiled step; `show`: see `pictures.make_show`.
        """
        name, config = self._task.name, self._task.config
        last = config.steps
        state, constants = (parallel.replicate(tree, self._devices) for tree in (state, constants))
        placed = data.prefetch_to_device(batches, partial(parallel.shard, devices=self._devices))
        self._since, self._waited, self._told = time.perf_counter(), 0.0, 0.0
        with _StopSignals() as stop, progress_bar(last, name, "step", initial=start) as bar:
            for done in range(start + 1, last + 1):
                waiting = time.perf_counter()
                batch = next(placed)
                self._waited += time.perf_counter() - waiting
                ids = {domain: part["id"] for domain, part in batch.items()}
                step = steps[max(phase for phase in steps if phase < done)]
                state, metrics = step(state, constants, config.seed, arrays(batch))
                self._pending.append((done, metrics, ids))
                bar.update()

                stopping = stop.after(done)  # read once: a signal may come at any moment
                evaluates = done == last or done % config.eval_every == 0
                saves = bool(stopping) or evaluates or done % self._options.checkpoint_every == 0
                if saves or done % self._options.log_every == 0:
                    # Before saving: a state after a non-finite loss must not become a checkpoint.
                    bar.set_postfix_str(self._write_metrics())
                if saves:
                    host = parallel.first(state, self._devices)
                    self._check_state(done, host, ids)
                    self._save(done, host, evaluate if evaluates else None)
                    if show and evaluates:
                        arguments = (state, constants, config.seed, arrays(batch))
                        show(arguments, evaluated(self._method, host, config), done)
                    self._since = time.perf_counter() - self._told
                if stopping and done < last:
                    raise Interrupted(
                        f"{stopping}: saved step {done} of {last} of the stage '{name}'; "
                        "the same command continues from there"
                    )

    def _save(self, step: int, state: TrainState, evaluate: Callable | None) -> None:
        networks = evaluated(self._method, state, self._task.config)
        scores = self._evaluation(evaluate, networks, step) if evaluate else None
        parallel.on_first(lambda: self._saved.save(step, state, scores, networks))

    def _write_metrics(self) -> str:
        """Fetches the metrics since the last call, checks them, and logs their mean."""
        if not self._pending:
            return ""
        rows = parallel.first([metrics for _, metrics, _ in self._pending], self._devices)
        for (step, _, ids), row in zip(self._pending, rows, strict=True):
            for metric, value in row.items():
                if not np.isfinite(value):
                    raise self._not_finite(f"{metric} is {value} at", step, ids, updates=step - 1)
        began = time.perf_counter()
        seconds = began - self._since
        step, config = self._pending[-1][0], self._task.config
        values = {metric: float(np.mean([row[metric] for row in rows])) for metric in rows[0]}
        # Figures per class are only for the curves.
        text = "  ".join(f"{metric} {value:.4g}" for metric, value in values.items() if "/" not in metric)
        values["images_per_s"] = round(len(rows) * config.batch * len(self._pending[-1][2]) / seconds, 2)
        # Shares of the time since the last call in which the devices may have waited: for data, and for logging.
        values["input_wait"] = round(self._waited / seconds, 4)
        values["log_wait"] = round(self._told / seconds, 4)
        self._log.scalars(self._task.name, step, values)
        if not is_interactive():
            left = seconds / len(rows) * (config.steps - step)
            self._log.say(
                f"{self._task.name} {step}/{config.steps}  {text}  "
                f"{values['images_per_s']:.1f} images/s  wait {100 * (self._waited + self._told) / seconds:.1f}%  "
                f"ETA {left / 60:.1f} min"
            )
        self._pending.clear()
        self._since, self._waited, self._told = began, 0.0, time.perf_counter() - began
        return text

    def _check_state(self, step: int, state: TrainState, ids: dict[str, list[str]]) -> None:
        """Raises if the state is not finite: a finite loss can have an infinite gradient. Such a state is not saved."""
        checked = {"params": state.params, "batch_stats": state.batch_stats}
        for path, leaf in jax.tree_util.tree_leaves_with_path(checked):
            if not np.isfinite(leaf).all():
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise self._not_finite(f"{name} is not finite after", step, ids, updates=step)

    def _not_finite(self, what: str, step: int, ids: dict[str, list[str]], updates: int) -> UserError:
        """`updates`: how many the stage has made when it happened."""
        good, name = parallel.on_first(lambda: self._saved.newest()), self._task.name
        kept = f"Step {good} is kept as the last good checkpoint" if good else "There is no checkpoint yet"
        remedy = f"A lower learning rate (--config.{name}.lr, now {self._task.config.lr}) is the usual remedy"
        if not updates:
            origin = f"those of {self._task.init[0]}" if self._task.init else "random"
            remedy = (
                "No update came before: the learning rate is not the reason. Look at these images and their labels, at "
                f"the weights of the loss, and at the weights that the stage starts from ({origin})"
            )
        return UserError(f"{what} step {step} of the stage '{name}', on the images {ids}. {kept}. {remedy}")

    def _evaluation(self, evaluate: Callable, networks: Mapping[str, PyTree], step: int) -> dict[str, float] | None:
        """Evaluates the chosen network on the validation sets, and logs and stores the scores.

        The first set gives the score of the checkpoint; the datasets that it joins are scored by themselves too. Other
        networks of the state (a teacher) are scored on it as well.
        """
        if not self._validation:
            return None
        chosen, (first, *others) = self._task.config.evaluation.network, self._validation
        evaluation = evaluate(networks[chosen], first)
        summary = evaluation.summary()
        beside = evaluation.parts | {other.name: evaluate(networks[chosen], other) for other in others}
        beside = {name: scores.summary() for name, scores in beside.items()}
        rest = {name: evaluate(networks[name], first).summary() for name in networks if name != chosen}
        row = {"step": step, **summary} | ({"beside": beside} if beside else {})
        row |= {"network": chosen, "other_networks": rest} if rest else {}
        if self._saved:
            files.append_json_line(self._history, row)
        also = {f"val/{name}": scores for name, scores in (beside | rest).items()}
        for place, scores in {"val": summary, **also}.items():
            scalars = {f"{place}/{name}": value for name, value in scores.items() if isinstance(value, float)}
            self._log.scalars(self._task.name, step, scalars)
        if "miou" not in summary:
            return None
        found = f"{100 * summary['miou']:.2f}"
        if rest:
            others = (f"{name} {100 * scores['miou']:.2f}" for name, scores in rest.items())
            found = ", ".join([f"{chosen} {found}", *others])
        more = "".join(f", {name} {100 * scores['miou']:.2f}" for name, scores in beside.items() if "miou" in scores)
        self._log.say(f"{self._task.name} step {step}: mIoU {found} on {first.name}{more}")
        return {"miou": summary["miou"]}

    def results(self) -> dict[str, Any]:
        """The last evaluation, the mean of the last few, the best (by target labels), those chosen without labels."""
        rows = files.read_json_lines(self._history)
        if self._validation and (not rows or rows[-1].get("step") != self._task.config.steps):
            name = self._task.name
            raise UserError(f"{self._history} lacks the last evaluation: add --from_stage {name}, which repeats it")
        if not rows or "miou" not in rows[-1]:
            return {"step": self._task.config.steps, "last": rows[-1] if rows else None}
        tail = [row["miou"] for row in rows[-self._task.config.mean_of_last :]]
        best = max(rows, key=lambda row: (row["miou"], row["step"]))  # of equals the last, as checkpoints.best
        return {
            "step": self._task.config.steps,
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
