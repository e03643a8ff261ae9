"""Every recipe in `configs` loads, builds its network, and its steps fit together, without computing anything.

A new file in `configs` is tested automatically.
"""

import contextlib
import importlib
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest
from test_stages import DOMAINS

from configs import cfcontra, common, dada, daformer, hrda, lfass, mic, minent, plca, sdca, sepico, vfmuda
from jaxuda import methods
from jaxuda.data.joined import part_names
from jaxuda.data.labels import label_space, lookup_table
from jaxuda.models import make_model
from jaxuda.optimizers import make_optimizer
from jaxuda.pipeline.stages import plan
from jaxuda.pipeline.tracing import image_size
from jaxuda.training.loop import phases
from jaxuda.training.start import method_start, new_state
from jaxuda.training.step import make_step, to_float

CLASSES = {"gta5": 19, "synthia": 16, "mapillary": 7, "streets": 19, "camvid": 11}
CLASSES |= {"synthia-19": 19, "gta5+synthia": 16, "gta5+synthia-19": 19, "mapillary-19": 19}
CLASSES |= {"acdc": 19, "darkzurich": 19}
FULL = ("gta5", "synthia")  # benchmarks on which every stage is traced
TEACHERS = ("dacs", "daformer", "hrda", "mic", "sepico", "vfmuda")  # synthia differs in the number of classes alone


def recipes() -> dict[str, ModuleType]:
    """The files of the folder `configs` that are recipes, by name."""
    files = sorted(Path(common.__file__).parent.glob("*.py"))
    modules = {file.stem: importlib.import_module(f"configs.{file.stem}") for file in files}
    return {name: module for name, module in modules.items() if hasattr(module, "get_config")}


def known(module: ModuleType, benchmarks: tuple[str, ...]) -> list[str]:
    """The given benchmarks that a recipe has, also in the recipe's variants ("gta5,vgg16")."""
    found = []
    for benchmark in benchmarks:
        for name in (benchmark, *(f"{benchmark},{variant}" for variant in getattr(module, "VARIANTS", ()))):
            with contextlib.suppress(ValueError):  # it has no recipe for this one
                module.get_config(name)
                found.append(name)
    return found


RECIPES = recipes()
TRACED = [
    (name, benchmark)
    for name, module in RECIPES.items()
    for benchmark in known(module, FULL[:1] if name in TEACHERS else FULL)
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "benchmark"), TRACED)
def test_steps_of_published_recipes(recipe: str, benchmark: str) -> None:
    check(RECIPES[recipe].get_config(benchmark), CLASSES[benchmark.partition(",")[0]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "benchmark", "stage"),
    [
        ("advent", "crosscity-rome", "adapt"),
        ("sdca", "mapillary", "self_train"),
        ("dada", "mapillary", "adapt"),
    ],
)
def test_elsewhere(recipe: str, benchmark: str, stage: str) -> None:
    """Stages whose networks the tests above do not have."""
    check(RECIPES[recipe].get_config(benchmark), CLASSES.get(benchmark, 13), (stage,))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_benchmark_of_a_recipe_is_planned(recipe: str) -> None:
    """Both datasets have the classes; published benchmarks have networks and steps like the published ones."""
    benchmarks = known(RECIPES[recipe], common.BENCHMARKS)
    assert "streets" in benchmarks
    for benchmark in benchmarks:
        config = RECIPES[recipe].get_config(benchmark)
        name = benchmark.partition(",")[0]
        assert plan(config, Path("runs/x"), DOMAINS)
        if name == "folder":
            continue
        space, place = label_space(config.label_space), config.target.name.partition("/")
        for domain in (config.source, config.target):
            parts = [part.partition("/")[0] for part in part_names(domain.name)]
            for dataset in parts:
                lookup_table(dataset, space, parts)
        if name in common.PUBLISHED:
            width = 64 if config.model.name == "deeplab" else None  # of transformers: as their variant has it
            assert config.model.width == width and config.source_only.steps >= 2_000
        if name in common.ADVERSE:
            assert recipe != "mic" or config.adapt.mask_images == "separate"
            assert config.source.name == "cityscapes" and config.target.name.startswith(name)
            assert config.evaluation.size[0] / config.evaluation.size[1] == pytest.approx(16 / 9, rel=1e-3)
        if name.startswith("crosscity"):
            assert config.evaluation.split == "test" and place[2] == name.partition("-")[2]
        assert space.num_classes == CLASSES.get(name, 13)


@pytest.mark.parametrize("method", methods.names())
def test_a_recipe_trains_with_every_method(method: str) -> None:
    """Except for the control, which any recipe can add."""
    configs = [module.get_config("streets") for module in RECIPES.values()]
    used = {config[name].get("train") for config in configs for name in config.pipeline}
    assert method in used or method == "control"


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "source_only"])
def test_docstrings_have_commands_and_a_score(recipe: str) -> None:
    """Figures that change with the code (memory, arithmetic, hours) are in experiments/RESULTS.md."""
    text = RECIPES[recipe].__doc__
    assert f"--config configs/{recipe}.py" in text and "mIoU" in text
    assert "GiB" not in text.replace("24 GiB", "") and "TFLOP" not in text


@pytest.mark.parametrize("benchmark", ["camvid", "folder", "gta5", "crosscity-rome"])
def test_dada_needs_depth(benchmark: str) -> None:
    with pytest.raises(ValueError, match=f"which '{benchmark}' does not have"):
        dada.get_config(benchmark)


def test_sdca_settings() -> None:
    config = sdca.get_config("gta5")
    stages = {stage.name: stage.config for stage in plan(config, Path("runs/x"), DOMAINS)}
    assert stages["source_only"].source.jitter is None and stages["adapt"].source.jitter == (0.5, 0.5, 0.5, 0.2)
    assert stages["adapt"].model.norm == "frozen" and stages["self_train"].model.norm == "batch"
    assert stages["self_train"].source.name == "cityscapes" and stages["self_train"].source.crop == (1024, 512)
    assert stages["oracle"].source.crop is None
    assert (stages["adapt"].schedule_steps, stages["adapt"].tau) == (62_500, 100.0)
    with pytest.raises(ValueError, match="no variant 'r50'"):
        sdca.get_config("gta5,r50")


def test_cfcontra_settings() -> None:
    config = cfcontra.get_config("gta5")
    stages = {stage.name: stage for stage in plan(config, Path("runs/x"), DOMAINS)}
    adapt, minent_stages = stages["adapt"].config, plan(minent.get_config("gta5"), Path("runs/y"), DOMAINS)
    for ours, theirs in zip(("source_only", "minent", "oracle"), minent_stages, strict=True):
        assert stages[ours].fingerprint == theirs.fingerprint  # trained once for both recipes
    assert (adapt.source.resize, adapt.target.resize, adapt.evaluation.size) == ((1280, 640), (1280, 640), (1024, 512))
    assert stages["prototypes"].config.source.resize == (1280, 640)
    assert adapt.init == "imagenet" and stages["prototypes"].init[0] == Path("runs/x/minent/checkpoints")
    assert (adapt.optim.repeat_decay, adapt.optim.repeat.block) == ("fresh", 3)
    assert {adapt[f"lambda_{term}"] for term in ("source", "target", "target_to_source", "source_to_target")} == {0.001}


@pytest.mark.parametrize("benchmark", ["streets", "camvid"])
def test_cfcontra_shares_stages_with_minent(benchmark: str) -> None:
    ours, theirs = (plan(module.get_config(benchmark), Path("runs/x"), DOMAINS) for module in (cfcontra, minent))
    ours = {stage.name: stage.fingerprint for stage in ours}
    assert [ours[name] for name in ("source_only", "minent", "oracle")] == [stage.fingerprint for stage in theirs]


def test_vfmuda_settings() -> None:
    """Its transformer learns with a tenth of the rate of its decoder, 5e-5 times the root of the batch."""
    for benchmark, size in (("gta5", (2048, 1024)), ("folder", (256, 128))):
        config = vfmuda.get_config(benchmark)
        stages = {stage.name: stage.config for stage in plan(config, Path("runs/x"), DOMAINS)}
        assert {stage.init for stage in stages.values()} == {"imagenet"}
        for stage in stages.values():
            assert stage.lr * stage.optim.head_factor == pytest.approx(5e-5 * stage.batch**0.5)
            assert (stage.optim.weight_decay, stage.optim.undecayed, stage.evaluation.size) == (0.01, (), size)
        adapt = stages["adapt"]
        assert (adapt.mask_images, adapt.mask_ratio, adapt.teacher_flip, adapt.lambda_features) == (
            "tokens",
            0.7,
            True,
            0,
        )
    adapt = plan(vfmuda.get_config("gta5"), Path("runs/x"), DOMAINS)[1].config
    assert adapt.source.crop == adapt.target.crop == adapt.model.window == (1024, 1024)
    assert (adapt.source.short_side, adapt.target.short_side) == ((1296, 1584), (922, 1126))


def test_association_settings() -> None:
    config = plca.get_config("gta5")
    assert (config.adapt.steps, config.adapt.schedule_steps) == (10_416, 11_160)
    assert config.adapt.batch / config.adapt.accumulate == 4 and config.model.head_bias is False
    assert config.source.crop == config.target.crop == (730, 730) and config.target.interpolation == "bilinear"
    config = lfass.get_config("synthia,paired")
    assert config.name == "lfass_paired" and config.pipeline[1] == config.adapt.pairing == "target_classes"
    assert config.optim.repeat.block == 3 and config.adapt.lambda_probs == config.adapt.test_aggregation == 0
    ours, theirs = (
        {stage.name: stage.fingerprint for stage in plan(module.get_config(), Path("runs/x"), DOMAINS)}
        for module in (plca, sdca)
    )
    assert ours["source_only"] == theirs["source_only"] and ours["oracle"] == theirs["oracle"]
    with pytest.raises(ValueError, match="no variant 'pairs'"):
        plca.get_config("streets,pairs")


def test_sepico_settings() -> None:
    """Target images arrive larger than the source's crops; only the oracle's, which have labels, are cropped before."""
    stages = {stage.name: stage.config for stage in plan(sepico.get_config("gta5"), Path("runs/x"), DOMAINS)}
    adapt, oracle = stages["adapt"], stages["oracle"]
    assert (image_size(adapt.source), image_size(adapt.target)) == ((640, 640), (1280, 640))
    assert adapt.source.balanced == 0.75 and "balanced" not in adapt.target
    assert (image_size(oracle.source), oracle.source.balanced, oracle.source.resize) == ((640, 640), 0.75, (1280, 640))
    assert (adapt.tau, adapt.contrast_start, adapt.bank, adapt.channels) == (100.0, 3000, 200, 512)
    assert (adapt.ignore_top, adapt.ignore_bottom) == (15, 120) and adapt.model.head_dilations == (6, 12, 18, 24)
    quick = sepico.get_config("streets").adapt
    assert quick.contrast_start == quick.steps // 10 and quick.reg_weight == 0
    rome = sepico.get_config("crosscity-rome")
    assert rome.source.within == rome.evaluation.size == (1280, 640) and rome.adapt.ignore_bottom == 0


def test_settings_of_transformers() -> None:
    """Networks, resolutions and optimizer as published; quick recipes have the smallest network and half views."""
    config = daformer.get_config("gta5,mit")
    assert (config.model.variant, config.model.head, config.optim.undecayed) == ("b5", "daformer", ("norm",))
    assert (config.source.crop, config.evaluation.size, config.adapt.lr) == ((512, 512), (1024, 512), 6e-5)
    assert "hrda" not in config.model and config.adapt.weights == ("imagenet",) and config.adapt.ignore_bottom == 120
    large = {"hrda": hrda.get_config("gta5"), "mic": mic.get_config("gta5,hrda")}
    for config in large.values():
        assert config.model.hrda.crop == (512, 512) and config.model.hrda.window == config.source.crop == (1024, 1024)
        assert config.source.within == (2560, 1440) and config.target.within == config.evaluation.size == (2048, 1024)
        assert config.target.margins == (30, 240, 30, 30) and config.adapt.rare_class_crop_ratio == 2
        assert config.adapt.ignore_top == config.adapt.ignore_bottom == 0
    assert (large["hrda"].adapt.lambda_mask, large["mic"].adapt.lambda_mask) == (0, 1)
    assert large["mic"].adapt.mask_block == 64 and mic.get_config("gta5,mit").adapt.mask_block == 32
    quick = hrda.get_config("camvid")
    assert quick.model.variant == "b0" and quick.model.hrda.crop == (120, 88) and quick.source.resize == (240, 176)
    assert quick.adapt.lambda_features == 0 and mic.get_config("streets,hrda").model.hrda.window == (256, 128)
    with pytest.raises(ValueError, match="has no variants"):
        hrda.get_config("gta5,mit")


CHECKED: set[str] = set()  # fingerprints: recipes share their baselines


def check(config, num_classes: int, only: tuple[str, ...] = ()) -> None:
    """Every training stage: one abstract step at the published batch and image sizes keeps the state's shapes."""
    for stage in plan(config, Path("runs/x"), DOMAINS):
        settings = stage.config
        if "sweep" in settings or (only and stage.name not in only) or stage.fingerprint in CHECKED:
            continue
        CHECKED.add(stage.fingerprint)
        model, method = make_model(settings.model, num_classes), methods.load(settings.train)
        tx = make_optimizer(settings, model)
        batch = {
            domain: {"image": jax.ShapeDtypeStruct((settings.batch, *image_size(settings[domain])[::-1], 3), jnp.uint8)}
            for domain in ("source", "target")
            if domain in settings
        }
        image = batch["source"]["image"]
        batch["source"]["label"] = jax.ShapeDtypeStruct(image.shape[:3], jnp.uint8)
        batch["source"]["depth"] = jax.ShapeDtypeStruct(image.shape[:3], jnp.float32)

        def start(model=model, method=method, tx=tx, settings=settings, batch=batch, image=image):
            variables = model.init(jax.random.key(0), jnp.zeros((1, *image.shape[1:])))
            zeros = to_float(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch), settings.preprocess)
            given = method_start(method, jax.random.key(1), model, zeros, settings, {}, None, variables)
            return new_state(variables, given, tx), given.constants

        before, constants = jax.eval_shape(start)
        for phase in phases(method, settings):
            step = make_step(method, model, tx, settings, phase)
            after, metrics = jax.eval_shape(step, before, constants, 0, batch)
            assert shapes(after) == shapes(before)
            assert metrics["loss"].shape == ()
        assert sum(leaf.size for leaf in jax.tree.leaves(before.params)) > 11e6


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)
