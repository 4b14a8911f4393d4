"""Source `image_folder`: class folders, and unlabelled images, in a folder or an archive."""

import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from pipeline.data.prepared.image_decoding import eight_bits, open_image
from pipeline.data.sources.archives import names_in, read_files
from pipeline.data.sources.image_reading import LISTED, DecodedImage, decode_all, prepare_image
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
from pipeline.runtime.errors import UserError

_SPLIT_FOLDERS = {"train": TRAIN, "val": VALIDATION, "validation": VALIDATION, "test": TEST}
_UNLABELLED_FOLDERS = ("unlabeled", "unlabelled")
_KNOWN = {*_SPLIT_FOLDERS, *_UNLABELLED_FOLDERS}


def image_folder(params: DatasetParams) -> ImageSource:
    """Open `train/<class>/*`, and `val/`, `test/` and `unlabeled/` if present.

    Raises:
        UserError: the root cannot be read, or has another layout.
    """
    root = Path(params.root)
    names = list(names_in(root))
    top = {name.partition("/")[0] for name in names}
    prefix = f"{next(iter(top))}/" if len(top) == 1 and not top & _KNOWN else ""
    class_folders = _class_folders(names, prefix)
    num_files = sum(not name.endswith("/") for name in names)
    ids = _sample_ids(names, prefix)
    if num_files > len(ids):
        print(
            f"prepare: {num_files - len(ids):,} files of `{root}` are ignored: they are outside "
            "`train/<class>/`, `val/<class>/`, `test/<class>/` and `unlabeled/`",
            flush=True,
        )
    _check_no_class_is_empty(root, class_folders, ids)
    class_names = sorted({c for s in ids if (c := _class_of(s)) and s.startswith("train/")})
    _check_classes(root, class_names, ids, top)
    if alike := _alike(class_names, str.casefold):
        print(f"prepare: classes differ only in upper and lower case: {alike}", flush=True)
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    label_of[""] = UNLABELLED
    labels = np.fromiter((label_of[_class_of(s)] for s in ids), np.int64, len(ids))
    splits = np.fromiter(
        (_SPLIT_FOLDERS.get(s.partition("/")[0], TRAIN) for s in ids), np.int8, len(ids)
    )

    def number_of(name: str) -> int | None:
        sample_id = name.removeprefix(prefix)
        sample = bisect_left(ids, sample_id)
        return sample if sample < len(ids) and ids[sample] == sample_id else None

    def contents() -> Iterator[tuple[int, bytes]]:
        for name, content in read_files(root, lambda name: number_of(name) is not None):
            yield number_of(name), content

    def read(file: tuple[int, bytes]) -> DecodedImage:
        sample, content = file
        return prepare_image(sample, eight_bits(open_image(content)), content, params)

    images = decode_all(read, contents(), lambda file: ids[file[0]], params.root)
    samples = split_off(SampleTable(ids, labels, splits), params)
    return ImageSource(class_names, samples, images, "the same bytes")


def _class_folders(names: Sequence[str], prefix: str) -> set[str]:
    """The class folders, `train/<class>`, that are listed, empty or not."""
    return {
        "/".join(parts[:2])
        for name in names
        if name.endswith("/")
        and len(parts := name.removeprefix(prefix).rstrip("/").split("/")) >= 2
        and parts[0] in _SPLIT_FOLDERS
    }


def _sample_ids(names: Sequence[str], prefix: str) -> Sequence[str]:
    """The paths of the samples below the root or its one folder, ascending, without repeats."""
    ids = sorted(filter(_is_sample, (name.removeprefix(prefix) for name in names)))
    return [sample_id for sample_id, _ in groupby(ids)]  # an archive may contain a file twice


def _is_sample(name: str) -> bool:
    top, _, rest = name.partition("/")
    in_class = top in _SPLIT_FOLDERS and "/" in rest
    return bool(rest) and not name.endswith("/") and (in_class or top in _UNLABELLED_FOLDERS)


def _class_of(sample_id: str) -> str:
    """The name of a sample's class folder; empty if it is unlabelled."""
    top, class_name, _ = sample_id.split("/", 2) if sample_id.count("/") > 1 else ("", "", "")
    return class_name if top in _SPLIT_FOLDERS else ""


def _check_classes(root: Path, class_names: list[str], ids: Sequence[str], top: set[str]) -> None:
    if not class_names:
        raise UserError(
            f"`{root}` (`dataset.root`) has no `train/<class>/<image>`; found "
            f"{', '.join(f'`{t}`' for t in sorted(top)[:LISTED]) or 'nothing'}."
        )
    if len(class_names) < 2:
        raise UserError(
            f"`{root}` (`dataset.root`) has one class, `{class_names[0]}`; expected at least 2."
        )
    alike = _alike(class_names, lambda name: unicodedata.normalize("NFC", name))
    if alike:
        raise UserError(
            f"`{root}` (`dataset.root`) has classes whose names look the same, {alike}: one uses "
            "composed characters, the other does not. Put them into one folder."
        )
    untrained = sorted({_class_of(s) for s in ids} - {*class_names, ""})
    if untrained:
        raise UserError(
            f"`{root}` (`dataset.root`) has classes in `val/` or `test/` that `train/` lacks: "
            f"{', '.join(f'`{c}`' for c in untrained[:LISTED])}."
        )


def _alike(class_names: list[str], normalize: Callable[[str], str]) -> str:
    """The first two names that are equal when normalised, for a message; empty if none are."""
    first_names: dict[str, str] = {}
    for name in class_names:
        first = first_names.setdefault(normalize(name), name)
        if first != name:
            return f"{first!a} and {name!a}"
    return ""


def _check_no_class_is_empty(root: Path, class_folders: set[str], ids: Sequence[str]) -> None:
    filled = {s[: s.index("/", s.index("/") + 1)] for s in ids if _class_of(s)}
    empty = sorted(class_folders - filled)
    if empty:
        raise UserError(
            f"`{root}` (`dataset.root`) has class folders without images: "
            f"{', '.join(f'`{folder}`' for folder in empty[:LISTED])}. Fill or remove them."
        )
