"""Plans and fingerprints of stages."""

from pathlib import Path

import pytest

from configs import minent, sdca, source_only
from jaxuda.cli import parse
from jaxuda.data.records import Domains
from jaxuda.errors import UserError
from jaxuda.pipeline.stages import changed_fields, plan


class FakeRecords:
    def __init__(self, fingerprint: str, labelled: bool = True):
        self.fingerprint, self.labelled = fingerprint, labelled


DOMAINS = Domains(FakeRecords("source"), FakeRecords("target"), (FakeRecords("val"),))


def fingerprints(config, domains: Domains = DOMAINS) -> dict[str, str]:
    return {stage.name: stage.fingerprint for stage in plan(config, Path("runs/x"), domains)}


def test_baselines_are_the_same_stage_in_every_recipe() -> None:
    ours, theirs = fingerprints(minent.get_config()), fingerprints(source_only.get_config())
    assert ours["source_only"] == theirs["source_only"] and ours["oracle"] == theirs["oracle"]
    assert len(set(ours.values())) == 3


def test_what_changes_a_result_changes_the_fingerprint_from_there_on() -> None:
    before = fingerprints(minent.get_config())

    def changed(field: str, value) -> set[str]:
        config = minent.get_config()
        config.update_from_flattened_dict({field: value})
        after = fingerprints(config)
        return {name for name in after if after[name] != before[name]}

    assert changed("adapt.lr", 1e-4) == {"adapt"}
    assert changed("source_only.steps", 5) == {"source_only", "adapt"}
    assert changed("model.width", 16) == changed("seed", 3) == {"source_only", "adapt", "oracle"}
    assert changed("target.flip", 0.1) == {"adapt", "oracle"}
    assert changed("class_weights", (1.0, 2.0)) == {"source_only", "adapt", "oracle"}
    assert changed("devices", 1) == changed("num_workers", 4) == changed("source.path", "elsewhere") == set()


def test_a_changed_module_of_the_user_is_another_setting(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "own_methods" / "edited.py"
    file.parent.mkdir(parents=True)
    config = minent.get_config()
    config.adapt.train = "own_methods.edited"
    text = "def passes(config, step):\n    return ()\n"
    file.write_text(text)
    before = fingerprints(config)
    assert before == fingerprints(config)
    file.write_text(text + "# another loss\n")
    after = fingerprints(config)
    assert {name for name in after if after[name] != before[name]} == {"adapt"}


def test_fields_that_are_not_set_can_be_set() -> None:
    """Also those that are None; until they are set, they are None in the fingerprint."""
    words = ["--config.source.crop=(64, 32)", "--config.target.grey=0.2", "--config.model.blocks=(1, 1, 1, 1)"]
    config = parse(["jaxuda", "--config=configs/minent.py", *words]).config
    adapt = plan(config, Path("runs/x"), DOMAINS)[1]
    assert (adapt.config.source.crop, adapt.config.target.grey) == ((64, 32), 0.2)
    assert adapt.identity["model"]["blocks"] == [1, 1, 1, 1]
    assert plan(minent.get_config(), Path("runs/x"), DOMAINS)[1].identity["source"]["crop"] is None


def test_other_data_are_another_stage() -> None:
    other = fingerprints(minent.get_config(), DOMAINS._replace(source=FakeRecords("other")))
    before = fingerprints(minent.get_config())
    assert {name for name in other if other[name] != before[name]} == {"source_only", "adapt"}


def test_what_a_stage_reads_belongs_to_it() -> None:
    before = fingerprints(sdca.get_config())
    config = sdca.get_config()
    config.pseudo_labels.threshold_cap = 0.5
    after = fingerprints(config)
    assert {name for name in after if after[name] != before[name]} == {"pseudo_labels", "self_train"}
    config.self_train.labels = "oracle"
    with pytest.raises(UserError, match="reads names 'oracle', which is not an earlier stage"):
        fingerprints(config)


def test_artifacts_are_verified(tmp_path: Path) -> None:
    recipe = {stage.name: stage for stage in plan(sdca.get_config(), tmp_path, DOMAINS)}
    artifact = tmp_path / "statistics" / "artifacts" / "numbers"
    artifact.parent.mkdir(parents=True)
    artifact.write_text("1")
    recipe["statistics"].mark("done")
    assert recipe["adapt"].artifacts() == {"statistics": artifact.parent}
    artifact.write_text("2")
    with pytest.raises(UserError, match=r"not what the stage 'statistics' wrote.*--from_stage statistics"):
        recipe["adapt"].artifacts()


def test_self_training_needs_no_target_labels() -> None:
    unlabelled = DOMAINS._replace(target=FakeRecords("target", labelled=False))
    assert list(fingerprints(sdca.get_config(), unlabelled))[-1] == "self_train"


def test_no_oracle_without_target_labels() -> None:
    unlabelled = DOMAINS._replace(target=FakeRecords("target", labelled=False))
    assert list(fingerprints(minent.get_config(), unlabelled)) == ["source_only", "adapt"]


def test_stage_without_a_config_is_named() -> None:
    config = minent.get_config()
    config.pipeline = ("source_only", "missing")
    with pytest.raises(UserError, match=r"there is no config\.missing"):
        plan(config, Path("runs/x"), DOMAINS)


def test_changed_fields_are_named_with_both_values() -> None:
    old, new = {"a": 1, "b": {"c": 2}, "init": ["x"]}, {"a": 1, "b": {"c": 3, "d": 4}, "init": ["y"]}
    assert changed_fields(old, new) == [
        "b.c: 2 -> 3",
        "b.d: (absent) -> 4",
        "init: the stage it starts from has changed",
    ]
