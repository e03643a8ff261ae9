"""Runs a recipe: its stages one after the other, except those that have finished, and prints the final table."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxuda import files, methods, parallel, sweeps
from jaxuda.data.records import Domains
from jaxuda.errors import UserError
from jaxuda.models import abstract_variables, make_model
from jaxuda.pipeline import stages
from jaxuda.pipeline.domains import load_domains
from jaxuda.pipeline.results import collect, final_table, versions
from jaxuda.pipeline.stages import Stage
from jaxuda.pipeline.tracing import check_steps
from jaxuda.sweeps.evaluate import make_evaluator
from jaxuda.sweeps.predict import make_labeller
from jaxuda.training import checkpoints, weights
from jaxuda.training.allocation import keep_freed_memory
from jaxuda.training.classes import describe, in_order
from jaxuda.training.logs import RunLog
from jaxuda.training.loop import Options, Task, train


def run(config: ConfigDict, workdir: Path, from_stage: str = "") -> dict[str, Any]:
    """Runs or continues all stages of a config in a work folder.

    Args:
      config: as returned by a file in `configs/`.
      workdir: the work folder; made if missing.
      from_stage: sets this stage and all later ones aside first.

    Returns:
      What is written to results.json: the classes and, by stage, the scores.

    Raises:
      UserError: anything that the user can fix.
      Interrupted: the run was asked to stop; the same call continues it.
    """
    config = stages.with_control(config)
    with contextlib.ExitStack() as held:
        parallel.on_first(lambda: _take(workdir, held))
        log = RunLog(workdir)
        held.callback(log.close)
        domains = _open_all(config)
        recipe = _with_classes(stages.plan(config, workdir, domains), domains)
        statuses = parallel.on_first(lambda: _begin(config, workdir, recipe, from_stage, log))
        log.say(header(config, workdir, domains, statuses))
        waiting = [stage for stage in recipe if statuses[stage.name] != "done"]
        check_steps(waiting, domains.label_space.num_classes, "depth" in (domains.source or domains.target)[0])
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        for stage in recipe:
            _run_stage(stage, config, domains, log, statuses[stage.name])
        return parallel.on_first(lambda: _finish(config, workdir, recipe, domains, log))


def _take(workdir: Path, held: contextlib.ExitStack) -> None:
    """Locks the work folder until `held` closes, and removes the temporary files that a killed run left there."""
    held.enter_context(files.lock(workdir))
    files.remove_temporaries(workdir)


def _with_classes(recipe: list[Stage], domains: Domains) -> list[Stage]:
    """The stages with the classes of their data, to be recorded."""
    found = []
    for stage in recipe:
        trained = domains.target if stage.config.domains[0] == "target" else domains.source
        table = getattr(trained, "table", None)  # joined datasets have several
        found.append(stage._replace(classes=describe(domains.label_space, table)))
    return found


def _begin(config: ConfigDict, workdir: Path, recipe: list[Stage], from_stage: str, log: RunLog) -> dict[str, str]:
    """Sets stages aside if asked to, checks the finished ones, writes the config; returns the status of each stage."""
    if from_stage and (aside := stages.set_aside(recipe, from_stage)):
        log.say(f"set aside: {aside}")
    statuses = {stage.name: stage.status() for stage in recipe}
    _check_finished([stage for stage in recipe if statuses[stage.name] == "done"])
    files.write_json(workdir / "config.json", {"config": config.to_dict(), **versions()})
    return statuses


def _finish(config: ConfigDict, workdir: Path, recipe: list[Stage], domains: Domains, log: RunLog) -> dict[str, Any]:
    results = collect(config, recipe, domains)
    files.write_json(workdir / "results.json", results)
    log.say(final_table(results))
    return results


def _check_finished(finished: list[Stage]) -> None:
    """Raises a UserError if the result of a finished stage is corrupt: later stages would use it."""
    for stage in finished:
        if complaint := stage.damage():
            raise UserError(
                f"the finished stage '{stage.name}' is corrupt: {complaint}. Add --from_stage {stage.name}, which sets "
                "this stage and all later ones aside and runs them again"
            )


def _run_stage(stage: Stage, config: ConfigDict, domains: Domains, log: RunLog, status: str) -> None:
    if status == "done":
        return
    origin = parallel.on_first(lambda: str(stage.adopt() or "") if status == "missing" else "")
    if origin:
        log.say(f"{stage.name}: already finished with the same settings in {origin}, reused from there")
        return
    parallel.on_first(lambda: stage.mark("started"))
    began = time.perf_counter()
    if "sweep" in stage.config:
        log.say(f"{stage.name}: begins")
        parallel.on_first(lambda: sweep(stage, config, domains, log))
    else:
        log.say(f"{stage.name}: begins; its first step waits for the compiler, up to a minute or two")
        task = Task(stage.name, stage.folder, stage.config, stage.init, stage.artifacts(), stage.weights)
        train(task, Options(*(config[field] for field in Options._fields)), domains, log, make_evaluator, make_labeller)
    parallel.on_first(lambda: stage.mark("done"))
    log.say(f"{stage.name}: finished in {(time.perf_counter() - began) / 60:.1f} min")


def sweep(stage: Stage, run_config: ConfigDict, domains: Domains, log: RunLog) -> None:
    """Runs a sweep stage; it writes to its `artifacts` folder.

    It uses the network of the stage that it starts from; a sweep over data alone gets neither variables nor a method.
    """
    module = sweeps.load(stage.config.sweep)
    model = make_model(stage.config.model, domains.label_space.num_classes)
    devices = parallel.evaluation_devices(stage.config, jax.local_devices()[: run_config.devices or None])
    variables = method = None
    if stage.init is not None:
        arrays, _ = checkpoints.read_variables(*stage.init, stage.config.evaluation.network)
        arrays = in_order(arrays, model, stage.init[0].parent, domains.label_space.classes, log.say)
        variables = checkpoints.unflatten(
            arrays, abstract_variables(model, stage.config.evaluation.size), str(stage.init[0]), log.say
        )
        method = methods.load(stage.config.train)
    folder = stage.folder / stages.ARTIFACTS
    folder.mkdir(parents=True, exist_ok=True)
    module.run(
        variables,
        domains,
        folder,
        model=model,
        method=method,
        config=stage.config,
        devices=devices,
        say=log.say,
    )


def _open_all(config: ConfigDict) -> Domains:
    """As `load_domains`, but one message reports missing ImageNet weights too."""
    missing = stages.missing_weights(config)
    try:
        domains = load_domains(config)
    except UserError as error:
        raise UserError("\n".join([str(error), *missing])) from error
    if missing:
        raise UserError("\n".join(missing))
    return domains


def header(config: ConfigDict, workdir: Path, domains: Domains, statuses: dict[str, str]) -> str:
    """What a run will do, printed before it starts."""
    batch = next(config[name].batch for name in config.pipeline if "train" in config[name])
    devices = parallel.choose_devices(batch, config.devices, config.platform)
    used = f"{len(devices)} of {jax.local_device_count()} {devices[0].platform} ({devices[0].device_kind})"
    if jax.process_count() > 1:
        used += f" in each of {jax.process_count()} processes"
    steps = {name: f" ({config[name].steps} steps)" if "train" in config[name] else "" for name in statuses}
    plan = (
        f"{name}{steps[name]}" if status == "missing" else f"{name} ({status})" for name, status in statuses.items()
    )
    source, target = (
        f"{records.name} ({len(records)} images)" if records is not None else "none"
        for records in (domains.source, domains.target)
    )
    validation = ", ".join(f"{records.name} ({len(records)})" for records in domains.validation) or "none"
    return "\n".join(
        [
            f"jaxuda {config.name}:{config.benchmark}, seed {config.seed}",
            f"  devices     {used}",
            f"  stages      {' -> '.join(plan)}",
            f"  source      {source}",
            f"  target      {target}, evaluated on {validation}",
            f"  results in  {workdir}, at the end with a page for the browser, report.html",
            *_pretrained_hint(config),
            "You can stop the run at any time: the same command continues it.",
        ]
    )


def _pretrained_hint(config: ConfigDict) -> list[str]:
    """For own images with a network from scratch: what a pretrained one brings, and how to get it."""
    if config.benchmark != "folder" or not any(config[name].get("init") == "scratch" for name in config.pipeline):
        return []
    network = "efficientnet-lite0"
    get = f"{weights.how_to_get(network)}, then {weights.convert_command(network, config.data_dir)}"
    return [f"  hint        {config.name}:folder,lite starts from ImageNet weights, which helps much: {get}"]
