"""Outputs that are complete or absent: written under a temporary name, put in place at the end."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


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
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `path`, on failure it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"`{path}` is a folder, where a file is to be written. Remove it.")
    partial = _partial(path)
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary directory; on success it becomes `path`, replacing what was there.

    On failure it is removed and `path` stays as it was.
    """
    path = Path(path)
    partial, previous = _partial(path), path.with_name(f".{path.name}.previous.partial")
    for leftover in (partial, previous):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            _flush(file)
        _flush(partial)
        if path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
        _flush(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces. The form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_json(path: Path | str, value: Any) -> None:
    with atomic_file(path) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)  # piece by piece: a list may be long
        file.write("\n")


def read_json(path: Path | str, *, made_by: str) -> dict[str, Any]:
    """A JSON file that a stage wrote.

    Raises:
        UserError: it is absent or is not a mapping in JSON; names the command that makes it.
    """
    if not Path(path).is_file():  # a device would be read without end
        raise UserError(f"`{path}` is absent. Run `{made_by}`.")
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a number may be too long, too
        raise UserError(
            f"`{path}` is not a JSON file ({error}). Remove it and run `{made_by}`."
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"`{path}` holds no mapping but a {type(content).__name__}. Remove it and run "
            f"`{made_by}`."
        )
    return content


def sha256_of_file(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
