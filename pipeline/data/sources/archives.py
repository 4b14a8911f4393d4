"""List and read the files of an image folder or archive, in its own order, without unpacking."""

import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from pipeline.runtime.errors import UserError, first_line

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_EXPECTED = "expected a folder, or a .tar, .tar.gz or .zip archive"
LARGEST_FILE = 2**29  # bytes of the largest image that is read, uncompressed
_LARGEST_HEADER = 2**20  # bytes of a long name, or other metadata of a file in a tar
_HEADER_TYPES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_CHUNK_BYTES = 2**20

#: What reading an archive raises if it is damaged, encrypted, or compressed in an unknown way.
_DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(RuntimeError, NotImplementedError, ValueError, LookupError, ArithmeticError, struct.error),
)


def names_in(root: Path) -> Iterator[str]:
    """Yield the names of all files and folders below the root, except hidden ones.

    Names are relative to the root and `/`-separated; a folder's name ends in `/`.

    Raises:
        UserError: the root is absent, is not a folder or a readable archive, or contains a link to
            a folder, a device, a name outside the root or not in UTF-8, or too large a file.
    """
    return (name for name, _ in _walk(root, lambda name: False))


def read_files(
    root: Path, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each wanted file, in one sequential pass through the root.

    Raises:
        UserError: as in `names_in`.
    """
    return ((name, content) for name, content in _walk(root, wanted) if content is not None)


#: The name of a file or folder, and the content if it is a wanted file.
Entries = Iterator[tuple[str, bytes | None]]


def _walk(root: Path, wanted: Callable[[str], bool]) -> Entries:
    if not root.exists():
        raise UserError(f"`{root}` (`dataset.root`) does not exist; {_EXPECTED}.")
    if not (root.is_dir() or (root.is_file() and root.name.endswith((*_TAR, ".zip")))):
        raise UserError(f"`{root}` (`dataset.root`) is a file of an unknown kind; {_EXPECTED}.")
    walk = _walk_folder if root.is_dir() else _walk_zip if root.suffix == ".zip" else _walk_tar
    try:
        yield from walk(root, wanted)
    except UserError as error:
        raise UserError(f"`{root}` (`dataset.root`) holds {error}") from None
    except _DAMAGED as error:
        reason = first_line(error).rstrip(":")
        raise UserError(f"`{root}` (`dataset.root`) cannot be read ({reason}).") from None


def _normalized(name: str) -> str | None:
    """Remove `.` and repeated `/` from a name; None if it is hidden.

    Raises:
        UserError: it leads out of the root, or is not UTF-8.
    """
    parts = PurePosixPath(name).parts
    if ".." in parts or name.startswith("/"):
        raise UserError(f"`{name}`, a name that leads out of it. Pack it from within its folder.")
    if not parts or any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return None
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode(errors="backslashreplace").decode()
        raise UserError(f"`{shown}`, a name that is not UTF-8. Rename it.") from None
    return "/".join(parts) + ("/" if name.endswith("/") else "")


def _check_size(name: str, size: int) -> None:
    if size > LARGEST_FILE:
        raise UserError(
            f"`{name}` of {size:,} bytes; expected at most {LARGEST_FILE:,} in a file. Remove it."
        )


_NOT_A_FILE = "not a file but a pipe, a socket or a device. Remove it."
_LINK = "a link. Pack the files themselves: `tar --dereference --hard-dereference`."


def _walk_folder(root: Path, wanted: Callable[[str], bool], prefix: str = "") -> Entries:
    """Walk in the order of the names; the names of one folder are in memory at a time."""
    with os.scandir(root / prefix) as iterator:
        entries = {entry.name + ("/" if entry.is_dir() else ""): entry for entry in iterator}
    for entry_name in sorted(entries):
        name = _normalized(prefix + entry_name)
        if not name:
            continue
        if problem := _problem_of(entries[entry_name]):
            raise UserError(f"`{name}`, {problem}")
        if name.endswith("/"):
            yield name, None
            yield from _walk_folder(root, wanted, name)
        elif wanted(name):
            path = root / name
            _check_size(name, path.stat().st_size)
            yield name, path.read_bytes()
        else:
            yield name, None


def _problem_of(entry: os.DirEntry) -> str:
    """Describe an entry that is neither a folder, a file nor a link to a file; empty for those."""
    if entry.is_dir() and entry.is_symlink():
        return "a link to a folder, which DVC does not follow. Move the folder here."
    if entry.is_dir() or entry.is_file():
        return ""
    return "a link to nothing. Remove it." if entry.is_symlink() else _NOT_A_FILE


class _Member(tarfile.TarInfo):
    """A member of a tar. Raises on a damaged header, which tarfile takes for the end of the tar."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise  # the end mark
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is damaged, or a part is missing: {error}") from None

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _HEADER_TYPES and member.size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header claims {member.size:,} bytes")
        return member


def _walk_tar(root: Path, wanted: Callable[[str], bool]) -> Entries:
    with tarfile.open(root, tarinfo=_Member) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep a kilobyte of each
            if member.size < 0:  # tarfile would seek the next member before this one
                raise tarfile.ReadError(f"`{member.name}` has {member.size} bytes")
            name = _normalized(member.name + ("/" if member.isdir() else ""))
            if not name:
                continue
            if member.issym() or member.islnk():
                raise UserError(f"`{name}`, {_LINK}")
            if not (member.isdir() or member.isreg()):
                raise UserError(f"`{name}`, {_NOT_A_FILE}")
            _check_size(name, member.size)
            is_wanted = not member.isdir() and wanted(name)
            yield name, archive.extractfile(member).read() if is_wanted else None
        # To the end, so that the compression's checksum, if any, is verified.
        while rest := archive.fileobj.read(_CHUNK_BYTES):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is more data after its end mark")


def _walk_zip(root: Path, wanted: Callable[[str], bool]) -> Entries:
    with zipfile.ZipFile(root) as archive:
        for member in archive.infolist():
            name = _normalized(member.filename)
            if not name:
                continue
            if stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"`{name}`, a link. Pack the files themselves.")
            if member.flag_bits & 1:
                raise UserError(f"`{name}`, which is encrypted. Pack it without a password.")
            _check_size(name, member.file_size)
            is_wanted = not member.is_dir() and wanted(name)
            yield name, archive.read(member) if is_wanted else None
