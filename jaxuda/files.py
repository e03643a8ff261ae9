"""Files that are either complete or missing: atomic writes, checksums, and the lock of a work folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxuda.errors import UserError


def user_path(text: str | os.PathLike) -> Path:
    """A path of the user's; shells leave the "~" of --NAME=~/FOLDER to the command, also that of an unknown user."""
    return Path(os.path.expanduser(text))


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` in one step: readers see either the old content or the whole new content."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def inside(folder: Path, name: str) -> Path:
    """The file `name` in a folder; raises UserError if a name from a dataset would lead anywhere else."""
    if not name or name.startswith(".") or set(name) & set("/\\\0") or len(name.encode(errors="replace")) > 240:
        raise UserError(f"{ascii(name)[:200]} cannot be the name of a file in {folder}: give the image another name")
    return folder / name


def visible(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones; a link to a folder is listed, but not followed."""
    if folder.is_symlink():
        return [folder / entry for entry in sorted(os.listdir(folder)) if not entry.startswith(".")]
    found = []
    for top, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(top, name))]
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(top, name) for name in names + links if not name.startswith(".")]
    return sorted(found)


def remove_temporaries(folder: Path) -> None:
    """Removes the temporary files of killed runs from a folder to which no other process writes."""
    for aside in folder.rglob(".*.tmp"):
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON in `path`, or None if there is no such file; raises UserError if it is corrupt."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is corrupt ({error}): delete it, then run the same command again") from error


def read_json_lines(path: Path) -> list[dict]:
    """One object per line; lines that a killed run left unfinished are dropped."""
    rows = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """Replaces `path` by one line per row, atomically."""
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_json_line(path: Path, row: dict) -> None:
    """Appends one line; it starts on a new line even if a killed run left an unfinished one."""
    with open(path, "ab+") as file:
        start = b"\n" if file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n" else b""
        file.write(start + json.dumps(row).encode() + b"\n")


def sha256(path: Path) -> str:
    """Checksum of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Relative path -> checksum of every file in a folder; empty if the folder does not exist."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in found}


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Locks a work folder for this process; the system releases the lock when the process ends for any reason.

    Raises:
      UserError: another process holds the lock (its pid and host are named), or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115 (closed below, after the lock)
    except OSError as error:
        raise UserError(
            f"the work folder {folder} cannot be written ({error.strerror}): choose another with --workdir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"the work folder {folder} is in use by {file.read().strip() or 'another process'}: "
                "wait for it, stop it, or choose another with --workdir"
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
