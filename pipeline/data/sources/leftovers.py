"""Tell the images of a folder from what systems, cameras and annotation tools leave beside them.

Names decide about hidden files and the folders of systems; suffixes and first bytes about the other
files. A file that may be somebody's picture is never left out, also if it cannot be read here.
"""

import re
from functools import cache

from PIL import Image

from pipeline.data.prepared.image_decoding import FORMATS

HEAD_BYTES = 256  # of a file: what `is_picture` needs

#: With these, NAS boxes and systems begin the names of their folders.
_MARK = r"(?:[@#$~]|__)"
_SYSTEM_FOLDER = re.compile(
    rf"{_MARK}.*(?:eadir|recycle|snapshots?|trash|thumb(?:nail)?s?|macosx|pycache|te?mp)(?![a-z]).*"
    r"|lost\+found|recycler|found\.\d{3}"
    r"|system volume information|network trash folder|temporary items"
)
_MARKED = re.compile(rf"(?<![^/]){_MARK}[^/]*/")
#: Suffixes of what is no sample, whatever the bytes are: a camera's thumbnail, and files that a
#: program has not finished or keeps as the state before.
_UNFINISHED = re.compile(
    r"thm|te?mp|crdownload|part|partial|filepart|download|opdownload|bak|sw[op]|.*[~#]"
)
#: Suffixes of pictures, and of what holds pictures, beside those of FORMATS.
_NOT_READ = re.compile(
    r"hei[cf]s?|hif|jxl|dng|cr[23w]|nef|nrw|arw|sr[2fw]|raf|orf|rw2|pef|psd|tga|ico|exr|hdr|dcm|nii"
    r"|svg|eps|ai|pdf|mp4|m4v|mov|avi|mkv|webm|mpe?g|mts|m2ts|3gp|wmv|zip|rar|7z|tar|tgz|gz|bz2|xz"
)
#: The first bytes of images, also of those that are not read, of videos, and of PDF and EPS.
_PICTURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{4}\0\0\0\0|II[*+]\0|MM\0[*+]|II(?:RO|RS|U\0)"
    rb"|RIFF.{4}(?:WEBP|AVI )|.{4}ftyp|\0\0\0\x0c(?:jP  |JXL )|\xff\x4f\xff\x51|\xff\x0a"
    rb"|P[1-6]\s+[\d#]|P7\s|P[Ff]\s+\d|8BPS|FUJIFILM|.{128}DICM|%PDF|%!PS"
    rb"|\x1a\x45\xdf\xa3|\0\0\x01[\xba\xb3]",
    re.DOTALL,
)


def is_system_name(part: str, is_folder: bool) -> bool:
    """Recognise a hidden file or folder, and the folder of a system, by its name alone."""
    if part.startswith("."):
        return True
    return is_folder and _SYSTEM_FOLDER.fullmatch(part.casefold()) is not None


def marked_folders(name: str) -> list[str]:
    """The folders on the path to a file whose names begin as those of systems' folders do. They may
    be classes, too: `#1`, `@home`."""
    return [name[: match.end()] for match in _MARKED.finditer(name)]


def suffix_of(name: str) -> str:
    """The suffix of a path, in lower case, without its dot; empty if it has none."""
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.casefold() if stem else ""


def has_picture_suffix(name: str) -> bool:
    """Recognise a file of an image, or of what holds images, by its suffix."""
    suffix = suffix_of(name)
    return suffix in _suffixes_of_formats() or _NOT_READ.fullmatch(suffix) is not None


def is_picture(name: str, head: bytes) -> bool:
    """Recognise a file without such a suffix by its first HEAD_BYTES bytes."""
    return _PICTURE.match(head) is not None and not _UNFINISHED.fullmatch(suffix_of(name))


@cache
def _suffixes_of_formats() -> frozenset[str]:
    extensions = Image.registered_extensions()  # after `Image.init()`
    return frozenset(e.removeprefix(".") for e, name in extensions.items() if name in FORMATS)
