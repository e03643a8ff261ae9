"""Runs a recipe: its stages one after the other, each only if it has not run, and the final table."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxuda import checkpoints, data, files, methods, parallel, stages, sweeps
from jaxuda.allocation import keep_freed_memory
from jaxuda.data.records import prepare_command, prepared_folder, read_summary, root
from jaxuda.errors import UserError
from jaxuda.metrics import iou_table
from jaxuda.prepare import prepare
from jaxuda.stages import Domains, Stage
from jaxuda.train import abstract_variables, evaluation_devices, make_model, train
from jaxuda.writers import RunLog

# What the scores in results.json are of.
CHECKPOINT_RULES = {
    "last": "the last checkpoint, as the recipe's steps have it; what tables show",
    "best_on_val_using_target_labels": "chosen with labels that an unlabelled target does not have",
    "chosen_without_labels": "chosen by a figure that needs no labels: lowest entropy, highest diversity or snd",
}


def run(config: ConfigDict, workdir: Path, from_stage: str = "") -> dict[str, Any]:
    """Runs or continues all stages of a config in a work folder.

    Args:
      config: as a file in `configs/` makes it.
      workdir: the work folder; made if missing.
      from_stage: sets this stage and all later ones aside first.

    Returns:
      What is written to results.json: the classes and, by stage, the scores.

    Raises:
      UserError: whatever the user can mend.
      Interrupted: asked to stop; the same call continues.
    """
    with contextlib.ExitStack() as held:
        parallel.on_first(lambda: _take(workdir, held))
        log = RunLog(workdir)
        held.callback(log.close)
        domains = _open_all(config)
        recipe = stages.plan(config, workdir, domains)
        statuses = parallel.on_first(lambda: _begin(config, workdir, recipe, from_stage, log))
        log.say(header(config, workdir, domains, statuses))
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        for stage in recipe:
            _run_stage(stage, config, domains, log, statuses[stage.name])
        news = any(status != "done" for status in statuses.values())
        return parallel.on_first(lambda: _finish(config, workdir, recipe, domains, log, news))


def _take(workdir: Path, held: contextlib.ExitStack) -> None:
    """Locks the work folder for as long as `held` is, and clears up what a killed run left there."""
    held.enter_context(files.lock(workdir))
    files.remove_temporaries(workdir)


def _begin(config: ConfigDict, workdir: Path, recipe: list[Stage], from_stage: str, log: RunLog) -> dict[str, str]:
    """Sets stages aside if asked to, checks the finished ones, writes the config; how far each stage is."""
    if from_stage and (aside := stages.set_aside(recipe, from_stage)):
        log.say(f"set aside: {aside}")
    statuses = {stage.name: stage.status() for stage in recipe}
    _check_finished([stage for stage in recipe if statuses[stage.name] == "done"])
    _write_config(config, workdir)
    return statuses


def _finish(
    config: ConfigDict, workdir: Path, recipe: list[Stage], domains: Domains, log: RunLog, news: bool
) -> dict[str, Any]:
    results = _results(config, recipe, domains)
    files.write_json(workdir / "results.json", results)
    log.say(final_table(results))
    if news or not (workdir / "report.html").exists():
        _write_report(workdir, log)
    return results


def _check_finished(finished: list[Stage]) -> None:
    """Raises a UserError if what a finished stage has left is damaged: all that follows would be built on it."""
    for stage in finished:
        if complaint := stage.damage():
            raise UserError(
                f"the finished stage '{stage.name}' is damaged: {complaint}. Add --from_stage {stage.name}, which sets "
                "it and what follows it aside and makes them again"
            )


def _run_stage(stage: Stage, config: ConfigDict, domains: Domains, log: RunLog, status: str) -> None:
    if status == "done":
        return
    origin = parallel.on_first(lambda: str(stage.adopt() or "") if status == "missing" else "")
    if origin:
        log.say(f"{stage.name}: already finished with the same settings in {origin}, taken over from there")
        return
    parallel.on_first(lambda: stage.mark("started"))
    began = time.perf_counter()
    if "sweep" in stage.config:
        log.say(f"{stage.name}: begins")
        parallel.on_first(lambda: sweep(stage, config, domains, log))
    else:
        log.say(f"{stage.name}: begins; its first step waits for the compiler, up to a minute or two")
        train(stage, config, domains, log)
    parallel.on_first(lambda: stage.mark("done"))
    log.say(f"{stage.name}: finished in {(time.perf_counter() - began) / 60:.1f} min")


def sweep(stage: Stage, run_config: ConfigDict, domains: Domains, log: RunLog) -> None:
    """Runs a sweep stage; it writes to its `artifacts` folder.

    Its network is that of the stage it starts from; a sweep over the data alone has neither variables nor method.
    """
    module = sweeps.load(stage.config.sweep)
    model = make_model(stage.config, domains.source.label_space.num_classes)
    devices = evaluation_devices(stage.config, jax.local_devices()[: run_config.devices or None])
    variables = method = None
    if stage.init is not None:
        arrays, _ = checkpoints.read_variables(*stage.init)
        variables = checkpoints.unflatten(arrays, abstract_variables(model, stage.config), str(stage.init[0]))
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
    """`load_domains`; what else the recipe has not is told in the same message."""
    missing = stages.missing_weights(config)
    try:
        domains = load_domains(config)
    except UserError as error:
        raise UserError("\n".join([str(error), *missing])) from error
    if missing:
        raise UserError("\n".join(missing))
    return domains


def load_domains(config: ConfigDict) -> Domains:
    """Opens the datasets of a config; draws `streets` if it is not there yet.

    Raises:
      UserError: a dataset is not prepared (the command is named), or the classes of the domains differ.
    """
    for domain in (config.source, config.target):
        draw_if_missing(domain.name, config)
    _check_prepared(config)
    source = open_records(config, "source", config.source.split)
    if not source.labelled:
        raise UserError(f"the source {source.name} has no labels: adaptation needs a labelled source")
    _check_weights(config.get("class_weights", ()), source.label_space.classes)
    target = open_records(config, "target", config.target.split)
    try:
        target_val = open_records(config, "target", config.evaluation.split)
    except UserError:
        # Images without a validation split are adapted to all the same; there is nothing to score then.
        if config.target.name != "folder":
            raise
        target_val = None
    for records in filter(None, (target, target_val)):
        if records.label_space is not None and records.label_space.classes != source.label_space.classes:
            raise UserError(
                f"{source.name} and {records.name} have different classes: {', '.join(source.label_space.classes)} "
                f"against {', '.join(records.label_space.classes)}; give both the same classes.json"
            )
    return Domains(source, target, target_val)


def draw_if_missing(name: str, config: ConfigDict) -> None:
    """Prepares a domain of `streets`, which needs no files; does nothing for other datasets."""
    if name.startswith("streets/"):
        parallel.on_first(lambda: len(prepare(name, data_dir=config.data_dir or None)))


def _check_prepared(config: ConfigDict) -> None:
    """Raises a UserError with the commands that prepare the datasets of a config, if any are missing."""
    data_dir, missing = config.data_dir or None, {}
    for domain in ("source", "target"):
        place = _place(config, domain)
        if read_summary(prepared_folder(place.name, data_dir, place.path)) is None:
            missing[prepare_command(place.name, data_dir, place.path)] = place.name
    if missing:
        names, verb = " and ".join(missing.values()), "is" if len(missing) == 1 else "are"
        raise UserError(f"{names} {verb} not prepared in {root(data_dir)}; run\n  " + "\n  ".join(missing))


def _check_weights(weights: Sequence[float], classes: Sequence[str]) -> None:
    if weights and (len(weights) != len(classes) or not all(0 < weight < float("inf") for weight in weights)):
        raise UserError(
            f"config.class_weights={tuple(weights)}: give one positive number for each of the {len(classes)} classes, "
            f"in their order ({', '.join(classes)})"
        )


def _place(config: ConfigDict, domain: str) -> ConfigDict:
    place = config[domain]
    if place.name == "folder" and not place.path:
        raise UserError(f"say where the {domain} images lie: --config.{domain}.path=DIR")
    return place


def open_records(config: ConfigDict, domain: str, split: str) -> data.Records:
    """One split of the "source" or the "target" of a config."""
    place = _place(config, domain)
    return data.load(
        place.name,
        split,
        label_space=config.label_space or None,
        data_dir=config.data_dir or None,
        path=place.path,
    )


def header(config: ConfigDict, workdir: Path, domains: Domains, statuses: dict[str, str]) -> str:
    """What a run is going to do, told before it starts."""
    batch = next(config[name].batch for name in config.pipeline if "train" in config[name])
    devices = parallel.choose_devices(batch, config.devices, config.platform)
    used = f"{len(devices)} of {jax.local_device_count()} {devices[0].platform} ({devices[0].device_kind})"
    if jax.process_count() > 1:
        used += f" in each of {jax.process_count()} processes"
    steps = {name: f" ({config[name].steps} steps)" if "train" in config[name] else "" for name in statuses}
    plan = (
        f"{name}{steps[name]}" if status == "missing" else f"{name} ({status})" for name, status in statuses.items()
    )
    validation = f"{domains.target_val.name} ({len(domains.target_val)})" if domains.target_val else "none"
    return "\n".join(
        [
            f"jaxuda {config.name}:{config.benchmark}, seed {config.seed}",
            f"  devices     {used}",
            f"  stages      {' -> '.join(plan)}",
            f"  source      {domains.source.name} ({len(domains.source)} images)",
            f"  target      {domains.target.name} ({len(domains.target)} images), evaluated on {validation}",
            f"  results in  {workdir}, at the end with a page for the browser, report.html",
            "Stop it whenever you like: the same command goes on where it stopped.",
        ]
    )


def _write_config(config: ConfigDict, workdir: Path) -> None:
    files.write_json(workdir / "config.json", {"config": config.to_dict(), **_versions()})


def _versions() -> dict[str, Any]:
    packages = ("jaxuda", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"versions": {package: importlib.metadata.version(package) for package in packages}, "git": _git_revision()}


def _git_revision() -> str | None:
    """The commit of the code, with "+changes" if files differ from it; None outside a checkout."""
    where = ["git", "-C", str(Path(__file__).parent)]
    try:
        options = {"capture_output": True, "text": True, "check": True, "timeout": 10}
        revision = subprocess.run([*where, "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run([*where, "status", "--porcelain", "-uno"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+changes" if changed else "")


def _results(config: ConfigDict, recipe: list[Stage], domains: Domains) -> dict[str, Any]:
    """The scores, and all that they depend on."""
    settings = json.dumps(config.to_dict(), sort_keys=True, default=list)
    opened = {"source": domains.source, "target": domains.target, "evaluation": domains.target_val}
    return {
        "config": config.name,
        "benchmark": config.benchmark,
        "seed": config.seed,
        "validation": domains.target_val.name if domains.target_val else None,
        "classes": list(domains.source.label_space.classes),
        "evaluation_size": list(config.evaluation.size),
        "checkpoints": CHECKPOINT_RULES | {"mean_of_last": f"mean of the last {config.mean_of_last} evaluations"},
        "data": {place: records and _described(records) for place, records in opened.items()},
        "config_sha256": hashlib.sha256(settings.encode()).hexdigest(),
        **_versions(),
        "fingerprints": {stage.name: stage.fingerprint for stage in recipe},
        "stages": {stage.name: stage.results() for stage in recipe},
    }


def _described(records: data.Records) -> dict[str, Any]:
    described = {"name": records.name, "images": len(records), "labelled": records.labelled}
    return described | {"fingerprint": records.fingerprint}


def _write_report(workdir: Path, log: RunLog) -> None:
    """The page for people. Whatever goes wrong with it, the run is done and its results are written."""
    try:
        from jaxuda import report  # here: it predicts with finished stages, and so builds on this module

        log.say(f"report in {report.write([workdir])}")
    except Exception as error:
        again = f"python -m jaxuda.report --workdir {workdir}"
        log.say(f"the report could not be written ({type(error).__name__}: {error}); to try again: {again}")


def final_table(results: dict[str, Any]) -> str:
    """Per-class IoU of every training stage, and the scores that go with it."""
    scored = {name: result for name, result in results["stages"].items() if "best_on_val_using_target_labels" in result}
    if not scored:
        return "no labelled validation images: nothing to score (see metrics.jsonl for the label-free figures)"
    columns = {name.replace("_", " "): np.asarray(result["last"]["confusion"]) for name, result in scored.items()}
    lines = [f"IoU in % on {results['validation']}, last checkpoint of each stage", ""]
    lines += [iou_table(columns, results["classes"]), ""]
    for name, result in scored.items():
        mean, best = result["mean_of_last"], result["best_on_val_using_target_labels"]
        lines.append(
            f"{name.replace('_', ' ')}: mean of the last {mean['count']} evaluations {100 * mean['miou']:.1f}; "
            f"best on val (uses target labels) {100 * best['miou']:.1f} at step {best['step']}"
        )
        chosen = result.get("chosen_without_labels", {})
        found = (f"by {figure} {100 * row['miou']:.1f} at step {row['step']}" for figure, row in chosen.items())
        lines += [f"  chosen without target labels: {', '.join(found)}"] if chosen else []
    return "\n".join(lines)
