"""Files that are complete or absent: written under a temporary name and renamed at the end.

A full or read-only disk is refused by a `UserError` with the path, and the bytes where known.
`describe_text` names what a failed download left in a file's place.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from pipeline.runtime.errors import UserError
from pipeline.runtime.signals import remove, unfinished

_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def _partial(path: Path) -> Path:
    """The temporary name beside `path`: on the same file system, and ignored by Git and DVC."""
    return path.with_name(f".{path.name}.partial")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems flush no folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _partial_output(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Create the folder, yield the temporary name, and remove what is left under it at the end.

    Args:
        needed: bytes, if known in advance.
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
            remove(partial)
            raise _disk_full(path, error, needed or written, exact=needed is not None) from None
        if error.errno in _READ_ONLY and _is_about_output(error, path, partial):
            raise UserError(
                f"`{_final_name(path)}` cannot be written ({error.strerror}); expected a writable "
                "folder. Make it writable and run again: nothing half-written is kept."
            ) from None
        raise
    finally:
        remove(partial)
        unfinished.discard(partial)


def _is_about_output(error: OSError, path: Path, partial: Path) -> bool:
    """Whether the error is about the output, and not about a file that is read for it."""
    if error.filename is None:
        return False
    name = Path(error.filename)
    return name in (path, partial, *path.parents) or partial in name.parents


def _disk_full(path: Path, error: OSError, needed: int, *, exact: bool) -> UserError:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    return UserError(
        f"`{_final_name(path)}` cannot be written ({error.strerror}). It needs "
        f"{'' if exact else 'more than '}{needed:,} bytes; {free:,} are free. Make room and run "
        "again: nothing half-written is kept."
    )


def _final_name(path: Path) -> Path:
    """The path without temporary names."""
    return Path(*(re.sub(r"^\.(.+)\.partial$", r"\1", part) for part in path.parts))


def write_bytes(path: Path | str, *parts: bytes | memoryview) -> None:
    """Write the parts to one file, flushed to disk. On failure, the file stays as it was."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"`{path}` is a folder; expected a file. Remove the folder and run again.")
    with _partial_output(path, sum(len(part) for part in parts)) as partial:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary directory, which replaces `path` on success; if that is a link, the
    folder to which it leads, but for one that is a disk of its own and cannot be replaced.

    On failure it is removed and `path` stays as it was.
    """
    path = Path(path)
    if path.is_symlink() and not os.path.ismount(path.resolve()):
        path = path.resolve()
    previous = path.with_name(f".{path.name}.previous.partial")
    with _partial_output(path) as partial:
        if previous.exists() and not path.exists():  # a run was killed between two renames
            os.replace(previous, path)
        for leftover in (partial, previous):  # of a run that was killed
            remove(leftover)
        partial.mkdir()
        yield partial
        for file in sorted(partial.rglob("*")):
            _flush(file)
        _flush(partial)
        if path.exists():
            os.replace(path, previous)
        try:
            os.replace(partial, path)
        except OSError:
            if previous.exists():
                os.replace(previous, path)
            raise
        _flush(path.parent)
        remove(previous)


def reserve(path: Path) -> None:
    """Allocate a file's size on disk before it is written through a memory map.

    A full disk would end the process by SIGBUS there, without a message.
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
        raise _disk_full(path, error, size, exact=True) from None


def canonical_json(value: Any) -> str:
    """Serialise for hashing: sorted keys, no spaces, so that equal values give equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_json(path: Path | str, value: Any) -> None:
    content = io.BytesIO()
    text = io.TextIOWrapper(content, "utf-8", newline="\n")
    json.dump(value, text, indent=2, ensure_ascii=False)  # piece by piece: a list may be long
    text.write("\n")
    text.detach()
    write_bytes(path, content.getbuffer())


def read_json(path: Path | str, *, produced_by: str) -> dict[str, Any]:
    """Read a JSON object that a stage wrote by the command `produced_by`. Refuses anything else."""
    if not Path(path).is_file():  # reading a device might never end
        raise UserError(f"`{path}` is absent. {recovery_hint(path, produced_by)}")
    try:
        content = from_json(Path(path).read_bytes(), allow_inf_nan=False)
        problem = f"it is a {type(content).__name__}"
    except (OSError, ValueError) as error:
        content, problem = None, str(error)
    if not isinstance(content, dict):
        raise UserError(
            f"`{path}` is not a JSON file with a mapping ({problem}). Remove it and run "
            f"`{produced_by}`."
        )
    return content


def recovery_hint(path: Path | str, produced_by: str) -> str:
    """Say how to restore an output: pulled clones may lack the inputs of `produced_by`."""
    return f"Run `dvc pull {path}` if a remote holds it, or `{produced_by}`."


def sha256_of_file(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


START_BYTES = 2048  # of a file, for `describe_text`

_AGAIN = (
    "The download failed, or needs a login or a confirmation: open the address in a browser, "
    "or use the client of the site."
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # characters of no text


def describe_text(start: bytes) -> str | None:
    """Say which text a file is, by its first bytes, and what to do; None for other bytes. Continues
    a sentence: a web page, ..."""
    if start.startswith(_LFS_POINTER):
        return (
            "a pointer of Git LFS, not the file that it stands for. Run `git lfs pull` where it "
            "was cloned, or download the file itself."
        )
    if start.startswith(b"\x80") or _CONTROL.search(start):
        return None
    text = " ".join(start.decode("utf-8-sig", "replace").split())
    if text.startswith("<") and re.search(r"<!doctype html|<(html|head|body)\b", text, re.I):
        title = re.search(r"<title>(.{1,100}?)</title>", text, re.IGNORECASE)
        return f"a web page (HTML{f', `{title[1]}`' if title else ''}). {_AGAIN}"
    if text.startswith("<"):
        return f"an XML page (`{text[:100]}`). {_AGAIN}"
    if text.startswith(("{", "[")):
        return f"a JSON text (`{text[:100]}`). {_AGAIN}"
    return f"a text (`{text[:100]}`). {_AGAIN}"
