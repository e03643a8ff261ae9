"""The messages for commands that cannot run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from ml_collections import config_flags

from jaxuda import prepare, table
from jaxuda.cli import INTERRUPTED, MISTAKE, guarded, parse
from jaxuda.main import main
from jaxuda.report import __main__ as report
from jaxuda.report import pictures

ROOT = Path(__file__).parents[1]
MINENT = "--config=configs/minent.py"
COMMANDS = {"prepare": prepare, "table": table, "report": report, "report.pictures": pictures}


@pytest.fixture
def complaint(capsys):
    """Runs `main` and returns its message, on which a user can act."""

    def run(words: list[str], command=main) -> str:
        assert command(words) == MISTAKE
        message = capsys.readouterr().err
        assert message.startswith("error: ") and "Traceback" not in message and "\\" not in message
        return message.removeprefix("error: ").removesuffix("\n")

    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--config.adapt.lambda_entrpy=1"],
            "config.adapt has no field 'lambda_entrpy'; did you mean 'lambda_entropy'?",
        ),
        (["--config.adpt.lr=1"], "config has no field 'adpt'; did you mean 'adapt'?"),
        (["--config.evaluation.batsh", "1"], "config.evaluation has no field 'batsh'; did you mean 'batch'?"),
        (["--config.lr=0.1"], "config has no field 'lr'; did you mean config.adapt.lr or config.oracle.lr or"),
        (["--config.model.dtype=fp16"], "config.model.dtype='fp16' must be one of float32, bfloat16, float16, float64"),
        (["--config.adapt.width=64"], "config.adapt has no field 'width'; did you mean config.model.width?"),
        (
            ["--config.evaluation.wisdom=1"],
            "config.evaluation has no field 'wisdom'; it has batch, network, size, split",
        ),
        (["--config.adapt.lr.x=1"], "config.adapt.lr is a value, not a section: it has no field 'x'"),
        (["--config.test=3"], "config.test is a section: set its fields (class_weights, flip, scales, weights), each"),
        (["--config.adapt.lr=abc"], "--config.adapt.lr=abc must be a number"),
        (["--config.model.width=1.5"], "--config.model.width=1.5 must be a whole number"),
        (["--config.model.aux=perhaps"], "--config.model.aux=perhaps must be True or False"),
        (["--config.evaluation.size=(1,"], "--config.evaluation.size=(1, must be a tuple"),
        (["--config.adapt.lr"], "Missing value for flag --config.adapt.lr"),
        (["--processes=a"], "--processes=a must be a whole number"),
        (["--mode=evil"], "--mode=evil: value should be one of <run|eval|predict>"),
        (["--sedes=1"], "unknown flag --sedes; did you mean --seeds?"),
        (["--data_dir=/data"], "unknown flag --data_dir; did you mean --config.data_dir?"),
        (["--zzz"], "unknown flag --zzz; --help lists all flags"),
        (["stray"], "not understood: stray (flags start with --)"),
        ([MINENT], "--config is given 2 times: a run has one recipe (jaxuda.table runs several)"),
        (["--seeds=0,x"], "--seeds 0,x: must be whole numbers with commas between them"),
        (["--mode=eval", "--checkpoint=x", "--seeds=0"], "--seeds belongs to --mode run; --mode eval uses the stage"),
        (["--config.pipeline=('adapt', 'seed')"], "config.pipeline names 'seed', but config.seed is no stage"),
    ],
)
def test_words_that_are_not_understood(complaint, words: list[str], expected: str) -> None:
    assert complaint(["jaxuda", MINENT, *words]).startswith(expected)


def test_recipes_that_do_not_exist(complaint) -> None:
    for words, expected in (
        ([], "which recipe? Add --config minent (--list"),
        (["--config"], "which recipe? Add --config minent (--list"),
        (["--confg=configs/minent.py"], "unknown flag --confg; did you mean --config?"),
        (
            ["--config=configs/mineit.py"],
            "--config configs/mineit.py: there is no such recipe; did you mean configs/minent.py?",
        ),
        (
            ["--config=configs/minent"],
            "--config configs/minent: there is no such recipe; did you mean configs/minent.py?",
        ),
        (
            ["--config=configs/minent:gta5"],
            "--config configs/minent: there is no such recipe; did you mean configs/minent",
        ),
        (["--config", "mineit"], "--config mineit: there is no such recipe; did you mean minent?"),
        (["--config", "minent:mars"], "configs/minent.py has no benchmark 'mars' (known: streets, camvid"),
        (["--config=configs/minent.py:mars"], "configs/minent.py has no benchmark 'mars' (known: streets, camvid"),
        (["--config=configs/common.py"], "configs/common.py is no recipe: it must define get_config(benchmark)"),
    ):
        assert complaint(["jaxuda", *words]).startswith(expected)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("return nothing", "NameError: name 'nothing' is not defined (FILE, line 3)"),
        ("return {}['lamp']", "KeyError: 'lamp' (FILE, line 3)"),
        (
            "return common.base('broken', 'streets').modle",
            'AttributeError: \'modle\'; Did you mean "model" instead of "modle"? (FILE, line 3)',
        ),
        ("return int('z')", "ValueError: invalid literal for int() with base 10: 'z' (FILE, line 3)"),
        ("raise ValueError('only on Mars')", "only on Mars"),
        ("return (", "SyntaxError: '(' was never closed (FILE, line 3)"),
        ("pass", "FILE is no recipe: it must define get_config(benchmark), which returns a ConfigDict"),
        (
            "config = common.base('broken', 'streets'); del config['test']; config.pipeline = (); return config",
            "the config lacks test: make it with configs.common.base, then change it",
        ),
        (
            "config = common.base('broken', 'streets'); config.adapt = {'train': 'minent', 'steps': 3};"
            "config.pipeline = ('adapt',); return config",
            "config.adapt lacks batch, domains, init, labels, lr, order, reads, schedule_steps, split",
        ),
    ],
)
def test_a_broken_config_file_tells_its_line(complaint, tmp_path: Path, code: str, expected: str) -> None:
    file = tmp_path / "configs" / "broken.py"
    file.parent.mkdir()
    file.write_text(f"from configs import common\ndef get_config(benchmark='streets'):\n    {code}\n")
    assert complaint(["jaxuda", f"--config={file}"]).startswith(expected.replace("FILE", str(file)))


def test_of_a_flag_given_twice_the_last_one_holds(complaint) -> None:
    words = ["jaxuda", MINENT, "--config.evaluation.size=(8, 4)", "--config.evaluation.size=(3,)"]
    assert "config.evaluation.size=(3,) must be (width, height)" in complaint(words)


@pytest.mark.parametrize(
    ("field", "first", "last"),
    [
        ("class_weights", (1.0, 2.0), (3.0, 4.0)),
        ("test.scales", (1.0,), (0.5, 1.5)),
        ("evaluation.size", (96, 64), (48, 32)),
        ("adapt.lr", 0.1, 0.2),
        ("control", True, False),
    ],
)
@pytest.mark.parametrize("forms", [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 1), (2, 3), (3, 3)])
def test_of_a_field_given_twice_in_any_form_the_last_one_holds(field: str, first, last, forms: tuple[int, int]) -> None:
    def words(value, form: int) -> list[str]:
        dashes = "--" if form < 2 else "-"
        if form % 2 == 0 or isinstance(value, bool):  # absl takes no second word for them
            return [f"{dashes}config.{field}={value}"]
        return [f"{dashes}config.{field}", str(value)]

    args = parse(["jaxuda", MINENT, *words(first, forms[0]), "--config.adapt.steps=7", *words(last, forms[1])])
    found = args.config
    for name in field.split("."):
        found = found[name]
    assert found == last and args.config.adapt.steps == 7
    assert config_flags.get_override_values(args["config"]) == {"adapt.steps": 7, field: last}


def test_a_flag_without_a_value_stays_one(complaint) -> None:
    assert parse(["jaxuda", MINENT, "--config.control", "--dry_run"]).config.control is True
    assert parse(["jaxuda", MINENT, "--config.control", "--noconfig.control"]).config.control is False
    assert "Missing value" in complaint(["jaxuda", MINENT, "--config.adapt.lr=0.1", "--config.adapt.lr"])


def test_one_class_is_refused_before_anything_trains(complaint, tmp_path, capsys) -> None:
    for domain in ("source", "target"):
        folder = tiny.draw_folder(tmp_path / domain, f"one_{domain}", 0, images=2)
        classes = [{"name": "thing", "ids": [0, 1, 2], "color": [255, 0, 0]}]
        (folder / "classes.json").write_text(json.dumps({"name": "one", "classes": classes}))
        prepare.prepare("folder", path=str(folder), data_dir=tmp_path / "tfds")
    places = {"source": tmp_path / "source", "target": tmp_path / "target", "data_dir": tmp_path / "tfds"}
    capsys.readouterr()
    message = complaint(["jaxuda", *tiny.arguments("minent", workdir=tmp_path / "run", **places)])
    assert "has one class, thing: a network learns nothing if it is the only answer. Name a second one" in message
    assert not list((tmp_path / "run").glob("*/stage.json"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config.devices=3", "--config.source_only.batch=4"], "use one of [1, 2, 4]"),
        (["--config.platform=gpu"], "JAX only found cpu"),
        (["--config.adapt.init=nowhere"], "which is not an earlier stage"),
        (["--config.adapt.train=nothing"], "unknown train='nothing'; choose one of: advent, "),
        (["--config.adapt.train=nothing.at_all"], "train='nothing.at_all' cannot be imported (ModuleNotFoundError"),
        (["--config.adapt.order=nothing"], "order='nothing'"),
        (["--config.model.name=nothing"], "name='nothing'; choose one of: deeplab"),
        (["--config.optim.name=nothing"], "name='nothing'; choose one of: "),
        (["--config.adapt.train=sdca"], "reads config.adapt."),
        (["--from_stage=nothing"], "this recipe's stages are"),
        (["--mode=predict", "--checkpoint=nowhere", "--images=*.nothing"], "matches no file"),
        (["--mode=eval", "--checkpoint=nowhere"], "is not the folder of a training stage"),
        (["--config.source.path="], "--config.source.path=DIR"),
        (["--config.evaluation.split=vall"], "folder has no split 'vall'; it has train, val"),
        (
            ["--config.class_weights=(1.0, 2.0)"],
            "number for each of the 3 classes, in their order (ground",
        ),
        (["--config.class_weights=(None, None, None)"], "class_weights=(None, None, None) must be one number for each"),
        (["--config.model.blocks=True"], "config.model.blocks=True must be the number of blocks of each stage"),
        (["--config.source.path=~nobody_of_this_name/x"], "~nobody_of_this_name/x: a dataset folder needs a folder"),
        (["--config.class_weights=(1.0, 2.0, 0.0)"], "one positive number for each of the 3 classes"),
    ],
)
def test_mistakes_are_named_before_anything_trains(complaint, data, tmp_path, words: list[str], expected: str) -> None:
    run = tmp_path / "run"
    assert expected in complaint(["jaxuda", *tiny.arguments("minent", workdir=run, **data), *words])
    assert not list(run.glob("*/stage.json"))


OWN = """
import jax.numpy as jnp

def passes(config, step):
    return (only,)

def only(params, carry, batch, *, config, **_):
    {0}
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("return jnp.zeros(()) * config.lambda_missing, carry", "reads config.adapt.lambda_missing"),
        ("return jnp.zeros(()) * config.optim.beta1, carry", "line 8, reads config.optim.beta1"),
        ("return jnp.zeros(()) * carry.values['mask'], carry", "keep it there with carry.keep(mask=...)"),
        ("return jnp.zeros(()), carry.log(loss_a=0.0).log(loss_a=0.0)", "the metric 'loss_a' is written twice"),
        ("return jnp.zeros(()), carry._replace(extra=(1,))", "extra"),
    ],
)
def test_a_method_that_breaks_the_contract_is_named(complaint, data, tmp_path, monkeypatch, code, expected) -> None:
    """The method has no `init`, which is optional."""
    (tmp_path / "own").mkdir()
    name = f"own_{abs(hash(code))}"
    (tmp_path / "own" / f"{name}.py").write_text(OWN.format(code))
    (tmp_path / "own" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    words = tiny.arguments("minent", workdir=tmp_path / "run", **data)
    assert expected in complaint(["jaxuda", *words, f"--config.adapt.train=own.{name}"])
    assert not list((tmp_path / "run").glob("*/stage.json"))


def test_an_unknown_sweep_is_named_before_anything_trains(complaint, data, tmp_path) -> None:
    words = tiny.arguments("sdca", workdir=tmp_path / "run", **data)
    assert "'nothing'; choose one of: class_statistics, " in complaint(
        ["x", *words, "--config.statistics.sweep=nothing"]
    )
    assert not list((tmp_path / "run").glob("*/stage.json"))


def test_missing_dataset_names_the_command(complaint, tmp_path) -> None:
    words = [
        "--config=configs/minent.py:camvid",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data_dir={tmp_path}",
    ]
    message = complaint(["jaxuda", *words])
    assert f"python -m jaxuda.prepare camvid --manual_dir DIR --data_dir {tmp_path}" in message
    assert message.endswith("if prepared elsewhere, add --config.data_dir=DIR (the --data_dir of jaxuda.prepare)")


def test_all_missing_datasets_are_named_at_once(complaint, tmp_path) -> None:
    words = ["--config=configs/sdca.py:gta5", f"--workdir={tmp_path / 'run'}", f"--config.data_dir={tmp_path}"]
    message = complaint(["jaxuda", *words])
    assert f"gta5 and cityscapes are not prepared in {tmp_path}; run" in message
    for name in ("gta5", "cityscapes"):
        assert f"\n  python -m jaxuda.prepare {name} --manual_dir DIR --data_dir {tmp_path}\n" in message
    file, network = "resnet101-63fe2227.pth", "resnet101-torchvision"
    assert f"get {file} from torchvision, then run" in message
    assert f"\n  python -m jaxuda.convert {file} --imagenet {network} --data_dir {tmp_path}\n" in message


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("prepare", [], "the following arguments are required: name (--help explains)"),
        ("prepare", ["camvid", "--maual_dir=x"], "unknown flag --maual_dir; did you mean --manual_dir?"),
        ("prepare", ["camvid", "--config.data_dir=x"], "unknown flag --config.data_dir; did you mean --data_dir?"),
        ("prepare", ["camvid", "more"], "not understood: more (flags start with --)"),
        ("prepare", ["camvid", "--manual_dir"], "argument --manual_dir: expected one argument (--help explains)"),
        ("table", ["--configs=configs/minent.py", "--dry_run"], "unknown flag --dry_run; --help lists all flags"),
        (
            "table",
            ["--configs=configs/minent.py", "--benchmark=x"],
            "unknown flag --benchmark; did you mean --benchmarks?",
        ),
        ("table", ["--configs=configs/minent.py", "--seeds=x"], "--seeds x: must be whole numbers"),
        ("table", ["--configs=configs/minent.py", "--config.adapt.lr=x"], "--config.adapt.lr=x must be a number"),
        ("report", ["--workdir=/nowhere/at/all"], "/nowhere/at/all is not a work folder"),
        ("report", ["--workdir=x", "--outt=y"], "unknown flag --outt; did you mean --out?"),
        ("report.pictures", ["nothing", "--workdir=x", "--out=y.svg"], "there is no picture 'nothing'; choose one of"),
    ],
)
def test_the_other_commands(complaint, command: str, words: list[str], expected: str) -> None:
    assert complaint(words, COMMANDS[command].main).startswith(expected)


def test_exit_codes(capsys) -> None:
    def failing(error: BaseException, **options) -> int:
        def work() -> None:
            raise error

        return guarded(work, **options)

    assert guarded(lambda: None) == 0
    assert failing(KeyboardInterrupt(), interrupted="nothing was left behind") == INTERRUPTED
    assert capsys.readouterr().err == "interrupted; nothing was left behind\n"
    assert failing(PermissionError(13, "Permission denied", "/data")) == MISTAKE
    assert capsys.readouterr().err.startswith("error: Permission denied (/data): ")
    with pytest.raises(FileNotFoundError):
        failing(FileNotFoundError(2, "No such file", "/data"))
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["main", "--list"], ["main", "--help"], ["prepare", "--help"]], ids=" ".join)
def test_a_closed_pipe_ends_a_command_quietly(words: list[str], unbuffered: str) -> None:
    """As `| head -1` closes it, but always before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as output:
        done = subprocess.run(
            [sys.executable, "-m", f"jaxuda.{words[0]}", words[1]],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["main", *COMMANDS, "convert"])
def test_help_does_not_wait_for_jax(name: str) -> None:
    words = [sys.executable, "-X", "importtime", "-m", f"jaxuda.{name}", "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "--" in done.stdout
    assert not re.search(r"\| +(jax|tensorflow_datasets|flax)$", done.stderr, re.MULTILINE)


def test_a_run_whose_output_is_closed_is_interrupted(data, tmp_path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = tiny.arguments("minent", workdir=tmp_path / "run", **data)
    with os.fdopen(writer) as output:
        command = [sys.executable, "-m", "jaxuda.main", *words]
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
    assert done.returncode == INTERRUPTED
    assert done.stderr.endswith("nobody reads the output any more; the same command continues from what is saved\n")
    assert "Traceback" not in done.stderr
