"""The sample table (ids, labels, splits), and splitting off validation and test.

Arrays and one list of ids, not an object for each sample: a million samples take some 120 bytes
each, most of them for the id.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from pipeline.data.prepared.dataset import SPLITS
from pipeline.data.sources.image_reading import DecodedImage, UnreadableImage
from pipeline.data.sources.params import DatasetParams
from pipeline.runtime.derived_random import hash64
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.params import PARAMS_FILE

UNLABELLED = -1  # the label of an unlabelled sample
TRAIN, VALIDATION, TEST = range(len(SPLITS))


@dataclass(frozen=True)
class SampleTable:
    """All samples of a source, numbered from 0; each split keeps this order."""

    ids: Sequence[str]  # [N]
    labels: np.ndarray  # [N] int64, or UNLABELLED
    splits: np.ndarray  # [N] int8, indices into SPLITS

    def take(self, numbers: np.ndarray) -> "SampleTable":
        """The samples with these numbers, in their order."""
        ids = [self.ids[number] for number in numbers]
        return SampleTable(ids, self.labels[numbers], self.splits[numbers])


@dataclass(frozen=True)
class ImageSource:
    """A dataset before it is packed: its sample table, and its images, to be read once."""

    class_names: list[str]
    samples: SampleTable
    images: Iterator[DecodedImage | UnreadableImage]  # of every sample, in any order


def split_off(samples: SampleTable, params: DatasetParams) -> SampleTable:
    """Take the splits that the source lacks from its labelled training samples.

    Each class gives its share, at least one sample: those with the smallest hashes of (seed, sample
    id), so the choice depends on the members of the class alone.

    Raises:
        UserError: a class has too few samples, or params.yaml does not say which share to take.
    """
    shares = {TEST: params.test_fraction, VALIDATION: params.validation_fraction}
    lacking = [split for split in shares if not (samples.splits == split).any()]
    if not lacking:
        return samples
    for split in lacking:
        if shares[split] is None:
            key = f"{SPLITS[split]}_fraction"
            raise UserError(
                f"`{PARAMS_FILE}: dataset.{key}` is missing, but the dataset has no "
                f"{SPLITS[split]} split; expected the share of the training images to split off. "
                f"Add `{key}: 0.1`, for example."
            )
    splits = samples.splits.copy()
    for members in _labelled_by_class(samples):
        if len(members) <= len(lacking):
            raise UserError(
                f"the class of `{samples.ids[members[0]]}` has "
                f"{counted(len(members), 'training sample')}; expected at least "
                f"{len(lacking) + 1}, for training and to split off "
                f"{' and '.join(SPLITS[split] for split in lacking)}."
            )
        ranked, left = iter(_ranked(members, samples, params)), len(members)
        for after, split in zip(range(len(lacking))[::-1], lacking, strict=True):
            most = left - after - 1  # one is left for each later split, and for training
            count = min(max(1, round(shares[split] * len(members))), most)
            splits[list(islice(ranked, count))] = split
            left -= count
    return replace(samples, splits=splits)


def hide_labels(samples: SampleTable, params: DatasetParams) -> SampleTable:
    """Leave `labels_per_class` labelled training samples of each class, those with the smallest
    hashes; the others become unlabelled."""
    labels = samples.labels.copy()
    if params.labels_per_class is not None:
        for members in _labelled_by_class(samples):
            labels[_ranked(members, samples, params)[params.labels_per_class :]] = UNLABELLED
    return replace(samples, labels=labels)


def _labelled_by_class(samples: SampleTable) -> list[np.ndarray]:
    """The numbers of each class's labelled training samples."""
    labelled = np.flatnonzero((samples.splits == TRAIN) & (samples.labels != UNLABELLED))
    labelled = labelled[np.argsort(samples.labels[labelled], kind="stable")]
    return np.split(labelled, np.flatnonzero(np.diff(samples.labels[labelled])) + 1)


def _ranked(members: np.ndarray, samples: SampleTable, params: DatasetParams) -> list[int]:
    """Sample numbers in the order of the hashes of (seed, sample id)."""
    return sorted(members, key=lambda n: _rank(params.split_seed, samples.ids[n]))


def _rank(seed: int, sample_id: str) -> tuple[int, str]:
    digest = hashlib.sha256(sample_id.encode()).digest()
    return int(hash64(seed, int.from_bytes(digest[:8], "little"))), sample_id
