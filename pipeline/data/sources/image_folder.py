"""Source `image_folder`: class folders, and unlabelled images, in a folder or an archive."""

import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.prepared.image_decoding import read_image
from pipeline.data.sources.archives import is_zip, names_encoding, read_files
from pipeline.data.sources.image_reading import decode_all
from pipeline.data.sources.layout import Layout, find_layout, quoted
from pipeline.data.sources.listing import Listing, describe_left_out, list_images
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import UNLABELLED, ImageSource, SampleTable, split_off
from pipeline.runtime.errors import UserError, counted, look_alike


def image_folder(params: DatasetParams) -> ImageSource:
    """Open `train/<class>/*`, and `val/`, `test/` and `unlabeled/` if present, under any of the
    names of `layout`; or `<class>/*` alone, which are training images.

    Raises:
        UserError: the root cannot be read, or has another layout.
    """
    root = Path(params.root)
    listing = list_images(root)
    counts = Counter(f"{name.rpartition('/')[0]}/" for name in listing.files)
    try:
        layout = find_layout(counts, listing.folders, listing.partly)
        _check_classes(layout)
    except UserError as error:
        raise UserError(f"`{root}` (`dataset.root`) has {error}") from None
    prefix, places = layout.prefix, layout.places
    names = (name.removeprefix(prefix) for name in listing.files if name.startswith(prefix))
    # A tar may repeat names.
    ids = sorted({name for name in names if f"{name.rpartition('/')[0]}/" in places})
    for line in _notes(root, listing, layout, counts):
        print(f"prepare: {line}", flush=True)
    label_of = {class_name: label for label, class_name in enumerate(layout.class_names)}
    label_of[""] = UNLABELLED
    found = [places[f"{sample_id.rpartition('/')[0]}/"] for sample_id in ids]
    labels = np.fromiter((label_of[place.class_name] for place in found), np.int64, len(ids))
    splits = np.fromiter((place.split for place in found), np.int8, len(ids))

    def number_of(name: str) -> int | None:
        if not name.startswith(prefix):
            return None
        sample_id = name.removeprefix(prefix)
        sample = bisect_left(ids, sample_id)
        return sample if ids[sample : sample + 1] == [sample_id] else None

    def open_content(_: int, content: bytes) -> tuple[Image.Image, bytes]:
        return read_image(content, params.bit_depth), content

    to_come = Counter(listing.copies)

    def last_copies() -> Iterator[tuple[int, bytes]]:
        for name, content in read_files(root, lambda name: number_of(name) is not None):
            to_come[name] -= 1
            if not to_come[name]:  # who unpacks the archive has this one
                yield number_of(name), content

    images = decode_all(last_copies(), open_content, ids, params)
    return ImageSource(
        layout.class_names, split_off(SampleTable(ids, labels, splits), params), images
    )


def _check_classes(layout: Layout) -> None:
    """Refuse a single class, classes of one name, and classes that `train/` lacks."""
    names = layout.class_names
    if len(names) < 2:
        raise UserError(f"one class, `{names[0]}`; expected at least 2.")
    if alike := _alike(names, lambda name: unicodedata.normalize("NFC", name)):
        raise UserError(
            f"classes whose names look the same, {alike}: one uses composed characters, the other "
            "does not. Put them into one folder."
        )
    found = {place.class_name for place in layout.places.values()}
    if untrained := sorted(found - {*names} - {""}):
        raise UserError(
            f"classes in `val/` or `test/` that `train/` lacks: {quoted(untrained)}"
            f"{look_alike(untrained, names)}."
        )


def _notes(
    root: Path, listing: Listing, layout: Layout, counts: Mapping[str, int]
) -> Iterator[str]:
    """Yield a line for each thing that the user should know about how the root was read."""
    folders = [folder for part, folder in layout.parts.items() if folder != part]
    if not layout.parts:
        yield (
            f"`{root}` has no folder of a split: its {len(layout.class_names):,} folders are taken "
            f"as classes of `train/`: {quoted(layout.class_names)}"
        )
    elif folders:
        read = (f"`{folder}/` as `{part}/`" for part, folder in layout.parts.items())
        yield f"the splits of `{root}`: {', '.join(read)}"
    inner = layout.inner_folders()
    if several := next((name for name in inner if len(inner[name]) > 1), None):
        yield (
            f"no class folder of `{root}` has an image itself: the classes are the outer folders, "
            f"such as `{several}`, with {quoted(inner[several][:2])} in it. If the inner folders "
            "are your classes, move them up"
        )
    if listing.left_out:
        yield (f"left out of `{root}`, as no images: {describe_left_out(listing.left_out)}")
    if repeated := {name for name in listing.files if listing.copies[name] > 1}:
        yield (
            f"`{root}` repeats {counted(len(repeated), 'name')}, such as `{min(repeated)}`; of "
            "each the last copy is read"
        )
    outside = {
        folder: count
        for folder, count in counts.items()
        if not folder.startswith(layout.prefix) or folder[len(layout.prefix) :] not in layout.places
    }
    if "/" in outside:
        outside["./"] = outside.pop("/")
    if outside:
        yield (
            f"ignored images of `{root}`: {sum(outside.values()):,} outside `train/<class>/`, "
            f"`val/<class>/`, `test/<class>/` and `unlabeled/`, in {quoted(sorted(outside))}"
        )
    if root.is_file() and is_zip(root) and (encoding := names_encoding(root)) not in ("", "utf-8"):
        example = next((name for name in layout.class_names if not name.isascii()), "")
        yield (
            f"names of `{root}` do not say their encoding, and are read as {encoding}"
            + (f": `{example}`. If that is wrong, pack it with names in UTF-8" * bool(example))
        )
    if alike := _alike(layout.class_names, str.casefold):
        yield f"classes differ only in upper and lower case: {alike}"


def _alike(class_names: list[str], normalize: Callable[[str], str]) -> str:
    """Two names that are equal when normalised, for a message; empty if none are."""
    pairs = pairwise(sorted(class_names, key=normalize))
    return next((f"{a!a} and {b!a}" for a, b in pairs if normalize(a) == normalize(b)), "")
