"""Source `torchvision`: one of torchvision's classification datasets, with its own splits.

CIFAR's files are pickles: torchvision opens them only if their published checksums match.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.prepared.dataset import SPLITS
from pipeline.data.prepared.image_decoding import eight_bits, read_nothing_else
from pipeline.data.sources.image_reading import decode_all
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import TRAIN, UNLABELLED, ImageSource, SampleTable, split_off
from pipeline.data.sources.torchvision_catalog import SETS
from pipeline.runtime.errors import UserError, first_line

UNLABELLED_SPLIT = "unlabeled"
_LABELS = ("targets", "labels", "_labels")  # the attribute's name varies by dataset


def torchvision_set(params: DatasetParams) -> ImageSource:
    """Open the dataset `params.name` below `params.root`; download it if it is absent.

    Raises:
        UserError: it is absent and cannot be downloaded, or its files are damaged.
    """
    from torch.utils.data import ConcatDataset  # noqa: PLC0415  (as below)

    read_nothing_else()  # torchvision opens files itself
    parts = {split: _open(params, split) for split in SETS[params.name].splits}
    ids, labels, splits = [], [], []
    for split, part in parts.items():
        ids += [f"{split}/{index:06d}" for index in range(len(part))]
        unlabelled = split == UNLABELLED_SPLIT
        labels.append(np.full(len(part), UNLABELLED) if unlabelled else _labels_of(part))
        splits.append(np.full(len(part), TRAIN if unlabelled else SPLITS.index(split), np.int8))
    samples = SampleTable(ids, np.concatenate(labels).astype(np.int64), np.concatenate(splits))
    whole = ConcatDataset(parts.values())

    def read(sample: int, _: int) -> tuple[Image.Image, None]:
        image, label = whole[sample]
        expected = samples.labels[sample]
        assert expected in (label, UNLABELLED), f"{ids[sample]}: label {label}, not {expected}"
        return eight_bits(image), None

    images = decode_all(enumerate(range(len(whole))), read, ids, params)
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


def _labels_of(part: Any) -> np.ndarray:
    """[N] labels; images are read only if the dataset has no list of labels."""
    for name in _LABELS:
        labels = getattr(part, name, None)
        if labels is not None and np.ndim(labels) == 1:
            return np.asarray(labels)
    return np.array([part[index][1] for index in range(len(part))])


def _class_names(part: Any, labels: np.ndarray) -> list[str]:
    """The dataset's class names (the first, if a class has several), or numbers as text."""
    count = int(labels.max()) + 1
    names = getattr(part, "classes", None) or range(count)
    names = [str(name[0] if isinstance(name, tuple) else name) for name in names]
    assert len(names) >= count, f"label {count - 1} of {len(names)} classes"
    return names
