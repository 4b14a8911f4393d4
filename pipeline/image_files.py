"""Files of an image folder or archive, listed by name and read in the order that is fast."""

import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pipeline.errors import UserError

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_EXPECTED = "expected a folder, or a .tar, .tar.gz or .zip archive"


def list_names(root: Path) -> list[str]:
    """Names of all files and folders below the root, relative to it, `/`-separated; a folder's
    ends in `/`. Hidden ones are left out.

    Raises:
        UserError: the root is absent, or is no folder and no archive that can be read.
    """
    return [name for name, _ in _walk(root, read=False)]


def read_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Each file's name and content, in the root's own order: an archive is read once, in sequence.

    Raises:
        UserError: as `list_names`.
    """
    return ((name, content) for name, content in _walk(root, read=True) if name[-1] != "/")


def _walk(root: Path, *, read: bool) -> Iterator[tuple[str, bytes]]:
    if root.is_dir():
        walk = _walk_folder
    elif not root.exists():
        raise UserError(f"`{root}` (`dataset.root`) does not exist; {_EXPECTED}.")
    elif root.name.endswith(_TAR):
        walk = _walk_tar
    elif root.suffix == ".zip":
        walk = _walk_zip
    else:
        raise UserError(f"`{root}` (`dataset.root`) is a file of another kind; {_EXPECTED}.")
    try:
        for name, content in walk(root, read):
            parts = PurePosixPath(name).parts
            if parts and not any(part.startswith(".") or part == "__MACOSX" for part in parts):
                yield "/".join(parts) + ("/" if name.endswith("/") else ""), content
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"`{root}` (`dataset.root`) cannot be read ({error}).") from None


def _walk_folder(root: Path, read: bool, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """In the order of the names as texts; one folder's names are in memory at a time."""
    with os.scandir(root / prefix) as entries:
        names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in entries)
    for name in names:
        path = root / prefix / name
        if not name.endswith("/"):
            yield prefix + name, path.read_bytes() if read else b""
            continue
        yield prefix + name, b""
        if not path.is_symlink():
            yield from _walk_folder(root, read, prefix + name)


def _walk_tar(root: Path, read: bool) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(root) as archive:
        while (member := archive.next()) is not None:
            if member.isdir():
                yield f"{member.name}/", b""
            elif member.isreg():
                yield member.name, archive.extractfile(member).read() if read else b""
            archive.members.clear()  # else it keeps a kilobyte of each


def _walk_zip(root: Path, read: bool) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(root) as archive:
        for member in archive.infolist():
            yield member.filename, archive.read(member) if read else b""
