"""Compiled programs are kept between runs: the same command starts sooner the second time.

JAX keeps them; here is chosen where. Its own variables go first: JAX_COMPILATION_CACHE_DIR is another folder,
JAX_ENABLE_COMPILATION_CACHE=false turns it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib

LIMIT = 2 * 1024**3  # bytes on the disk
_ADVICE = "JAX_COMPILATION_CACHE_DIR=DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false turns this off"


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """JAX reads and writes compiled programs in the user's cache folder; enter it before anything is compiled.

    If that does not work, one line on standard error says so, and programs are compiled as without the cache.
    """
    if not jax.config.jax_enable_compilation_cache:
        yield
        return
    own = None if jax.config.jax_compilation_cache_dir else _open_folder()
    if own:
        jax.config.update("jax_compilation_cache_dir", str(own))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with _reported_once(own):
        yield


def _open_folder() -> Path | None:
    """The folder of this machine, after a check that it can be written; None if it cannot, which is said."""
    try:
        folder = cache_folder() / _machine()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        shrink(cache_folder(), LIMIT)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        print(f"compiled programs are not kept: {error}. {_ADVICE}", file=sys.stderr)
        return None
    return folder


def cache_folder() -> Path:
    """Where the programs of all machines and versions are, each kind in a folder of its own."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxuda" / "programs"


def shrink(folder: Path, limit: int) -> None:
    """Removes the files that were written first until at most `limit` bytes are left.

    Another process may remove some at the same time.
    """
    found = []
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            state = file.stat()
            found += [(state.st_mtime, state.st_size, file)] if file.is_file() else []
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= limit:
            return
        file.unlink(missing_ok=True)
        total -= size


def _machine() -> str:
    """A name for this kind of machine and these versions; JAX's own keys do not hold the processor's features."""
    return hashlib.sha256("\n".join([jax.__version__, jaxlib.__version__, *_processor()]).encode()).hexdigest()[:16]


def _processor() -> Iterator[str]:
    yield from (platform.system(), platform.machine(), platform.processor())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        yield from sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})


@contextlib.contextmanager
def _reported_once(folder: Path | None) -> Iterator[None]:
    """Replaces JAX's warnings, one for each program that cannot be read or written, by a single line.

    A damaged program is removed from `folder`, since JAX replaces none.
    """
    show, said = warnings.showwarning, []

    def once(message: Warning | str, *where: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
        if "persistent compilation cache" not in text:
            show(message, *where, **more)
            return
        if folder and (damaged := re.search(r"Error reading .* entry for '(\w+)'", text)):
            for file in folder.glob(f"{damaged[1]}-*-cache"):
                file.unlink(missing_ok=True)
        if not said:
            said.append(text)
            print(f"compiled programs are not all kept: {text[:200]}. {_ADVICE}", file=sys.stderr)

    warnings.showwarning = once
    try:
        yield
    finally:
        warnings.showwarning = show
