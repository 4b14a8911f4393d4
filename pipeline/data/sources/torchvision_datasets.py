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
    parts = {split: _open(params, split) for split in SETS[params.name].splits}
    sizes = dict(zip(parts, SETS[params.name].sizes, strict=True))
    class_names = _class_names(parts["train"])
    ids, labels, splits = [], [], []
    for split, part in parts.items():
        ids += [f"{split}/{index:06d}" for index in range(len(part))]
        unlabelled = split == UNLABELLED_SPLIT
        labels.append(np.full(len(part), UNLABELLED) if unlabelled else _labels_of(part))
        splits.append(np.full(len(part), TRAIN if unlabelled else SPLITS.index(split), np.int8))
        for what, found in (("image", len(part)), ("label", len(labels[-1]))):
            if found != sizes[split]:
                raise _damaged(params, split, counted(found, what), f"{sizes[split]:,}")
        if class_names and (label := labels[-1].max()) >= len(class_names):
            raise _damaged(params, split, f"a label {label}", f"0 to {len(class_names) - 1}")
    samples = SampleTable(ids, np.concatenate(labels).astype(np.int64), np.concatenate(splits))
    places = [(part, index) for part in parts.values() for index in range(len(part))]

    def read(sample: int, _: int) -> tuple[Image.Image, None]:
        part, index = places[sample]
        try:
            image, label = part[index]
        except UNREADABLE as error:
            raise ValueError(f"{_file_of(part, index)}: {error}") from None
        expected = samples.labels[sample]
        assert expected in (label, UNLABELLED), f"{ids[sample]}: label {label}, not {expected}"
        return eight_bits(image), None

    images = decode_all(enumerate(range(len(places))), read, ids, params)
    class_names = class_names or [str(label) for label in range(samples.labels.max() + 1)]
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
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # absent, damaged, or still packed, which `download` unpacks
        found = first_line(error)
    print(f"prepare: {name}, {split}, is not in `{root}`: downloading or unpacking", flush=True)
    try:
        return make(root, **arguments, download=True)
    except MemoryError:
        raise
    except Exception as error:  # of a network, a disk or an unpacker: any class
        if first_line(error) == found:  # nothing was downloaded: the files are there
            problem = f"files that torchvision cannot open ({found})"
            raise _damaged(params, split, problem, "whole files") from None
        raise UserError(
            f"`{root}` (`dataset.root`) does not have all of `{name}` ({split}), and it cannot be "
            f"downloaded here ({first_line(error)}). Put into `{root}`: {SETS[name].files}, "
            f"as torchvision's `{name}` would download it; or run prepare on a machine with a "
            "network, and copy its folder here."
        ) from None


def _damaged(params: DatasetParams, split: str, found: str, expected: str) -> UserError:
    """Describe files that torchvision takes for whole: it looks at little but their folder, and
    numbers the classes whose folders are there, split by split."""
    return UserError(
        f"`{params.root}` (`dataset.root`) has {found} of `{params.name}` ({split}); expected "
        f"{expected}: unpacking was interrupted, or files are missing or damaged. Remove what was "
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
    """The path of an image that is a file, or its number."""
    samples, files = _first_of(part, _SAMPLES), _first_of(part, _FILES)
    if files is None:
        return index if samples is None else samples[index][0]
    return files[index]


def _class_names(part: Any) -> list[str]:
    """The dataset's class names (the first, if a class has several); empty if it has none."""
    names = getattr(part, "classes", None) or []
    return [str(name[0] if isinstance(name, tuple) else name) for name in names]
