"""List what may be images in a folder or archive, and count what is left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.sources.archives import ROOT, read_heads
from pipeline.data.sources.leftovers import (
    has_picture_suffix,
    is_picture,
    is_system_name,
    marked_folders,
    suffix_of,
)

_KINDS_SHOWN = 8


@dataclass(frozen=True)
class Listing:
    """The names below a root, relative to it; those of folders end in `/`."""

    files: Sequence[str]  # that may be images, in the root's own order
    folders: set[str]
    left_out: Mapping[str, int]  # what is no sample: its kind, and how many of it
    partly: set[str]  # the folders with something that is left out
    copies: Mapping[str, int]  # how often each name of a file is there: an archive may repeat it


def list_images(root: Path, key: str = ROOT) -> Listing:
    """List the files below a root that may be images.

    Args:
        key: as of `archives.read_heads`.

    Raises:
        UserError: as in `archives.read_heads`.
    """
    files, folders, left_out = [], set(), {}  # left out: name -> kind
    copies = Counter()
    for name, head in read_heads(root, lambda name: not has_picture_suffix(name), key):
        copies[name] += 1
        if is_system_name(_last(name), name.endswith("/")):
            left_out[name] = _kind_of_system(name)
        elif name.endswith("/"):
            folders.add(name)
        elif head is None or is_picture(name, head):
            files.append(name)
        else:
            left_out[name] = _kind(name)
    marked = _marked_systems(files)
    kept = [name for name in files if not name.startswith(marked)]
    if marked and kept:  # else it is a folder around all others
        left_out |= {name: _kind_of_system(name) for name in marked}
        folders = {name for name in folders if not name.startswith(marked)}
        files = kept
    partly = {name.removesuffix("/").rpartition("/")[0] + "/" for name in left_out}
    return Listing(files, folders, Counter(left_out.values()), partly, copies)


def _marked_systems(files: Sequence[str]) -> tuple[str, ...]:
    """The folders with a system's mark that hold images, but none directly, as a class would."""
    marked, direct = set(), set()
    for name in files:
        if found := marked_folders(name):
            marked.update(found)
            direct.add(name.rpartition("/")[0] + "/")
    return tuple(sorted(marked - direct))


def _last(name: str) -> str:
    return name.removesuffix("/").rpartition("/")[2]


def _kind(name: str) -> str:
    suffix = suffix_of(name)
    return f"`.{_printable(suffix)}`" if suffix else "without suffix"


def _kind_of_system(name: str) -> str:
    return "`._*`" if _last(name).startswith("._") else f"`{_printable(_last(name))}`"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Name the kinds with their numbers, the most frequent first; empty if there are none."""
    ranked = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {kind}" for kind, count in ranked[:_KINDS_SHOWN]]
    rest = sum(count for _, count in ranked[_KINDS_SHOWN:])
    return ", ".join([*shown, *([f"{rest:,} others"] if rest else [])])
