"""Eight fake CPU devices, a compile cache that all tests share, and fixtures that several files use."""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports jax.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
_CACHE = Path(tempfile.gettempdir()) / f"jaxuda-tests-{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # drawing weights compiles many small programs
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most tests spend most of their time on compiling, and this halves it. With 0 all are compiled as for users.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# On some processors XLA complains of every program that it loads from the cache, by kilobytes (jax issue 38445): they
# would fill the pipes of processes whose standard error is read only at their end.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, default=20, help="faults that tests/faults tries (default: 20)")
    parser.addoption("--fault_seed", type=int, default=0, help="decides which ones, and when they strike")
    parser.addoption("--examples", type=int, default=20, help="changed files that test_bad_input.py tries")


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes are named as a user in the repository names them."""
    monkeypatch.chdir(Path(__file__).parents[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny source and target, as `tiny.arguments` takes them."""
    import tiny

    return tiny.prepare_domains(tmp_path_factory.mktemp("data"))


@pytest.fixture
def all_optimizations() -> Iterator[None]:
    """Programs are compiled as for users; for tests of losses, trajectories, order and memory."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_code():
    """Clears compiled code: for eight devices it grows to gigabytes over a whole session."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
