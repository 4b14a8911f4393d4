"""Source `torchvision`: one of torchvision's classification datasets, with its own splits.

CIFAR's files are pickles: torchvision opens them only if their published checksums match.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.prepared.dataset import SPLITS
from pipeline.data.prepared.image_decoding import UNREADABLE, eight_bits, read_nothing_else
from pipeline.data.sources.image_reading import decode_all
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import TRAIN, UNLABELLED, ImageSource, SampleTable, split_off
from pipeline.data.sources.torchvision_catalog import SETS
from pipeline.runtime.errors import UserError, counted, first_line

UNLABELLED_SPLIT = "unlabeled"
# The attributes' names vary by dataset. Samples are pairs of a path and a label.
_LABELS, _SAMPLES = ("targets", "labels", "_labels"), ("_samples", "samples")
_FILES = ("_image_files", "_images")


def torchvision_set(params: DatasetParams) -> ImageSource:
    """Open the dataset `params.name` below `params.root`; download it if it is absent.

    Raises:
        UserError: it is absent and cannot be downloaded, or its files are damaged.
    """
    read_nothing_else()  # torchvision opens files itself
    sizes = dict(zip(SETS[params.name].splits, SETS[params.name].sizes, strict=True))
    parts = {split: _open(params, split) for split in sizes}
    for split, part in parts.items():
        _check_number(params, split, counted(len(part), "image"), len(part), sizes[split])
    ids, labels, splits = [], [], []
    for split, part in parts.items():
        ids += [f"{split}/{index:06d}" for index in range(len(part))]
        unlabelled = split == UNLABELLED_SPLIT
        labels.append(np.full(len(part), UNLABELLED) if unlabelled else _labels_of(part))
        splits.append(np.full(len(part), TRAIN if unlabelled else SPLITS.index(split), np.int8))
    samples = SampleTable(ids, np.concatenate(labels).astype(np.int64), np.concatenate(splits))
    places = [(part, index) for part in parts.values() for index in range(len(part))]

    def read(sample: int, _: int) -> tuple[Image.Image, None]:
        part, index = places[sample]
        try:
            image, label = part[index]
        except MemoryError:
            raise
        except UNREADABLE as error:
            raise ValueError(f"{_file_of(part, index)}: {error}") from None
        expected = samples.labels[sample]
        assert expected in (label, UNLABELLED), f"{ids[sample]}: label {label}, not {expected}"
        return eight_bits(image), None

    images = decode_all(enumerate(range(len(places))), read, ids, params)
    class_names = _class_names(parts["train"], samples.labels)
    return ImageSource(class_names, split_off(samples, params), images)


def _open(params: DatasetParams, split: str) -> Sequence[tuple[Any, int]]:
    import torchvision  # noqa: PLC0415  (takes seconds; other sources need none)

    name, root = params.name, Path(params.root)
    if not root.is_dir():
        raise UserError(
            f"`{root}` (`dataset.root`) is not a folder; expected the one that holds `{name}`, or "
            f"to download it to. Run `mkdir -p {root}`."
        )
    make, arguments = getattr(torchvision.datasets, name), SETS[name].splits[split]
    try:
        return make(root, **arguments, download=False)
    except (OSError, RuntimeError):
        pass  # absent, or still packed: `download` first unpacks what is there
    print(f"prepare: {name}, {split}, is not in `{root}`: downloading or unpacking", flush=True)
    try:
        return make(root, **arguments, download=True)
    except Exception as error:  # of a network, a disk or an unpacker: any class
        raise UserError(
            f"`{root}` (`dataset.root`) does not have all of `{name}` ({split}), and it cannot be "
            f"downloaded here ({first_line(error)}). Put into `{root}`: {SETS[name].files}, "
            f"as torchvision's `{name}` would download it; or run prepare on a machine with a "
            "network, and copy its folder here."
        ) from None


def _check_number(params: DatasetParams, split: str, what: str, found: int, expected: int) -> None:
    """Refuse another number of images or labels: torchvision takes a dataset for whole if its
    folder is there, and numbers the classes whose folders are there, split by split."""
    if found != expected:
        raise UserError(
            f"`{params.root}` (`dataset.root`) has {what} of `{params.name}` ({split}); expected "
            f"{expected:,}: unpacking was interrupted, or files are missing. Remove what was "
            f"unpacked below `{params.root}`, keep archives, and run prepare again."
        )


def _first_of(part: Any, names: Sequence[str]) -> Any:
    """The first of these attributes that a dataset has; None if it has none."""
    return next((value for name in names if (value := getattr(part, name, None)) is not None), None)


def _labels_of(part: Any) -> np.ndarray:
    """[N] labels, for which no image is read."""
    labels = _first_of(part, _LABELS)
    if labels is None:
        labels = [label for _, label in _first_of(part, _SAMPLES)]
    return np.asarray(labels)


def _file_of(part: Any, index: int) -> Any:
    """The path of an image that is a file."""
    files = _first_of(part, _FILES)
    return _first_of(part, _SAMPLES)[index][0] if files is None else files[index]


def _class_names(part: Any, labels: np.ndarray) -> list[str]:
    """The dataset's class names (the first, if a class has several), or numbers as text."""
    count = int(labels.max()) + 1
    names = getattr(part, "classes", None) or range(count)
    names = [str(name[0] if isinstance(name, tuple) else name) for name in names]
    assert len(names) >= count, f"label {count - 1} of {len(names)} classes"
    return names
