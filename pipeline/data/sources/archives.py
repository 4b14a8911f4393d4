"""List and read the files of an image folder or archive, in its own order, without unpacking."""

import lzma
import os
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from pipeline.data.sources.leftovers import HEAD_BYTES, is_system_name
from pipeline.runtime.errors import UserError, first_line
from pipeline.runtime.files import START_BYTES, describe_text

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_EXPECTED = "expected a folder, or a .tar, .tar.gz or .zip archive"
LARGEST_FILE = 2**29  # bytes of the largest image that is read, uncompressed
_LARGEST_HEADER = 2**20  # bytes of a long name, or other metadata of a file in a tar
_HEADER_TYPES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_VOLUME_LABEL, _DUMPED_FOLDER = b"V", b"D"  # types of GNU tar: the latter of incremental archives
_CHUNK_BYTES = 2**20
_UTF_8 = 0x800  # flag of a member of a zip: its name is UTF-8
_UNICODE_PATH = 0x7075  # extra field of a member of a zip: its name in UTF-8, beside the raw name

ROOT = " (`dataset.root`)"
#: What reading an archive raises if it is damaged, encrypted, or compressed in an unknown way.
_DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(RuntimeError, NotImplementedError, ValueError, LookupError, ArithmeticError, struct.error),
)


def read_heads(
    root: Path, wanted: Callable[[str], bool] = lambda name: False, key: str = ROOT
) -> Iterator[tuple[str, bytes | None]]:
    """Yield the name of each file and folder below the root, with the head of each wanted file.

    Names are relative to the root and `/`-separated; a folder's name ends in `/`. What is hidden or
    in a system's folder is not looked at: an archive repeats the folder's name for each file in it.

    Args:
        key: what a message adds to the root's path: where it comes from.

    Raises:
        UserError: the root is absent, is not a folder or a readable archive, or contains a link to
            a folder, a device, a name outside the root or not in UTF-8, or too large a file.
    """
    return _walk(root, wanted, HEAD_BYTES, key)


def read_files(
    root: Path, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each wanted file, in one sequential pass through the root.

    Raises:
        UserError: as in `read_heads`.
    """
    return ((name, content) for name, content in _walk(root, wanted, -1) if content is not None)


#: The name of a file or folder, and the content if it is a wanted file.
Entries = Iterator[tuple[str, bytes | None]]


def _walk(root: Path, wanted: Callable[[str], bool], size: int, key: str = ROOT) -> Entries:
    """Walk through the root.

    Args:
        size: bytes to read of each wanted file; -1: all.
        key: as of `read_heads`.
    """
    if not root.exists():
        raise UserError(f"`{root}`{key} does not exist; {_EXPECTED}.")
    if not (root.is_dir() or (root.is_file() and root.name.casefold().endswith((*_TAR, ".zip")))):
        raise UserError(f"`{root}`{key} is a file of an unknown kind; {_EXPECTED}.")
    walk = _walk_folder if root.is_dir() else _walk_zip if is_zip(root) else _walk_tar
    try:
        yield from walk(root, wanted, size)
    except UserError as error:
        raise UserError(f"`{root}`{key} holds {error}") from None
    except _DAMAGED as error:
        raise UserError(f"`{root}`{key} {_why_unreadable(root, error)}") from None


def _why_unreadable(root: Path, error: Exception) -> str:
    if root.is_file():
        with root.open("rb") as file:
            start = file.read(START_BYTES)
        if not start:
            return f"is empty; {_EXPECTED}. Copy or download it again."
        if text := describe_text(start):
            return f"is no archive, but {text}"
        if is_zip(root) and start.startswith(b"PK") and not zipfile.is_zipfile(root):
            return "is a zip without its end: it is cut short. Copy or download it again."
    return f"cannot be read ({first_line(error).rstrip(':')})."


def check_end_of_tar(root: Path) -> None:
    """Refuse an uncompressed tar without its end mark, two blocks of zeros; reads no other byte."""
    with root.open("rb") as file:
        if root.suffix.casefold() == ".tar" and tarfile.is_tarfile(root):
            file.seek(max(0, root.stat().st_size - 2 * tarfile.BLOCKSIZE))
            if file.read().strip(b"\0"):
                raise UserError(
                    f"`{root}` (`dataset.root`) is a tar without its end mark: it is cut short, or "
                    "something follows. Copy or download it again."
                )


def is_zip(root: Path) -> bool:
    return root.suffix.casefold() == ".zip"


def _normalized(name: str, from_windows: bool = False) -> tuple[str, bool]:
    """Remove `.` and repeated `/` from a name; whether a system made it. Empty for the root itself.

    What is below a hidden name or a system's folder gets the name of that. Archives of Windows have
    `\\` between folders, and may have a drive's letter.

    Raises:
        UserError: it leads out of the root, or is not UTF-8.
    """
    if from_windows:
        name = re.sub(r"^(?:[A-Za-z]:[\\/]*|\\+)", "", name).replace("\\", "/")
    parts = PurePosixPath(name).parts
    if ".." in parts or name.startswith("/"):
        raise UserError(f"`{name}`, a name that leads out of it. Pack it from within its folder.")
    for count, part in enumerate(parts, 1):
        is_folder = count < len(parts) or name.endswith("/")
        if is_system_name(part, is_folder):
            return "/".join(parts[:count]) + "/" * is_folder, True
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode(errors="backslashreplace").decode()
        raise UserError(f"`{shown}`, a name that is not UTF-8. Rename it.") from None
    return "/".join(parts) + "/" * (bool(parts) and name.endswith("/")), False


def _check_size(name: str, size: int) -> None:
    if size > LARGEST_FILE:
        raise UserError(
            f"`{name}` of {size:,} bytes; expected at most {LARGEST_FILE:,} in a file. Remove it."
        )


_NOT_A_FILE = "not a file but a pipe, a socket or a device. Remove it."
_LINK = "a link. Pack the files themselves: `tar --dereference --hard-dereference`."


def _walk_folder(root: Path, wanted: Callable[[str], bool], size: int, prefix: str = "") -> Entries:
    """Walk in the order of the names; the names of one folder are in memory at a time."""
    with os.scandir(root / prefix) as iterator:
        entries = {entry.name + ("/" if entry.is_dir() else ""): entry for entry in iterator}
    for entry_name in sorted(entries):
        name, is_system = _normalized(prefix + entry_name)
        if is_system:
            yield name, None
            continue
        if problem := _problem_of(entries[entry_name]):
            raise UserError(f"`{name}`, {problem}")
        if name.endswith("/"):
            yield name, None
            yield from _walk_folder(root, wanted, size, name)
        elif wanted(name):
            with open(root / name, "rb") as file:
                if size < 0:
                    _check_size(name, os.fstat(file.fileno()).st_size)
                yield name, file.read(size)
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


def _walk_tar(root: Path, wanted: Callable[[str], bool], size: int) -> Entries:
    with tarfile.open(root, tarinfo=_Member) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep a kilobyte of each
            if member.size < 0:  # tarfile would seek the next member before this one
                raise tarfile.ReadError(f"`{member.name}` has {member.size} bytes")
            if member.type == _VOLUME_LABEL:
                continue
            is_folder = member.isdir() or member.type == _DUMPED_FOLDER
            name, is_system = _normalized(
                member.name + ("/" if is_folder else ""), "/" not in member.name
            )
            if is_system or not name:
                if name:
                    yield name, None
                continue
            if member.issym() or member.islnk():
                raise UserError(f"`{name}`, {_LINK}")
            if not (is_folder or member.isreg()):
                raise UserError(f"`{name}`, {_NOT_A_FILE}")
            _check_size(name, member.size)
            is_wanted = not is_folder and wanted(name)
            yield name, archive.extractfile(member).read(size) if is_wanted else None
        # To the end, so that the compression's checksum, if any, is verified.
        while rest := archive.fileobj.read(_CHUNK_BYTES):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is more data after its end mark")


def _walk_zip(root: Path, wanted: Callable[[str], bool], size: int) -> Entries:
    with zipfile.ZipFile(root) as archive:
        encoding = _encoding_of_names(archive)
        for member in archive.infolist():
            name = _name_of(member, encoding)
            name, is_system = _normalized(name, member.create_system == 0 or "/" not in name)
            if is_system or not name:
                if name:
                    yield name, None
                continue
            if stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"`{name}`, a link. Pack the files themselves.")
            if member.flag_bits & 1:
                raise UserError(f"`{name}`, which is encrypted. Pack it without a password.")
            _check_size(name, member.file_size)
            content = None
            if not name.endswith("/") and wanted(name):
                with archive.open(member) as file:
                    content = file.read(size)
            yield name, content


def names_encoding(root: Path) -> str:
    """The encoding of a zip's names that do not say theirs; empty if there are none.

    Raises:
        UserError: as in `read_heads`.
    """
    try:
        with zipfile.ZipFile(root) as archive:
            return _encoding_of_names(archive)
    except _DAMAGED as error:
        raise UserError(
            f"`{root}` (`dataset.root`) cannot be read ({first_line(error)})."
        ) from None


def _encoding_of_names(archive: zipfile.ZipFile) -> str:
    """Choose the encoding of the names of a zip that do not say theirs; empty if all do.

    It is UTF-8, which macOS does not declare, if the bytes are that; else cp437, western Windows,
    if they are letters of it, or cp932, Japanese Windows, if they are letters of that.
    """
    raw = {_raw_name(m) for m in archive.infolist() if not (_is_plain(m) or _stated_name(m))}
    if not raw:
        return ""
    for encoding in ("utf-8", "cp437", "cp932"):
        try:
            letters = {c for name in raw for c in name.decode(encoding) if not c.isascii()}
        except UnicodeDecodeError:
            continue
        if encoding == "utf-8" or all(unicodedata.category(c)[0] in "LM" for c in letters):
            return encoding
    return "cp437"


def _is_plain(member: zipfile.ZipInfo) -> bool:
    """Whether zipfile reads the raw name rightly: it is ASCII, or says that it is UTF-8."""
    return bool(member.flag_bits & _UTF_8) or member.orig_filename.isascii()


def _raw_name(member: zipfile.ZipInfo) -> bytes:
    """The bytes of a name without the flag of UTF-8, which zipfile decodes by cp437. Since Python
    3.12, only `orig_filename` is made of these: `filename` may be the name of the extra field."""
    return member.orig_filename.encode("cp437")


def _stated_name(member: zipfile.ZipInfo) -> str:
    """The name in the extra field, if that is of this raw name; else empty. A raw name may be a
    stand-in, `?` for each letter (Info-ZIP; APPNOTE.TXT of PKWARE, 4.6.9)."""
    extra = b"" if member.flag_bits & _UTF_8 else member.extra
    while len(extra) > 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        of_this_name = struct.pack("<BL", 1, zlib.crc32(_raw_name(member)))
        if kind == _UNICODE_PATH and field.startswith(of_this_name):
            return field.removeprefix(of_this_name).decode()
    return ""


def _name_of(member: zipfile.ZipInfo, encoding: str) -> str:
    name = _stated_name(member) or (
        member.orig_filename if _is_plain(member) else _raw_name(member).decode(encoding)
    )
    return name.partition("\0")[0]
