"""The gate before the cache: a teacher that knows little is stopped, and the numbers tell why.

Contract code: an edit here runs the teacher again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from torch import Tensor, nn

from pipeline.data.prepared.dataset import Dataset
from pipeline.models.evaluation import predict_all
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER

SIGNIFICANCE = 1e-3  # of the one-sided binomial tests
_IMAGES = 256  # of validation, evenly spread, for each other setting that is tried
_LARGEST_SIZE = 512  # pixels, of the input sizes that are tried
_PAIRS = 3  # of classes, shown

_NORMALISATIONS = {
    "pixels in 0 to 1": ([0.0], [1.0]),
    "pixels in 0 to 255": ([0.0], [1 / 255]),
    "pixels in -1 to 1": ([0.5], [0.5]),
    "ImageNet's mean and std": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


@dataclass(frozen=True)
class Trial:
    """What the teacher scores under another setting."""

    setting: str
    correct: int
    total: int
    advice: str  # what to do if this is the cause

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


def check(
    network: nn.Module | None,
    spec: InputSpec | None,
    dataset: Dataset,
    logits: Tensor,
    *,
    minimum_accuracy: float | None,
    native: InputSpec | None,
    otherwise: str,
    device: torch.device,
) -> None:
    """Let a teacher pass that is clearly better than always naming the commonest class.

    Args:
        network: None for logits that another system made, as `spec`: only the order of their
            classes can be another.
        logits: [N, num_classes] float32, of the validation images as they are.
        minimum_accuracy: on validation, between 0 and 1, or None.
        native: the input that the network's pretraining used, where it is known.
        otherwise: what to do where no other setting explains a low accuracy.

    Raises:
        UserError: validation accuracy is below the minimum, or not clearly above the share of
            validation's commonest class; says what it is with classes in another order, other
            normalisations and other input sizes.
    """
    labels = dataset.splits["validation"].labels
    predictions = logits.argmax(1).numpy()
    correct, total = int((predictions == labels).sum()), len(labels)
    prior = np.bincount(labels).max() / total
    expected = None
    if minimum_accuracy is not None and correct < minimum_accuracy * total:
        expected = f"`teacher.minimum_accuracy`, {minimum_accuracy:.2%}, or more"
    elif prior**total > SIGNIFICANCE:
        print(
            f"  {total} validation images of these classes are too few to tell a good teacher from "
            "a bad one"
        )
    elif binomtest(correct, total, prior, alternative="greater").pvalue > SIGNIFICANCE:
        expected = (
            f"clearly more than {prior:.2%}, the share of the commonest class (one-sided binomial "
            f"test at {SIGNIFICANCE})"
        )
    if expected is None:
        return

    permuted = _in_another_order(predictions, labels, dataset.class_names, network is not None)
    as_it_is, normalisations, sizes = correct / total, [], []
    if network is not None:
        base, normalisations, sizes = _other_inputs(network, spec, dataset, native, device)
        as_it_is = base.accuracy
    trials = {
        "classes in the best other order": [permuted],
        "other normalisations": normalisations,
        "other input sizes": sizes,
    }
    entropy = torch.special.entr(logits.double().softmax(1)).sum(1).mean().item()
    lines = [
        f"the teacher names {correct:,} of {total:,} validation images right "
        f"({correct / total:.2%}); expected {expected}. `{TEACHER.model}` is as it was.",
        *(
            f"  {name}: " + "; ".join(f"{t.setting} {t.accuracy:.2%}" for t in of_kind)
            for name, of_kind in trials.items()
            if of_kind
        ),
        f"  entropy of its answers: {entropy:.2f} nats, of at most {np.log(logits.shape[1]):.2f}",
    ]
    clearly_better = [
        trial
        for trial in (t for of_kind in trials.values() for t in of_kind)
        if binomtest(trial.correct, trial.total, max(as_it_is, prior), alternative="greater").pvalue
        <= SIGNIFICANCE
    ]
    if clearly_better:
        lines.append(max(clearly_better, key=lambda trial: trial.accuracy).advice)
    else:
        tried = "order" if network is None else "order, normalisation or size"
        lines.append(f"No other {tried} explains it. {otherwise}")
    raise UserError("\n".join(lines))


def _in_another_order(
    predictions: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    has_network: bool = True,
) -> Trial:
    """The best permutation of classes, found on one half of the images and measured on the other,
    in turn: on the same images chance alone would find a good one."""
    num_classes = len(class_names)
    half = np.empty(len(labels), int)
    half[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % 2
    correct = 0
    for part in (0, 1):
        answer_of = _assignment(predictions[half == part], labels[half == part], num_classes)
        correct += int((answer_of[labels] == predictions)[half != part].sum())
    answer_of = _assignment(predictions, labels, num_classes)
    moved = [c for c in np.unique(labels) if answer_of[c] != c][:_PAIRS]
    pairs = ", ".join(
        f"images of `{class_names[c]}` are called `{class_names[answer_of[c]]}`" for c in moved
    )
    advice = (
        "The likeliest cause is the order of the classes: the teacher's logits must be in the "
        f"order of the folders' names, {', '.join(class_names[:_PAIRS])}, .... {pairs}. Order the "
        "rows of its last layer so, or rename the folders."
        if has_network
        else "The likeliest cause is the names of the classes: they do not stand at their own "
        f"logits. {pairs}. Name each column of logits after its class."
    )
    return Trial(pairs or "none is better,", correct, len(labels), advice)


def _assignment(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """[C]: the class that the teacher's answers call each class, one to one."""
    confusion = np.zeros((num_classes, num_classes))
    np.add.at(confusion, (labels, predictions), 1)
    confusion += 1e-6 * np.eye(num_classes)  # classes without an image keep their own name
    return linear_sum_assignment(confusion, maximize=True)[1]


def _other_inputs(
    network: nn.Module,
    spec: InputSpec,
    dataset: Dataset,
    native: InputSpec | None,
    device: torch.device,
) -> tuple[Trial, list[Trial], list[Trial]]:
    """The accuracy as it is, with other normalisations, and at other input sizes, on the same
    images."""
    split = dataset.splits["validation"]
    samples = np.unique(np.linspace(0, len(split) - 1, _IMAGES).astype(int))
    labels = split.labels[samples]

    def tried(other: InputSpec, setting: str, advice: str) -> Trial | None:
        try:
            logits = predict_all(network, other, split, device=device, samples=samples)
        except (RuntimeError, AssertionError, ValueError, UserError):
            return None  # a size that the network cannot take
        answers = logits.argmax(1).numpy()
        return Trial(setting, int((answers == labels).sum()), len(labels), advice)

    base = tried(spec, "", "")
    assert base is not None, "the network answered these images before"
    normalisations = (
        tried(
            replace(spec, mean=mean, std=std),
            name,
            f"The likeliest cause is the normalisation: the teacher was trained on {name}. Set "
            f"`mean: {_shown(mean)}` and `std: {_shown(std)}` in `teacher.network`.",
        )
        for name, mean, std in _normalisations(spec, dataset, native)
    )
    sizes = (
        tried(
            replace(spec, size=size),
            f"{size} pixels" + (" (its pretraining's)" if native and native.size == size else ""),
            f"The likeliest cause is the input size: set `input_size: {size}` in "
            "`teacher.network`.",
        )
        for size in _sizes(spec, dataset, native)
    )
    return base, [t for t in normalisations if t], [t for t in sizes if t]


def _normalisations(
    spec: InputSpec, dataset: Dataset, native: InputSpec | None
) -> Iterator[tuple[str, Sequence[float], Sequence[float]]]:
    known = {
        **_NORMALISATIONS,
        "the training images' mean and std": (dataset.mean, dataset.std),
    }
    if native:
        known["its pretraining's mean and std"] = (native.mean, native.std)
    seen = [(list(spec.mean), list(spec.std))]
    for name, values in known.items():
        mean, std = (list(v) * (spec.channels if len(v) == 1 else 1) for v in values)
        if len(mean) == spec.channels and not any(
            np.allclose(mean, m, atol=1e-3) and np.allclose(std, s, rtol=1e-2) for m, s in seen
        ):
            seen.append((mean, std))
            yield name, mean, std


def _sizes(spec: InputSpec, dataset: Dataset, native: InputSpec | None) -> list[int]:
    sizes = {dataset.image_size, spec.size // 2, 2 * spec.size}
    if native:
        sizes.add(native.size)
    return sorted(size for size in sizes - {spec.size} if 8 <= size <= _LARGEST_SIZE)


def _shown(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
