"""Source `torchvision`: one of torchvision's classification datasets, with the splits that it has.

Contract code: an edit here runs the teacher again. CIFAR's files are pickles: torchvision opens
them only where their published checksums agree.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.prepared.dataset import SPLITS
from pipeline.data.prepared.image_decoding import eight_bits
from pipeline.data.sources.image_reading import DecodedImage, decode_all, picture_of
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import TRAIN, UNLABELLED, ImageSource, SampleTable, split_off
from pipeline.data.sources.torchvision_catalog import SETS
from pipeline.runtime.errors import UserError

UNLABELLED_SPLIT = "unlabeled"
_LABELS = ("targets", "labels", "_labels")  # where torchvision keeps them, set by set


def torchvision_set(params: DatasetParams) -> ImageSource:
    """The dataset `params.name` below `params.root`, downloaded to there if it is absent.

    Raises:
        UserError: it is absent and cannot be downloaded, or its files are damaged.
    """
    parts = {split: _open(params, split) for split in SETS[params.name].splits}
    ids, labels, splits = [], [], []
    for split, part in parts.items():
        ids += [f"{split}/{index:06d}" for index in range(len(part))]
        unlabelled = split == UNLABELLED_SPLIT
        labels.append(np.full(len(part), UNLABELLED) if unlabelled else _labels_of(part))
        splits.append(np.full(len(part), TRAIN if unlabelled else SPLITS.index(split), np.int8))
    samples = SampleTable(ids, np.concatenate(labels).astype(np.int64), np.concatenate(splits))

    def places() -> Iterator[tuple[int, Any, int]]:
        sample = 0
        for part in parts.values():
            for index in range(len(part)):
                yield sample, part, index
                sample += 1

    def read(place: tuple[int, Any, int]) -> DecodedImage:
        sample, part, index = place
        image, label = part[index]
        expected = samples.labels[sample]
        assert expected in (label, UNLABELLED), f"{ids[sample]}: label {label}, not {expected}"
        return picture_of(sample, eight_bits(image), None, params)

    return ImageSource(
        _class_names(parts["train"], samples.labels),
        split_off(samples, params),
        decode_all(read, places(), lambda place: ids[place[0]], params.root),
        "the same pixels",
    )


def _open(params: DatasetParams, split: str) -> Sequence[tuple[Any, int]]:
    import torchvision  # noqa: PLC0415  (takes seconds; other sources need none)

    name, root = params.name, Path(params.root)
    if not root.is_dir():
        raise UserError(
            f"`{root}` (`dataset.root`) is no folder; expected one that holds `{name}`, or that it "
            f"is downloaded to. `mkdir -p {root}` makes it."
        )
    make, arguments = getattr(torchvision.datasets, name), SETS[name].splits[split]
    try:
        return make(root, **arguments, download=False)
    except (OSError, RuntimeError):
        pass  # absent, or still packed: `download` unpacks what it finds before it asks for more
    print(f"prepare: {name}, {split}, is not in `{root}`: it is downloaded or unpacked", flush=True)
    try:
        return make(root, **arguments, download=True)
    except Exception as error:  # whatever a network, a disk or an unpacker has to say
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"`{root}` (`dataset.root`) has no whole `{name}` ({split}), and it cannot be "
            f"downloaded here ({first_line}). Put into `{root}`: {SETS[name].files}, "
            f"as torchvision's `{name}` would download it; or prepare it once where there is a "
            "network, and bring that folder."
        ) from None


def _labels_of(part: Any) -> np.ndarray:
    """[N] labels, without a look at the images where the dataset lists them."""
    for name in _LABELS:
        found = getattr(part, name, None)
        if found is not None and np.ndim(found) == 1:
            return np.asarray(found)
    return np.array([part[index][1] for index in range(len(part))])


def _class_names(part: Any, labels: np.ndarray) -> list[str]:
    """As the dataset has them (of several names of a class the first), or numbers as text."""
    count = int(labels.max()) + 1
    names = getattr(part, "classes", None) or range(count)
    names = [str(name[0] if isinstance(name, tuple) else name) for name in names]
    assert len(names) >= count, f"label {count - 1} of {len(names)} classes"
    return names
