"""A stage of a recipe: its resolved config, its folder, and its status, which its fingerprint decides."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from jaxuda import files, methods, plugins
from jaxuda.data.records import Domains
from jaxuda.errors import UserError
from jaxuda.models import load_family
from jaxuda.pipeline.labelled import move_fields
from jaxuda.training import checkpoints, weights

SHARED = (
    "seed",
    "label_space",
    "source",
    "target",
    "evaluation",
    "preprocess",
    "model",
    "optim",
    "eval_every",
    "mean_of_last",
)
SCRATCH, IMAGENET = "scratch", "imagenet"
CONTROL = "control"  # the stage, and its method
ARTIFACTS = "artifacts"


class Stage(NamedTuple):
    """One stage of a run.

    name: its name in `config.pipeline`, also the name of its folder.
    folder: workdir/name.
    config: the run's shared sections overlaid with the stage's own; frozen.
    init: where the weights come from: None, or (checkpoints folder, "last" | "best").
    reads: the earlier stages whose artifacts it uses, name -> folder.
    weights: the converted weights that its method may ask for, name -> checkpoints folder.
    identity: everything that decides the stage's result, as plain JSON values.
    classes: see `jaxuda.training.classes.describe`; only recorded (None: not known).
    """

    name: str
    folder: Path
    config: FrozenConfigDict
    init: tuple[Path, str] | None
    reads: dict[str, Path]
    weights: dict[str, Path]
    identity: dict[str, Any]
    classes: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """Hexadecimal checksum of `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def record(self) -> Path:
        """The file that holds the stage's identity and status."""
        return self.folder / "stage.json"

    def status(self) -> str:
        """ "missing", "started" or "done".

        Raises:
          UserError: the folder holds a stage with other settings.
        """
        saved = read_record(self.record)
        if saved is None:
            return "missing"
        if "name" not in saved["identity"].get("model", {}):
            raise UserError(
                f"the stage '{self.name}' in {self.folder} was run by an older jaxuda: this one can score and use it, "
                f"but cannot continue it. Choose another --workdir, or add --from_stage {self.name}"
            )
        if saved["fingerprint"] != self.fingerprint:
            changes = "\n".join(f"  {line}" for line in changed_fields(saved["identity"], self.identity))
            if not changes:
                raise _damaged(self.record)
            raise UserError(
                f"the stage '{self.name}' in {self.folder} was run with other settings:\n{changes}\n"
                f"Go back to those settings, choose another --workdir, or add --from_stage {self.name}, which sets "
                "the old stages aside and runs from there"
            )
        return "done" if saved["status"] == "done" else "started"

    def damage(self) -> str | None:
        """What is corrupt in a finished stage, its artifacts or its last checkpoint; None if nothing is.

        A missing folder was removed on purpose and is not reported here; a stage that needs it will report it.
        """
        folder = self.folder / ARTIFACTS
        if folder.is_dir() and files.checksums(folder) != read_record(self.record).get("artifacts", {}):
            return f"the artifacts in {folder} have changed"
        return checkpoints.damage(self.folder / "checkpoints")

    def mark(self, status: str) -> None:
        """Writes the stage's record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_record(self.folder, status)

    def _write_record(self, folder: Path, status: str) -> None:
        record = {
            "name": self.name,
            "status": status,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "classes": self.classes,
        }
        if status == "done":
            record["artifacts"] = files.checksums(folder / ARTIFACTS)
        files.write_json(folder / "stage.json", record)

    def artifacts(self) -> dict[str, Path]:
        """The folders of artifacts that this stage reads, by stage, each verified.

        Raises:
          UserError: a file is missing, or has changed since its stage wrote it.
        """
        for name, folder in self.reads.items():
            record = read_record(folder / "stage.json")
            if record is None or files.checksums(folder / ARTIFACTS) != record.get("artifacts"):
                raise UserError(
                    f"the artifacts in {folder / ARTIFACTS} are not what the stage '{name}' wrote: add --from_stage "
                    f"{name}, which writes them again"
                )
        return {name: folder / ARTIFACTS for name, folder in self.reads.items()}

    def results(self) -> dict[str, Any]:
        """What a finished training stage reports; empty for a sweep."""
        return files.read_json(self.folder / "results.json") or {}

    def adopt(self) -> Path | None:
        """Reuses the same stage of a work folder beside this one, if one has finished it.

        Many recipes share their source-only and oracle runs. Files are linked, not copied, where the system
        can; deleting either folder does not change the other. Corrupt stages are skipped.

        Returns:
          The folder it was taken from, or None.
        """
        if self.folder.exists() and any(self.folder.iterdir()):
            return None  # only its record is missing: continue with what is there
        for record in sorted(self.folder.parent.parent.glob("*/*/stage.json")):
            theirs = self._replace(folder=record.parent)
            try:
                saved = read_record(record)
                if saved["status"] != "done" or saved["fingerprint"] != self.fingerprint or theirs.damage():
                    continue
            except UserError:
                continue  # a corrupt neighbour is not this run's business
            aside = self.folder.with_name(f".{self.name}.adopting")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(record.parent, aside, copy_function=_link)
            # The record is not linked: it may carry another name.
            (aside / "stage.json").unlink()
            self._write_record(aside, "done")
            os.replace(aside, self.folder)
            return record.parent
        return None


def read_record(path: Path) -> dict[str, Any] | None:
    """A stage's record; None if there is none, and UserError if it is corrupt."""
    record = files.read_json(path)
    if record is None or (isinstance(record, dict) and {"status", "fingerprint", "identity"} <= record.keys()):
        return record
    raise _damaged(path)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is corrupt: delete it, then run the same command again")


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def with_control(config: ConfigDict) -> ConfigDict:
    """The config with a stage "control" before the first one that adapts, if `config.control` asks for it.

    It trains as that stage does, except for the method (see `jaxuda.methods.control`).

    Raises:
      UserError: no stage adapts.
    """
    if config.get("control") is not True:
        return config
    config = config.copy_and_resolve_references()
    trained = [name for name in config.pipeline if name in config and "train" in config[name]]
    adapting = next((name for name in trained if len(config[name].domains) == 2), None)
    if adapting is None:
        raise UserError(f"config.control=True: no stage of {config.name} adapts ({', '.join(trained)})")
    place = config.pipeline.index(adapting)
    with config.unlocked(), config.ignore_type():
        config.control = config[adapting].copy_and_resolve_references()
        config.control.update({"train": CONTROL, "reads": ()})
        if "network" in config.control.get("evaluation", ()):
            del config.control.evaluation.network  # it has no teacher
        config.pipeline = (*config.pipeline[:place], CONTROL, *config.pipeline[place:])
    return config


def import_named(config: ConfigDict) -> None:
    """Imports the user's modules that a config names, so that work folders may name them too (see `plugins.load`)."""
    load_family(config.model)
    for name in config.pipeline:
        if "." in config.get(name, {}).get("train", ""):
            methods.load(config[name].train)


def plan(config: ConfigDict, workdir: Path, domains: Domains) -> list[Stage]:
    """The stages of `config.pipeline` in order, without the oracle if the target has no labels.

    Raises:
      UserError: a stage is not defined, or starts from one that does not come before it.
    """
    import_named(config)
    stages: dict[str, Stage] = {}
    for name in config.pipeline:
        if name not in config:
            raise UserError(f"config.pipeline names the stage '{name}', but there is no config.{name}")
        for domain in config[name].domains:
            if getattr(domains, domain) is None:
                raise UserError(
                    f"the stage '{name}' reads the {domain} (config.{name}.domains), but config.{domain}.name is "
                    "empty: name a dataset there, or leave the stage out of config.pipeline"
                )
        if config[name].domains[0] == "target" and not config[name].labels and not domains.target.labelled:
            continue
        stages[name] = _make_stage(name, config, workdir, domains, stages)
    return list(stages.values())


def _make_stage(name: str, config: ConfigDict, workdir: Path, domains: Domains, earlier: Mapping[str, Stage]) -> Stage:
    own, resolved = config[name], resolve(name, config)
    both = {"source": domains.source, "target": domains.target}
    datasets = {place: records.fingerprint for place, records in both.items() if records is not None}
    if own.domains[0] == "target":
        few = resolved.source.get("few")
        resolved.source, datasets["source"] = resolved.target.copy_and_resolve_references(), datasets["target"]
        if few:
            with resolved.source.unlocked():
                resolved.source.few = few
    if len(own.domains) == 1:
        # Data that the stage does not read must not change its fingerprint: recipes share their baselines.
        del resolved["target"]
        datasets.pop("target", None)
    datasets["evaluation"] = [records.fingerprint for records in domains.validation]

    def before(field: str, stage: str) -> Stage:
        if stage not in earlier:
            known = ", ".join(earlier) or "none"
            hint = "; name a checkpoint elsewhere by its path, with a slash" if field == "init" else ""
            raise UserError(
                f"config.{name}.{field} names '{stage}', which is not an earlier stage (those are: {known}{hint})"
            )
        return earlier[stage]

    init, start = None, own.init
    if own.init == IMAGENET or _is_path(own.init):
        init, start = _from_outside(name, resolved, config.data_dir)
        if "sweep" in own:
            resolved.train, resolved.evaluation.network = _trained_with(init[0].parent)
    elif own.init != SCRATCH:
        stage, _, which = own.init.partition(":")
        init = (before("init", stage).folder / "checkpoints", which or "last")
        start = [before("init", stage).fingerprint, which or "last"]
        if "sweep" in own:
            origin = before("init", stage).config  # it takes the predictions of this method and network
            resolved.train, resolved.evaluation.network = origin.train, origin.evaluation.network
    named = [*own.reads, own.labels, own.split, own.get("pairing", "")]
    reads = {stage: before("reads", stage) for stage in dict.fromkeys(filter(None, named))}

    identity = json.loads(resolved.to_json()) | {"init": start, "data": datasets}
    if own_code := {field: checksum for field, module in _modules(resolved) if (checksum := plugins.code(module))}:
        identity["code"] = own_code  # a changed method is another method, also under the same name
    identity["reads"] = {stage: origin.fingerprint for stage, origin in reads.items()}
    for place in ("source", "target"):
        # The content of the data matters, not their place; `data` has the checksum of the content.
        identity.get(place, {}).pop("path", None)
        identity.get(place, {}).get("few", {}).pop("path", None)
    converted = {asked: imagenet_start(network, config.data_dir) for asked, network in _networks(resolved).items()}
    identity["weights"] = {asked: start for asked, (_, start) in converted.items()}
    converted = {asked: folder for asked, ((folder, _), _) in converted.items()}
    folders = {stage: origin.folder for stage, origin in reads.items()}
    return Stage(name, workdir / name, FrozenConfigDict(resolved), init, folders, converted, identity)


def _modules(resolved: ConfigDict) -> Iterator[tuple[str, str]]:
    """(field, name) of the modules that decide the result of a stage."""
    yield from (("model", resolved.model.get("name", "")), ("optim", resolved.optim.get("name", "")))
    yield from ((field, resolved[field]) for field in ("train", "sweep", "order") if field in resolved)


def resolve(name: str, config: ConfigDict) -> ConfigDict:
    """The shared sections of a config overlaid with those of one stage."""
    own = config[name]
    resolved = ConfigDict({field: config[field] for field in SHARED}, convert_dict=True)
    resolved = resolved.copy_and_resolve_references().unlock()  # the copied sections are as locked as the config
    if config.get("class_weights"):
        resolved.class_weights = tuple(config.class_weights)  # set only when used, as below
    resolved.update(own.to_dict())
    move_fields(resolved, own.domains[0] == "source" or bool(own.labels))
    if "train" in own:
        resolved.schedule_steps = own.schedule_steps or own.steps
        # Set only when used: every field enters the stage's fingerprint.
        if config.get("accumulate", 1) > 1:
            resolved.accumulate = config.accumulate
        if config.get("remat"):
            resolved.model.remat = True
    return resolved


def _networks(resolved: ConfigDict) -> dict[str, str]:
    """The entries of a stage's `weights` and the networks that they name; "imagenet" is the stage's own network."""
    return {
        asked: weights.network_name(resolved) if asked == IMAGENET else asked for asked in resolved.get("weights", ())
    }


def missing_weights(config: ConfigDict) -> list[str]:
    """For each network whose ImageNet weights are needed but missing: what to do, with the command."""
    needed: dict[str, list[str]] = {}
    for name in config.pipeline:
        if name in config and config[name].init == IMAGENET:
            needed.setdefault(weights.network_name(resolve(name, config)), []).append(f"config.{name}.init")
        for network in _networks(resolve(name, config)).values() if name in config else ():
            needed.setdefault(network, []).append(f"config.{name}.weights")
    return [
        f"{text}\n(for {', '.join(fields)}; init=scratch starts from random weights instead)"
        for network, fields in needed.items()
        if (text := weights.missing(network, config.data_dir))
    ]


def _is_path(init: str) -> bool:
    return os.sep in init or init.startswith(("~", "."))


def _from_outside(name: str, resolved: ConfigDict, data_dir: str) -> tuple[tuple[Path, str], Any]:
    """Checkpoint and identity of weights that come from outside of this run."""
    if resolved.init == IMAGENET:
        return imagenet_start(weights.network_name(resolved), data_dir)
    place, _, which = (
        resolved.init.rpartition(":") if resolved.init.endswith((":best", ":last")) else (resolved.init, "", "last")
    )
    folder = files.user_path(place).absolute()
    try:
        return (folder / "checkpoints", which), [weights.identity(folder, which), which]
    except UserError as error:
        raise UserError(f"config.{name}.init={resolved.init}: {error}") from error


def imagenet_start(network: str, data_dir: str) -> tuple[tuple[Path, str], Any]:
    """Checkpoint and identity of converted weights."""
    folder, which = weights.imagenet_folder(network, data_dir), "last"
    # A recipe can be planned without the weights; `missing_weights` stops it before it runs.
    start = IMAGENET if weights.missing(network, data_dir) else [weights.identity(folder, which), which]
    return (folder / "checkpoints", which), start


def _trained_with(folder: Path) -> tuple[str, str]:
    """The method that a checkpoint from outside of this run was trained with, and the network that was evaluated."""
    identity = checkpoints.stage_settings(folder)
    if identity is None:
        raise UserError(f"{folder} holds a backbone alone, which cannot label images")
    methods.load(identity["train"], imported=True)
    return identity["train"], identity["evaluation"].get("network", checkpoints.STUDENT)


def changed_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """ "field: old -> new" for every difference between two trees of plain values."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old == new:
            return []
        if prefix == "init":
            return ["init: the stage it starts from has changed"]
        return [f"{prefix}: {old} -> {new}"]
    lines = (
        changed_fields(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}.{key}".lstrip("."))
        for key in sorted(old.keys() | new.keys())
    )
    return list(itertools.chain.from_iterable(lines))


def set_aside(stages: list[Stage], first: str) -> Path | None:
    """Moves the folders of stage `first` and of all later ones to `workdir/aside-N`.

    Returns:
      Where they are now, or None if there was nothing to move.

    Raises:
      UserError: there is no such stage, or an earlier one was run with other settings.
    """
    names = [stage.name for stage in stages]
    if first not in names:
        raise UserError(f"--from_stage {first}: this recipe's stages are {', '.join(names)}")
    for stage in stages[: names.index(first)]:
        stage.status()  # raises if an earlier stage has other settings; then nothing is moved
    old = [stage.folder for stage in stages[names.index(first) :] if stage.folder.exists()]
    if not old:
        return None
    workdir = stages[0].folder.parent
    aside = next(workdir / f"aside-{n}" for n in itertools.count(1) if not (workdir / f"aside-{n}").exists())
    aside.mkdir()
    for folder in old:
        folder.rename(aside / folder.name)
    return aside
