"""Files of an image folder or archive, listed by name and read in the order that is fast."""

import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from pipeline.runtime.errors import UserError

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_EXPECTED = "expected a folder, or a .tar, .tar.gz or .zip archive"
LARGEST_FILE = 2**29  # bytes: the largest image that is read takes as many, uncompressed
_LARGEST_HEADER = 2**20  # bytes of a long name, or of what else a tar says of a file
_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_READ_AT_ONCE = 2**20

#: What reading an archive raises where it is damaged, encrypted, or packed in an unknown way.
_DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(RuntimeError, NotImplementedError, ValueError, LookupError, ArithmeticError, struct.error),
)


def check_kind(root: Path) -> None:
    """Raises: UserError: the root is absent, or neither a folder nor an archive by its name."""
    if not root.exists():
        raise UserError(f"`{root}` (`dataset.root`) does not exist; {_EXPECTED}.")
    if not (root.is_dir() or (root.is_file() and root.name.endswith((*_TAR, ".zip")))):
        raise UserError(f"`{root}` (`dataset.root`) is a file of another kind; {_EXPECTED}.")


def names_in(root: Path) -> Iterator[str]:
    """Names of all files and folders below the root, relative to it, `/`-separated; a folder's
    ends in `/`. Hidden ones are left out. Nothing is unpacked.

    Raises:
        UserError: the root is absent, is no folder and no archive that can be read, or holds a link
            to a folder, what is no file, a name that leads out of it or is no text, or too large a
            file.
    """
    return (name for name, _ in _walk(root, lambda name: False))


def read_files(
    root: Path, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, bytes]]:
    """The name and content of each file that is wanted, in the root's own order: an archive is read
    once, in sequence.

    Raises:
        UserError: as `names_in`.
    """
    return ((name, content) for name, content in _walk(root, wanted) if content is not None)


#: A file's or folder's name, and the content of a file that is wanted.
Entries = Iterator[tuple[str, bytes | None]]


def _walk(root: Path, wanted: Callable[[str], bool]) -> Entries:
    check_kind(root)
    walk = _walk_folder if root.is_dir() else _walk_zip if root.suffix == ".zip" else _walk_tar
    try:
        yield from walk(root, wanted)
    except UserError as error:
        raise UserError(f"`{root}` (`dataset.root`) holds {error}") from None
    except _DAMAGED as error:
        said = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        raise UserError(f"`{root}` (`dataset.root`) cannot be read ({said}).") from None


def _plain(name: str) -> str | None:
    """A name without `.` and with single `/`; None for one that is hidden.

    Raises:
        UserError: it leads out of the root, or is no text.
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


_NO_FILE = "no file but a pipe, a socket or a device. Remove it."
_LINK = "a link. Pack the files themselves: `tar --dereference --hard-dereference`."


def _walk_folder(root: Path, wanted: Callable[[str], bool], prefix: str = "") -> Entries:
    """In the order of the names as texts; one folder's names are in memory at a time."""
    with os.scandir(root / prefix) as entries:
        found = {entry.name + ("/" if entry.is_dir() else ""): entry for entry in entries}
    for entry_name in sorted(found):
        name = _plain(prefix + entry_name)
        if not name:
            continue
        if problem := _oddity(found[entry_name]):
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


def _oddity(entry: os.DirEntry) -> str:
    """What it is, where it is neither a folder nor a file or a link to one."""
    if entry.is_dir():
        return (
            "a link to a folder, into which DVC does not look. Move it here."
            if entry.is_symlink()
            else ""
        )
    if entry.is_file():
        return ""
    return "a link to nothing. Remove it." if entry.is_symlink() else _NO_FILE


class _Member(tarfile.TarInfo):
    """A member of a tar whose headers must all be sound: tarfile takes a damaged one for the end,
    and leaves out the rest."""

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
        if member.type in _HEADERS and member.size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes is none")
        return member


def _walk_tar(root: Path, wanted: Callable[[str], bool]) -> Entries:
    with tarfile.open(root, tarinfo=_Member) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # else it keeps a kilobyte of each
            if member.size < 0:  # and the next would be looked for before this one
                raise tarfile.ReadError(f"`{member.name}` has {member.size} bytes")
            name = _plain(member.name + ("/" if member.isdir() else ""))
            if not name:
                continue
            if member.issym() or member.islnk():
                raise UserError(f"`{name}`, {_LINK}")
            if not (member.isdir() or member.isreg()):
                raise UserError(f"`{name}`, {_NO_FILE}")
            _check_size(name, member.size)
            is_wanted = not member.isdir() and wanted(name)
            yield name, archive.extractfile(member).read() if is_wanted else None
        while rest := archive.fileobj.read(_READ_AT_ONCE):  # to its checksum, if it has one
            if rest.strip(b"\0"):
                raise tarfile.ReadError("it goes on after its end mark")


def _walk_zip(root: Path, wanted: Callable[[str], bool]) -> Entries:
    with zipfile.ZipFile(root) as archive:
        for member in archive.infolist():
            name = _plain(member.filename)
            if not name:
                continue
            if stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"`{name}`, a link. Pack the files themselves.")
            if member.flag_bits & 1:
                raise UserError(f"`{name}`, which is encrypted. Pack it without a password.")
            _check_size(name, member.file_size)
            is_wanted = not member.is_dir() and wanted(name)
            yield name, archive.read(member) if is_wanted else None
