"""Invalid settings and config files end in one message."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from ml_collections import FrozenConfigDict

from jaxuda.cli import MISTAKE, parse
from jaxuda.data import domain_transform
from jaxuda.data.records import Domains
from jaxuda.errors import UserError
from jaxuda.main import main
from jaxuda.models import make_model
from jaxuda.optimizers import make_optimizer
from jaxuda.pipeline import stages
from jaxuda.pipeline.settings import check

VALUES = ["-1", "0", "1", "3", "2147483648", "1e300", "nan", "inf", "-0.5", "", "x", "../x", "None", "True", "()"]
VALUES += [
    "(1,)",
    "(0, 0)",
    "(48, 32)",
    "(-1, 5)",
    "('a', 'b')",
    "{}",
    "(1.0, nan)",
    "[[1]]",
    "\x00",
    "é",
    "(48, 32, 1)",
]


@functools.cache
def recipe_fields(name: str) -> tuple[str, ...]:
    config = parse(["x", f"--config=configs/{name}.py:streets"]).config
    plain, fields = config.to_dict(), []

    def walk(tree: dict, prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                fields.append(f"{prefix}{key}")

    walk(plain, "")
    return tuple(fields)


class Anything:
    fingerprint, labelled = "0", True


@seed(0)
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["minent", "plca", "crcda"]), st.data())
def test_any_setting_is_refused_or_makes_a_plan(name: str, data) -> None:
    fields = data.draw(st.lists(st.sampled_from(recipe_fields(name)), min_size=1, max_size=2, unique=True))
    words = [f"--config.{field}={data.draw(st.sampled_from(VALUES))}" for field in fields]
    domains = Domains(Anything(), Anything(), (Anything(),))
    try:
        config = parse(["x", f"--config=configs/{name}.py:streets", *words]).config
        recipe = stages.plan(config, Path("nowhere"), domains)
        for stage in recipe:
            model = make_model(stage.config, 3)
            if "train" in stage.config:
                make_optimizer(stage.config)
            jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 32, 48, 3)))
    except UserError as error:
        assert str(error) and "Traceback" not in str(error)
    else:
        assert all(math.isfinite(stage.config.lr) for stage in recipe if "train" in stage.config)
        assert isinstance(recipe[0].config, FrozenConfigDict)


@pytest.mark.parametrize("field", ["resize", "flip"])
def test_transforms_of_a_benchmark_can_be_unset(field: str) -> None:
    config = parse(["x", "--config=configs/minent.py:camvid", f"--config.source.{field}=None"]).config
    assert config.source[field] is None and config.target[field] is not None
    record = {"image": np.zeros((9, 14, 3), np.uint8)}
    shape = domain_transform(config.source.to_dict())(record, np.random.default_rng(0))["image"].shape
    assert shape == ((9, 14, 3) if field == "resize" else (180, 240, 3))
    words = ["--config.target.fit=None", "--config.target.scale=(0.5, 0.5)"]
    config = parse(["x", "--config=configs/dada.py:mapillary", *words]).config
    assert domain_transform(config.target.to_dict())(record, np.random.default_rng(0))["image"].shape == (4, 7, 3)


def test_fields_that_only_some_recipes_have_are_checked_too() -> None:
    config = parse(["x", "--config=configs/minent.py"]).config
    with config.unlocked():
        config.evaluation.interpolation = "cubic"
        config.adapt.rare_class_crop_ratio = -0.5
    with pytest.raises(UserError) as found:
        check(config)
    assert "config.evaluation: transform field interpolation='cubic': choose bicubic, bilinear or" in str(found.value)
    assert "config.adapt.rare_class_crop_ratio=-0.5 must be at least 0" in str(found.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config.log_every=0"], "config.log_every=0 must be at least 1"),
        (["--config.adapt.lr=nan"], "config.adapt.lr=nan is not finite"),
        (["--config.evaluation.size=(0, 5)"], "must be (width, height)"),
        (["--config.source.resize=(48,)"], "config.source: transform field resize=(48,): must be 2 numbers"),
        (["--config.source.scale=(0.5, 2.0)"], "not several: unset resize (resize=None) or scale"),
        (["--config.source.resize=none"], "resize='none': must be 2 numbers, or None"),
        (["--config.pipeline=()"], "must name stages"),
        (["--config.model.width=100000"], "must be at most 4096"),
        (["--config.adapt.batch=0", "--config.adapt.steps=-3"], "config.adapt.steps=-3 must be at least 1"),
        (["--config.model.dtype=int8"], "config.model.dtype='int8' must be one of float32, bfloat16, float16, float64"),
        (["--config.test.scales=()"], "must be factors above 0"),
        (["--seeds=a"], "--seeds a: must be whole numbers"),
        (["--config.seed=-1"], "must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(words: list[str], expected: str, capsys) -> None:
    assert main(["jaxuda", "--config=configs/minent.py", "--workdir=/nowhere/at/all", *words]) == MISTAKE
    message = capsys.readouterr().err
    assert expected in message and message.startswith("error: ") and "Traceback" not in message
