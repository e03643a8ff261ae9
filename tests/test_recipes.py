"""The published recipes load, build the full network, and their steps fit together, without computing anything."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_stages import DOMAINS

from configs import advent, cfcontra, common, crcda, dada, fada, intrada, lfass, minent, plca, sdca
from jaxuda import methods
from jaxuda.data.labels import label_space, lookup_table
from jaxuda.models import make_model
from jaxuda.optimizers import make_optimizer
from jaxuda.pipeline.stages import plan
from jaxuda.training.loop import make_step
from jaxuda.training.state import TrainState

CLASSES = {"gta5": 19, "synthia": 16, "crosscity-rome": 13, "mapillary": 7}
TO_CITYSCAPES = pytest.mark.parametrize("benchmark", ["gta5", "synthia"])


@pytest.mark.parametrize("benchmark", ["gta5", "gta5,vgg16", "synthia", "synthia,vgg16"])
def test_sdca(benchmark: str) -> None:
    check(sdca.get_config(benchmark), CLASSES[benchmark.partition(",")[0]])


@pytest.mark.parametrize("config", [minent, advent, intrada, fada, cfcontra, crcda])
@TO_CITYSCAPES
def test_adversarial(config, benchmark: str) -> None:
    check(config.get_config(benchmark), CLASSES[benchmark])


@pytest.mark.parametrize(
    ("config", "benchmark", "stage"), [(advent, "crosscity-rome", "adapt"), (sdca, "mapillary", "self_train")]
)
def test_elsewhere(config, benchmark: str, stage: str) -> None:
    """The other networks and stages are those of the tests above."""
    check(config.get_config(benchmark), CLASSES[benchmark], (stage,))


@pytest.mark.parametrize("config", [minent, advent, intrada, fada, sdca, cfcontra, crcda])
@pytest.mark.parametrize("benchmark", common.PUBLISHED)
def test_every_method_has_every_benchmark(config, benchmark: str) -> None:
    recipe = config.get_config(benchmark)
    assert recipe.model.backbone == "resnet101" and recipe.source_only.steps >= 20_000
    space, place = label_space(recipe.label_space), recipe.target.name.partition("/")
    for dataset in (recipe.source.name, place[0]):
        lookup_table(dataset, space)
    if benchmark.startswith("crosscity"):
        assert recipe.evaluation.split == "test" and place[2] == benchmark.partition("-")[2]
    assert space.num_classes == CLASSES.get(benchmark, 13)


@pytest.mark.parametrize("config", [minent, advent, dada, intrada, fada, sdca, cfcontra, crcda, plca, lfass])
def test_docstrings_have_score_memory_and_cost(config) -> None:
    for said in ("mIoU", "GiB", "TFLOP", "hours", "experiments/benchmarks/recipe_cost.py"):
        assert said in config.__doc__, said


@pytest.mark.parametrize("benchmark", ["synthia", "mapillary"])
def test_dada(benchmark: str) -> None:
    check(dada.get_config(benchmark), CLASSES[benchmark], ("adapt",))


@pytest.mark.parametrize("benchmark", ["camvid", "folder", "gta5", "crosscity-rome"])
def test_dada_needs_depth(benchmark: str) -> None:
    with pytest.raises(ValueError, match=f"which '{benchmark}' has not"):
        dada.get_config(benchmark)


def test_sdca_settings() -> None:
    config = sdca.get_config("gta5")
    stages = {stage.name: stage.config for stage in plan(config, Path("runs/x"), DOMAINS)}
    assert stages["source_only"].source.jitter is None and stages["adapt"].source.jitter == (0.5, 0.5, 0.5, 0.2)
    assert stages["adapt"].model.norm == "frozen" and stages["self_train"].model.norm == "batch"
    assert stages["self_train"].source.name == "cityscapes" and stages["self_train"].source.crop == (1024, 512)
    assert stages["oracle"].source.crop is None
    assert (stages["adapt"].schedule_steps, stages["adapt"].tau) == (62_500, 100.0)
    with pytest.raises(ValueError, match="no network 'r50'"):
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


@pytest.mark.parametrize("config", [plca, lfass])
@pytest.mark.parametrize("benchmark", ["gta5", "synthia,paired"])
def test_association(config, benchmark: str) -> None:
    check(config.get_config(benchmark), CLASSES[benchmark.partition(",")[0]], least=11e6)


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


def check(config, num_classes: int, only: tuple[str, ...] = (), least: float = 15e6) -> None:
    """Every training stage: one abstract step at the published batch and image sizes keeps the state's shapes."""
    for stage in plan(config, Path("runs/x"), DOMAINS):
        if "sweep" in stage.config or (only and stage.name not in only):
            continue
        model, method, tx = make_model(stage.config, num_classes), methods.load(stage.config.train), None
        batch = {
            domain: {"image": jax.ShapeDtypeStruct((stage.config.batch, *size, 3), jnp.uint8)}
            for domain in ("source", "target")
            if domain in stage.config
            for size in [_size(stage.config[domain])]
        }
        image = batch["source"]["image"]
        batch["source"]["label"] = jax.ShapeDtypeStruct(image.shape[:3], jnp.uint8)
        batch["source"]["depth"] = jax.ShapeDtypeStruct(image.shape[:3], jnp.float32)
        tx = make_optimizer(stage.config)

        def start(model=model, method=method, tx=tx, stage=stage, batch=batch, image=image):
            variables = model.init(jax.random.key(0), jnp.zeros((1, *image.shape[1:])))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
            params, extra = method.init(jax.random.key(1), model=model, batch=zeros, config=stage.config, artifacts={})
            params = {"model": variables["params"], **params}
            return TrainState.create(params, tx, variables.get("batch_stats", {}), extra)

        before = jax.eval_shape(start)
        after, metrics = jax.eval_shape(make_step(method, model, tx, stage.config), before, batch)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), before)
        assert metrics["loss"].shape == ()
        assert sum(leaf.size for leaf in jax.tree.leaves(before.params)) > least


def _size(domain) -> tuple[int, int]:
    width, height = domain.crop or domain.resize or domain.fit
    return height, width
