"""Compiled programs kept between runs: read again, healed, bounded, and in nobody's way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxuda.training import compile_cache

# Prints whether programs came from the cache, the result's bits, and where they are kept.
PROGRAM = """
from jaxuda.cli import guarded

def work():
    import jax, jax.numpy as jnp
    from jaxuda.training.compile_cache import kept_programs

    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
    with kept_programs():
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        result = jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.arange(10000.0).reshape(100, 100) / 1e4)
    counts = [events.count(name) for name in ("cache_hits", "cache_misses")]
    print(*counts, float(result).hex(), jax.config.jax_compilation_cache_dir)

guarded(work)
"""


def run(home: Path, **more: str) -> tuple[list[str], str]:
    """The words of the program's output, and what it wrote to standard error."""
    left_out = ("JAX_COMPILATION", "JAX_PERSISTENT", "JAX_ENABLE", "TF_CPP", "XDG_CACHE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    environment |= {"XDG_CACHE_HOME": str(home), **more}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_second_run_reads_what_the_first_compiled(tmp_path: Path) -> None:
    (hits, misses, result, folder), quiet = run(tmp_path)
    assert int(hits) == 0 < int(misses) and quiet == ""
    assert Path(folder).parent == tmp_path / "jaxuda" / "programs"
    (warm_hits, warm_misses, again, _), quiet = run(tmp_path)
    assert (warm_hits, warm_misses, again) == (misses, "0", result) and quiet == ""

    for file in Path(folder).glob("*-cache"):
        file.write_bytes(file.read_bytes()[:20])
    (hits, _, healed, _), text = run(tmp_path)
    assert (hits, healed) == ("0", result)
    assert text.count("\n") == 1 and "JAX_ENABLE_COMPILATION_CACHE=false" in text
    assert run(tmp_path) == ([misses, "0", result, folder], "")


def test_turned_off_elsewhere_and_unusable(tmp_path: Path) -> None:
    (hits, misses, _, folder), quiet = run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert (hits, misses, folder, quiet) == ("0", "0", "None", "") and not list(tmp_path.iterdir())
    (_, misses, _, folder), _ = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert misses != "0" and folder == str(tmp_path / "mine") and not (tmp_path / "jaxuda").exists()
    (tmp_path / "jaxuda").write_text("a file where the folder should be")
    (hits, misses, _, folder), text = run(tmp_path)
    assert (hits, misses, folder) == ("0", "0", "None")
    assert text.startswith("compiled programs are not kept: ") and text.count("\n") == 1


def test_oldest_go_first(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "older", "oldest")):
        file = tmp_path / name / "program"
        file.parent.mkdir()
        file.write_bytes(bytes(10))
        os.utime(file, (1e9 - age, 1e9 - age))
    compile_cache.shrink(tmp_path, 25)
    assert sorted(file.parent.name for file in tmp_path.rglob("program")) == ["new", "older"]
    compile_cache.shrink(tmp_path, 0)
    assert not list(tmp_path.rglob("program"))


def test_other_processors_have_other_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    here = compile_cache._machine()
    assert here == compile_cache._machine()
    monkeypatch.setattr(compile_cache, "_processor", lambda: iter(["another"]))
    assert compile_cache._machine() != here
