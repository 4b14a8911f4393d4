"""Find the splits and the classes among the folders of an image folder.

The names of splits are those that Hugging Face's `datasets` reads, in any case, with or without the
words of `_FILLERS`, digits and separators: `train`, `Training`, `test_set`, `images-val2017`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.data.sources.image_reading import LISTED
from pipeline.data.sources.splits import TEST, TRAIN, VALIDATION
from pipeline.runtime.errors import UserError, counted

_UNLABELLED = "unlabeled"
_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
    _UNLABELLED: ("unlabeled", "unlabelled"),
}
_SPLITS = {"train": TRAIN, "val": VALIDATION, "test": TEST, _UNLABELLED: TRAIN}
_PART_OF = {word: part for part, words in _WORDS.items() for word in words}
_FILLERS = ("set", "data", "dataset", "split", "folder", "images", "image", "imgs", "img")
_PART_NAME = re.compile(rf"({'|'.join(_PART_OF)})(?:{'|'.join(_FILLERS)})?")
_EXPECTED = "expected `train/<class>/<image>`, and `val/`, `test/` and `unlabeled/` if there"


class Place(NamedTuple):
    """What the images of a folder are."""

    split: int  # index into SPLITS
    class_name: str  # empty: unlabelled


@dataclass(frozen=True)
class Layout:
    prefix: str  # the folders around all others, with the last `/`; ids lack it
    places: Mapping[str, Place]  # of each folder, as in an id, whose images are read
    parts: Mapping[str, str]  # train, val, test or unlabeled -> its folder; empty: there are none
    class_names: list[str]  # of train, ascending

    def inner_folders(self) -> dict[str, list[str]]:
        """The folders with images within each class folder of train, ascending; empty if one of
        the class folders has images itself: then the class folders are the classes."""
        depth = 2 if self.parts else 1  # of a class folder
        inner: dict[str, set[str]] = {}
        for folder, place in self.places.items():
            if place.split == TRAIN and place.class_name:
                inner.setdefault(place.class_name, set()).add(folder.split("/")[depth])
        if any("" in folders for folders in inner.values()):
            return {}
        return {name: sorted(folders) for name, folders in sorted(inner.items())}


def part_of(folder: str) -> str | None:
    """Return `train`, `val`, `test` or `unlabeled` for a folder's name, or None."""
    words = [word for word in _words(folder) if word not in _FILLERS]
    match = _PART_NAME.fullmatch(words[0]) if len(words) == 1 else None
    return _PART_OF[match[1]] if match else None


def _words(folder: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", folder.casefold())


def find_layout(counts: Mapping[str, int], folders: Iterable[str], partly: set[str]) -> Layout:
    """Find the layout of an image folder.

    Args:
        counts: how many images each folder holds directly; folders end in `/`, the root is `/`.
        folders: all folders, of which some may have no image.
        partly: the folders with files that are no images.

    Raises:
        UserError: there is no training class, or a folder could be read in more than one way.
    """
    prefix = _wrapping(counts)
    inside = {f.removeprefix(prefix): n for f, n in counts.items() if f.startswith(prefix)}
    inside = {folder: count for folder, count in inside.items() if folder.strip("/")}
    below: dict[str, set[str]] = {}  # top folder -> the names of the folders in it, with images
    for folder in inside:
        top, _, rest = folder.partition("/")
        below.setdefault(top, set()).update({rest.partition("/")[0]} - {""})
    if parts := _parts(sorted(below)):
        places = _places_in_parts(inside, parts)
        class_names = sorted({p.class_name for p in places.values() if p.split == TRAIN} - {""})
        problem = _problem_of_parts(inside, below, parts, class_names)
    else:
        places = {f: Place(TRAIN, f.partition("/")[0]) for f in inside}
        class_names = sorted(below)
        problem = _problem_of_flat(inside, below)
    if problem:
        raise UserError(problem)
    listed = {f.removeprefix(prefix) for f in folders if f.startswith(prefix)} - {""}
    partly = {f.removeprefix(prefix).partition("/")[0] for f in partly if f.startswith(prefix)}
    if empty := _without_images(listed, places, parts, partly):
        raise UserError(f"class folders without images: {quoted(empty)}. Fill or remove them.")
    return Layout(prefix, places, parts, class_names)


def _wrapping(counts: Mapping[str, int]) -> str:
    """The folders that hold all others, one in another: `pets/`, `a/b/`; may be empty."""
    prefix = ""
    while True:
        inside = [f.removeprefix(prefix) for f in counts if f != "/" and f.startswith(prefix)]
        tops = {folder.partition("/")[0] for folder in inside if folder}
        top = next(iter(tops), "")
        if len(tops) != 1 or f"{prefix}{top}/" in counts:
            return prefix
        second = {part_of(folder.split("/")[1]) for folder in inside if folder.count("/") > 1}
        # `test_data/train/<class>/` wraps; `train/train/` is a class, of pictures of trains.
        if part_of(top) and (part_of(top) in ("train", _UNLABELLED) or "train" not in second):
            return prefix
        prefix += f"{top}/"


def _parts(tops: list[str]) -> dict[str, str]:
    parts: dict[str, str] = {}
    for top in tops:
        part = part_of(top)
        if part in parts:
            raise UserError(
                f"two folders for one split, `{parts[part]}/` and `{top}/`: both are read as "
                f"`{part}/`. Move the images of one into the other, or remove it."
            )
        if part:
            parts[part] = top
    return parts


def _places_in_parts(inside: Mapping[str, int], parts: Mapping[str, str]) -> dict[str, Place]:
    part_of_top, places = {top: part for part, top in parts.items()}, {}
    for folder in inside:
        top, _, rest = folder.partition("/")
        part, class_name = part_of_top.get(top), rest.partition("/")[0]
        if part == _UNLABELLED:
            places[folder] = Place(TRAIN, "")
        elif part and class_name:
            places[folder] = Place(_SPLITS[part], class_name)
    return places


def _problem_of_parts(
    inside: Mapping[str, int],
    below: Mapping[str, set[str]],
    parts: Mapping[str, str],
    class_names: Sequence[str],
) -> str:
    """Describe training images without class folders, unlabelled ones as a class, or an unknown
    split; empty if all is well."""
    train = f"{parts.get('train')}/"
    if not class_names and train in inside:
        return (
            f"{counted(inside[train], 'image')} directly in `{train}`; expected a folder for each "
            f"class, `{train}<class>/<image>`. Move each class's images into a folder of its name."
        )
    if not class_names:
        return (
            f"no `train/<class>/<image>`; found {quoted(sorted(below))}. Put the class folders of "
            "the training images into `train/`."
        )
    if unlabelled := next((name for name in class_names if part_of(name) == _UNLABELLED), None):
        return (
            f"`{train}{unlabelled}/`, which would be a class; expected unlabelled images in a "
            f"folder beside `{train}`. Move it there, or rename it."
        )
    known = {name.casefold() for name in class_names}
    for top in sorted(below.keys() - parts.values()):
        if shared := sorted(name for name in below[top] if name.casefold() in known):
            return (
                f"`{top}/`, with folders of classes as `{train}` ({quoted(shared)}), which is no "
                "split by its name; expected `train/`, `val/`, `test/` and `unlabeled/`. Rename it "
                "to the one that it is, or move it out of the root."
            )
    return ""


def _problem_of_flat(inside: Mapping[str, int], below: Mapping[str, set[str]]) -> str:
    """Describe why the top folders cannot be the classes of `train/`; empty if they can."""
    if not below:
        return f"no folder with images; {_EXPECTED}."
    for top in sorted(below):
        if _words(top) and not {*_words(top)} - {*_FILLERS}:
            return f"`{top}/` beside other folders with images; {_EXPECTED}. Move or rename it."
    named = {top: {_PART_OF[word] for word in _words(top) if word in _PART_OF} for top in below}
    if len(set().union(*named.values())) > 1:
        tops = quoted(sorted(f"{top}/" for top in named if named[top]))
        return f"folders that may be splits or classes, {tops}; {_EXPECTED}. Rename them."
    owner: dict[str, str] = {}  # a folder's name -> the top folder that has it
    for top in sorted(top for top in below if f"{top}/" not in inside):
        for name in sorted(below[top]):
            if part_of(name):
                return (
                    f"`{top}/{name}/` beside other folders with images; {_EXPECTED}. Move "
                    f"`{name}/` to the top, or set `dataset.root` to the folder that holds it."
                )
            if name in owner:
                other = owner[name]
                return (
                    f"`{other}/{name}/` and `{top}/{name}/`: `{other}/` and `{top}/` may be splits "
                    f"or classes; {_EXPECTED}. Rename splits; move classes into `train/`."
                )
            owner[name] = top
    return ""


def _without_images(
    listed: set[str],
    places: Mapping[str, Place],
    parts: Mapping[str, str],
    partly: set[str],
) -> list[str]:
    """The class folders without an image, ascending. Without splits, a top folder of files that are
    no images is no class.

    Args:
        partly: the top folders with such files.
    """
    depth = 2 if parts else 1  # of a class folder
    labelled = {top for part, top in parts.items() if part != _UNLABELLED}
    filled = {"/".join(folder.split("/")[:depth]) for folder in places}
    found = {"/".join(f.split("/")[:depth]) for f in listed if f.count("/") >= depth} - filled
    if parts:
        return sorted(f for f in found if f.partition("/")[0] in labelled)
    return sorted(found - partly)


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in list(names)[:LISTED])
