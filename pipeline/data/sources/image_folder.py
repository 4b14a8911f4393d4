"""Source `image_folder`: class folders, and unlabelled images, in a folder or an archive."""

import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.prepared.image_decoding import read_image
from pipeline.data.sources.archives import names_in, read_files
from pipeline.data.sources.image_reading import LISTED, decode_all
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import (
    TEST,
    TRAIN,
    UNLABELLED,
    VALIDATION,
    ImageSource,
    SampleTable,
    split_off,
)
from pipeline.runtime.errors import UserError, counted

#: The split of the images in each folder of the root.
_LABELLED = {"train": TRAIN, "val": VALIDATION, "validation": VALIDATION, "test": TEST}
_UNLABELLED = {"unlabeled": TRAIN, "unlabelled": TRAIN}
_SPLIT_OF = _LABELLED | _UNLABELLED


def image_folder(params: DatasetParams) -> ImageSource:
    """Open `train/<class>/*`, and `val/`, `test/` and `unlabeled/` if present.

    Raises:
        UserError: the root cannot be read, or has another layout.
    """
    root = Path(params.root)
    names = list(names_in(root))
    top = {name.partition("/")[0] for name in names}
    prefix = f"{next(iter(top))}/" if len(top) == 1 and not top & {*_SPLIT_OF} else ""
    names = [name.removeprefix(prefix) for name in names if name != prefix]
    files = [name for name in names if not name.endswith("/")]
    ids = sorted({name for name in files if _class_of(name) is not None})  # a tar may repeat names
    if len(files) > len(ids):
        print(
            f"prepare: {counted(len(files) - len(ids), 'file')} of `{root}` ignored, outside "
            "`train/<class>/`, `val/<class>/`, `test/<class>/` and `unlabeled/`",
            flush=True,
        )
    folders = _class_folders(ids)
    class_names = [
        folder.removeprefix("train/") for folder in folders if folder.startswith("train/")
    ]
    if problem := _problem_of(_class_folders(names), folders, class_names, top):
        raise UserError(f"`{root}` (`dataset.root`) has {problem}")
    if alike := _alike(class_names, str.casefold):
        print(f"prepare: classes differ only in upper and lower case: {alike}", flush=True)
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    label_of[""] = UNLABELLED
    labels = np.fromiter((label_of[_class_of(s)] for s in ids), np.int64, len(ids))
    splits = np.fromiter((_SPLIT_OF[s.partition("/")[0]] for s in ids), np.int8, len(ids))

    def number_of(name: str) -> int | None:
        sample_id = name.removeprefix(prefix)
        sample = bisect_left(ids, sample_id)
        return sample if ids[sample : sample + 1] == [sample_id] else None

    def open_content(_: int, content: bytes) -> tuple[Image.Image, bytes]:
        return read_image(content, params.bit_depth), content

    wanted = read_files(root, lambda name: number_of(name) is not None)
    contents = ((number_of(name), content) for name, content in wanted)
    images = decode_all(contents, open_content, ids, params)
    return ImageSource(class_names, split_off(SampleTable(ids, labels, splits), params), images)


def _class_of(name: str) -> str | None:
    """The class folder that holds a file or folder: empty in an unlabelled folder, None outside
    of all that are read."""
    top, _, rest = name.partition("/")
    if top in _UNLABELLED and rest:
        return ""
    class_name, slash, _ = rest.partition("/")
    return class_name if top in _LABELLED and slash else None


def _class_folders(names: Iterable[str]) -> list[str]:
    """The class folders, `train/<class>`, of these files and folders, ascending."""
    return sorted({"/".join(name.split("/", 2)[:2]) for name in names if _class_of(name)})


def _problem_of(listed: list[str], filled: list[str], class_names: list[str], top: set[str]) -> str:
    """Describe what is wrong with the layout; empty if nothing is.

    Args:
        listed, filled: the class folders, and those with images.
        top: the names in the root.
    """
    if empty := sorted({*listed} - {*filled}):
        return f"class folders without images: {_quoted(empty)}. Fill or remove them."
    if not class_names:
        return f"no `train/<class>/<image>`; found {_quoted(sorted(top)) or 'nothing'}."
    if len(class_names) < 2:
        return f"one class, `{class_names[0]}`; expected at least 2."
    if alike := _alike(class_names, lambda name: unicodedata.normalize("NFC", name)):
        return (
            f"classes whose names look the same, {alike}: one uses composed characters, the other "
            "does not. Put them into one folder."
        )
    if untrained := sorted({folder.partition("/")[2] for folder in filled} - {*class_names}):
        return f"classes in `val/` or `test/` that `train/` lacks: {_quoted(untrained)}."
    return ""


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:LISTED])


def _alike(class_names: list[str], normalize: Callable[[str], str]) -> str:
    """Two names that are equal when normalised, for a message; empty if none are."""
    pairs = pairwise(sorted(class_names, key=normalize))
    return next((f"{a!a} and {b!a}" for a, b in pairs if normalize(a) == normalize(b)), "")
