"""Warnings about the dataset: unlabelled images, class imbalance, classes that a split
lacks, duplicate images."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pipeline.data.prepared.dataset import SPLITS
from pipeline.data.sources.splits import (
    TEST,
    TRAIN,
    UNLABELLED,
    VALIDATION,
    ImageSource,
    SampleTable,
)
from pipeline.runtime.errors import counted

_LARGEST_RATIO = 1.5  # of class sizes, before a warning
_SHOWN = 5  # classes, or pairs of duplicates


def find_duplicates(samples: SampleTable, digests: np.ndarray) -> dict[str, Any]:
    """Find contents that are in several splits, or have several labels.

    Args:
        digests: [N, 16] uint8, of each sample's content.

    Returns:
        `across_splits`: the number of validation and test images that are in an earlier split too,
        and the first pairs of ids; `contradicting_labels`: the number of contents with more than
        one label, and the first pairs. Keys whose number is 0 are left out.
    """
    halves = np.ascontiguousarray(digests).view(np.uint64)  # [N, 2]
    order = np.lexsort(halves.T)  # stable: equal contents stay in the order of their numbers
    ranked = halves[order]
    starts = np.flatnonzero(np.append(True, (ranked[1:] != ranked[:-1]).any(1)))
    sizes = np.diff(starts, append=len(order))
    across, contradicting = [], []  # pairs of numbers
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        members = order[start : start + size]
        members = members[np.argsort(samples.splits[members], kind="stable")]
        splits, labels = samples.splits[members], samples.labels[members]
        across += [(members[0], member) for member in members[splits > splits[0]]]
        labelled, labels = members[labels != UNLABELLED], labels[labels != UNLABELLED]
        contradictions = labelled[labels != labels[:1]]
        if len(contradictions):
            contradicting.append((labelled[0], contradictions[0]))
    pairs_by_problem = {"across_splits": across, "contradicting_labels": contradicting}
    return {
        problem: {
            "count": len(pairs),
            "first": [[samples.ids[number] for number in pair] for pair in sorted(pairs)[:_SHOWN]],
        }
        for problem, pairs in pairs_by_problem.items()
        if pairs
    }


def findings(source: ImageSource, duplicates: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each thing that the user should know about the dataset.

    Args:
        duplicates: from `find_duplicates`.
    """
    samples = source.samples
    unlabelled = np.count_nonzero(samples.labels == UNLABELLED)
    if unlabelled:
        number = counted(unlabelled, "training image has", "training images have")
        yield f"{number} no label: only students see unlabelled images"
    labels = samples.labels[(samples.splits == TRAIN) & (samples.labels != UNLABELLED)]
    counts = np.bincount(labels, minlength=len(source.class_names))
    smallest, largest = counts.argmin(), counts.argmax()
    ratio = counts[largest] / max(1, counts[smallest])
    if ratio > _LARGEST_RATIO:
        yield (
            f"classes are unequal: {counted(counts[smallest], 'training image')} of "
            f"`{source.class_names[smallest]}`, {counts[largest]:,} of "
            f"`{source.class_names[largest]}`, {ratio:.1f} times as many"
        )
    for split in (VALIDATION, TEST):
        present = set(samples.labels[samples.splits == split].tolist())
        names = enumerate(source.class_names)
        if missing := [f"`{name}`" for label, name in names if label not in present]:
            shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            yield (
                f"warning: no {SPLITS[split]} image of {counted(len(missing), 'class')} ({shown}), "
                f"which {SPLITS[split]} accuracy does not measure"
            )
    held_out = np.count_nonzero(samples.splits != TRAIN)
    problems = {
        "across_splits": (
            f"of {held_out:,} validation and test images has",
            f"of {held_out:,} validation and test images have",
            "the same content as an image of an earlier split, which inflates accuracy",
        ),
        "contradicting_labels": ("time", "times", "the same content has several labels"),
        "near_copies": (
            f"of {held_out:,} validation and test images looks like",
            f"of {held_out:,} validation and test images look like",
            "a copy of an image of an earlier split, of another size or quality, which inflates "
            "accuracy",
        ),
    }
    for problem, found in duplicates.items():
        sign = "~" if problem == "near_copies" else "="
        pairs = ", ".join(f"`{a}` {sign} `{b}`" for a, b in found["first"])
        of = ", ".join(f"{count:,} of {splits}" for splits, count in found.get("of", {}).items())
        shares = f" ({of})" if of else ""
        one, several, what = problems[problem]
        yield f"warning: {counted(found['count'], one, several)} {what}{shares}, such as {pairs}"
