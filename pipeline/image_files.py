"""Files of an image folder or archive, listed by name and read in the order that is fast."""

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pipeline.errors import UserError

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_EXPECTED = "expected a folder, or a .tar, .tar.gz or .zip archive"


def list_files(root: Path) -> list[str]:
    """Names of all files below the root, `/`-separated and relative to it; hidden ones left out.

    Raises:
        UserError: the root is absent, or is no folder and no archive that can be read.
    """
    return [name for name, _ in _walk(root, read=False)]


def read_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Each file's name and content, in the root's own order: an archive is read once, in sequence.

    Raises:
        UserError: as `list_files`.
    """
    return _walk(root, read=True)


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
            if not any(part.startswith(".") or part == "__MACOSX" for part in parts):
                yield "/".join(parts), content
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"`{root}` (`dataset.root`) cannot be read ({error}).") from None


def _walk_folder(root: Path, read: bool) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield path.relative_to(root).as_posix(), path.read_bytes() if read else b""


def _walk_tar(root: Path, read: bool) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(root) as archive:
        for member in archive:
            if member.isreg():
                content = archive.extractfile(member).read() if read else b""
                yield member.name.removeprefix("./"), content


def _walk_zip(root: Path, read: bool) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(root) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield member.filename, archive.read(member) if read else b""
