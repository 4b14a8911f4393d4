"""What is odd about a dataset and no mistake: classes of unequal size, images that are there twice.

Contract code: an edit here runs the teacher again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.data.sources.splits import TRAIN, UNLABELLED, SampleTable

WORTH_TELLING = 1.5  # the largest class over the smallest
SHOWN = 5  # pairs of duplicates


def imbalance(samples: SampleTable, class_names: Sequence[str]) -> str | None:
    """One line on the sizes of the training classes; None where they are about equal."""
    labels = samples.labels[(samples.splits == TRAIN) & (samples.labels != UNLABELLED)]
    counts = np.bincount(labels, minlength=len(class_names))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    ratio = counts[largest] / max(1, counts[smallest])
    if ratio <= WORTH_TELLING:
        return None
    return (
        f"classes are unequal: {counts[smallest]:,} training images of `{class_names[smallest]}`, "
        f"{counts[largest]:,} of `{class_names[largest]}`, {ratio:.1f} times as many"
    )


def duplicates(samples: SampleTable, digests: np.ndarray) -> dict[str, Any]:
    """Which contents are in several splits, or have several labels.

    Args:
        digests: [N, 16] uint8, of each sample's content.

    Returns:
        `across_splits`: the number of validation and test images that are in an earlier split too,
        and the first pairs of ids; `contradicting_labels`: the number of contents with more than
        one label, and the first pairs. Keys whose number is 0 are left out.
    """
    halves = np.ascontiguousarray(digests).view(np.uint64)  # [N, 2]
    order = np.lexsort(halves.T)  # stable: equals stay in the order of their numbers
    ranked = halves[order]
    starts = np.flatnonzero(np.append(True, (ranked[1:] != ranked[:-1]).any(1)))
    sizes = np.diff(starts, append=len(order))
    across, contradicting = [], []  # pairs of numbers
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        members = order[start : start + size]
        members = members[np.argsort(samples.splits[members], kind="stable")]
        splits, labels = samples.splits[members], samples.labels[members]
        across += [(members[0], member) for member in members[splits > splits[0]]]
        known, labels = members[labels != UNLABELLED], labels[labels != UNLABELLED]
        other = known[labels != labels[:1]]
        if len(other):
            contradicting.append((known[0], other[0]))
    found = {"across_splits": across, "contradicting_labels": contradicting}
    return {
        kind: {"count": len(pairs), "first": _ids(samples, sorted(pairs)[:SHOWN])}
        for kind, pairs in found.items()
        if pairs
    }


def _ids(samples: SampleTable, pairs: Sequence[tuple[int, int]]) -> list[list[str]]:
    return [[samples.ids[number] for number in pair] for pair in pairs]


def told(found: Mapping[str, Any], samples: SampleTable, contents: str) -> list[str]:
    """Lines on what `duplicates` found.

    Args:
        contents: what two duplicates have in common, as in `the same bytes`.
    """
    held_out = int((samples.splits != TRAIN).sum())
    lines = []
    for kind, what in (
        (
            "across_splits",
            f"of {held_out:,} validation and test images have {contents} as an image of an "
            "earlier split, and their accuracy is flattered",
        ),
        ("contradicting_labels", f"times {contents} have several labels"),
    ):
        if kind in found:
            count, first = found[kind]["count"], found[kind]["first"]
            pairs = ", ".join(f"`{a}` = `{b}`" for a, b in first)
            more = ", ..." if count > len(first) else ""
            lines.append(f"warning: {count:,} {what}: {pairs}{more}")
    return lines
