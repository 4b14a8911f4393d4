"""Outputs that are complete or absent: written under a temporary name, put in place at the end."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError
from pipeline.runtime.signals import unfinished

_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def _partial(path: Path) -> Path:
    """The temporary name beside `path`: the same file system, and ignored by Git and DVC."""
    return path.with_name(f".{path.name}.partial")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _in_the_making(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield the temporary name, in a folder that exists; nothing of that name is left at the end.

    Args:
        needed: bytes, where they are known before.

    Raises:
        UserError: the disk is full, or does not let itself be written.
    """
    partial = _partial(path)
    unfinished.add(partial)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except OSError as error:
        if error.errno in _FULL:
            files = [file for file in (partial, *partial.rglob("*")) if file.is_file()]
            written = sum(file.stat().st_size for file in files)
            _remove(partial)
            raise _no_room(path, error, needed or written, exact=needed is not None) from None
        if error.errno in _READ_ONLY and _concerns(error, path, partial):
            raise UserError(
                f"`{_shown(path)}` cannot be written ({error.strerror}); expected a folder that "
                "takes it. Make that writable and run again: nothing half-written is kept."
            ) from None
        raise
    finally:
        _remove(partial)
        unfinished.discard(partial)


def _concerns(error: OSError, path: Path, partial: Path) -> bool:
    """Whether it is about what is being written, and not about what is read for that."""
    if error.filename is None:
        return False
    name = Path(error.filename)
    return name in (path, partial, *path.parents) or partial in name.parents


def _no_room(path: Path, error: OSError, needed: int, *, exact: bool) -> UserError:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    return UserError(
        f"`{_shown(path)}` cannot be written ({error.strerror}). It needs "
        f"{'' if exact else 'more than '}{needed:,} bytes; {free:,} are free. Make room and run "
        "again: nothing half-written is kept."
    )


def _shown(path: Path | str) -> Path:
    """Under the names that it will have."""
    return Path(*(re.sub(r"^\.(.+)\.partial$", r"\1", part) for part in Path(path).parts))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # of a folder that cannot be written
            path.unlink()


def write_bytes(path: Path | str, *parts: bytes | memoryview) -> None:
    """Write a file, its parts one after another: whole and flushed to disk under its name, or not
    at all.

    Raises:
        UserError: the disk is full, or does not let itself be written, or a folder is in its place.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"`{path}` is a folder, where a file is to be written. Remove it.")
    with _in_the_making(path, sum(len(part) for part in parts)) as partial:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary directory; on success it becomes `path`, replacing what was there.

    On failure it is removed and `path` stays as it was.

    Raises:
        UserError: the disk is full, or does not let itself be written.
    """
    path = Path(path)
    previous = path.with_name(f".{path.name}.previous.partial")
    for leftover in (_partial(path), previous):  # of a run that was killed
        _remove(leftover)
    with _in_the_making(path) as partial:
        partial.mkdir()
        yield partial
        for file in sorted(partial.rglob("*")):
            _flush(file)
        _flush(partial)
        if path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
        _flush(path.parent)
        _remove(previous)


def reserve(path: Path) -> None:
    """Take the room that a file has by its size alone, before it is written through a memory map:
    there a full disk ends the process by SIGBUS, without a word.

    Raises:
        UserError: there is no such room.
    """
    size = path.stat().st_size
    try:
        with open(path, "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif size > shutil.disk_usage(path.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _no_room(path, error, size, exact=True) from None


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces. The form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_json(path: Path | str, value: Any) -> None:
    content = io.BytesIO()
    text = io.TextIOWrapper(content, "utf-8", newline="\n")
    json.dump(value, text, indent=2, ensure_ascii=False)  # piece by piece: a list may be long
    text.write("\n")
    text.detach()
    write_bytes(path, content.getbuffer())


def read_json(path: Path | str, *, produced_by: str) -> dict[str, Any]:
    """A JSON file that a stage wrote.

    Raises:
        UserError: it is absent or is not a mapping in JSON; names the command that makes it.
    """
    if not Path(path).is_file():  # a device would be read without end
        raise UserError(f"`{path}` is absent. {recovery_hint(path, produced_by)}")
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a number may be too long, too
        raise UserError(
            f"`{path}` is not a JSON file ({error}). Remove it and run `{produced_by}`."
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"`{path}` holds no mapping but a {type(content).__name__}. Remove it and run "
            f"`{produced_by}`."
        )
    return content


def recovery_hint(path: Path | str, produced_by: str) -> str:
    """How to have an output again: a clone that pulls may lack what the command runs on."""
    return f"Run `dvc pull {path}` if a remote holds it, or `{produced_by}`."


def sha256_of_file(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
