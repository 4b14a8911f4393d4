"""The accuracy gate: refuse a teacher that knows little, with the numbers that explain why."""

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
_PAIRS = 3  # of classes, in a message

_NORMALISATIONS = {
    "pixels in 0 to 1": ([0.0], [1.0]),
    "pixels in 0 to 255": ([0.0], [1 / 255]),
    "pixels in -1 to 1": ([0.5], [0.5]),
    "ImageNet's mean and std": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


@dataclass(frozen=True)
class Trial:
    """The teacher's accuracy with another setting."""

    setting: str
    correct: int
    total: int
    advice: str  # what to do if this setting is the cause

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
    pretrained_input: InputSpec | None,
    fallback_hint: str,
    device: torch.device,
) -> None:
    """Refuse a teacher that is not significantly better than always predicting the majority class.

    Args:
        network: None for imported logits, like `spec`: then only the order of the classes can be
            wrong.
        logits: [N, num_classes] float32, of the validation images without augmentation.
        minimum_accuracy: on validation, between 0 and 1, or None.
        pretrained_input: the input that the network was pretrained with, if it is known.
        fallback_hint: what to do if no other setting explains a low accuracy.

    Raises:
        UserError: validation accuracy is below the minimum, or not significantly above the share
            of the majority class; gives the accuracy with classes in another order, with other
            normalisations and with other input sizes.
    """
    labels = dataset.splits["validation"].labels
    predictions = logits.argmax(1).numpy()
    correct, total = int((predictions == labels).sum()), len(labels)
    majority = np.bincount(labels).max() / total
    expected = _unmet_requirement(correct, total, majority, minimum_accuracy)
    if expected is None:
        return

    reordered = _in_another_order(predictions, labels, dataset.class_names, network is not None)
    accuracy, normalisations, sizes = correct / total, [], []
    if network is not None:
        base, normalisations, sizes = _other_inputs(
            network, spec, dataset, pretrained_input, device
        )
        accuracy = base.accuracy
    trials = {
        "classes in the best other order": [reordered],
        "other normalisations": normalisations,
        "other input sizes": sizes,
    }
    entropy = torch.special.entr(logits.double().softmax(1)).sum(1).mean().item()
    lines = [
        f"teacher accuracy on validation: {correct / total:.2%} ({correct:,} of {total:,}); "
        f"expected {expected}. `{TEACHER.model}` is unchanged.",
        *(
            f"  {name}: " + "; ".join(f"{trial.setting} {trial.accuracy:.2%}" for trial in group)
            for name, group in trials.items()
            if group
        ),
        f"  mean entropy of its predictions: {entropy:.2f} nats, of at most "
        f"{np.log(logits.shape[1]):.2f}",
    ]
    better = [
        trial
        for group in trials.values()
        for trial in group
        if _p_value(trial.correct, trial.total, max(accuracy, majority)) <= SIGNIFICANCE
    ]
    if better:
        lines.append(max(better, key=lambda trial: trial.accuracy).advice)
    else:
        tried = "order" if network is None else "order, normalisation or size"
        lines.append(f"No other {tried} explains it. {fallback_hint}")
    raise UserError("\n".join(lines))


def _unmet_requirement(
    correct: int, total: int, majority: float, minimum_accuracy: float | None
) -> str | None:
    """What was expected of the accuracy, or None if it is enough."""
    if minimum_accuracy is not None and correct < minimum_accuracy * total:
        return f"`teacher.minimum_accuracy`, {minimum_accuracy:.2%}, or more"
    if majority**total > SIGNIFICANCE:
        print(
            f"  {total} validation images of these classes are too few to tell a good teacher from "
            "a bad one"
        )
    elif _p_value(correct, total, majority) > SIGNIFICANCE:
        return (
            f"significantly more than {majority:.2%}, the share of the majority class (one-sided "
            f"binomial test at {SIGNIFICANCE})"
        )
    return None


def _p_value(correct: int, total: int, accuracy: float) -> float:
    """Of the one-sided binomial test against an accuracy."""
    return binomtest(correct, total, accuracy, alternative="greater").pvalue


def _in_another_order(
    predictions: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    has_network: bool = True,
) -> Trial:
    """The best permutation of the classes, found on one half of the images and measured on the
    other half, in turn: on the same images chance alone finds a good one."""
    num_classes = len(class_names)
    half = np.empty(len(labels), int)
    half[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % 2
    correct = 0
    for part in (0, 1):
        predicted_as = _assignment(predictions[half == part], labels[half == part], num_classes)
        correct += int((predicted_as[labels] == predictions)[half != part].sum())
    predicted_as = _assignment(predictions, labels, num_classes)
    moved = [c for c in np.unique(labels) if predicted_as[c] != c][:_PAIRS]
    pairs = ", ".join(
        f"images of `{class_names[c]}` are predicted as `{class_names[predicted_as[c]]}`"
        for c in moved
    )
    advice = (
        "The likeliest cause is the order of the classes: the teacher's logits must be in the "
        f"order of the folders' names, {', '.join(class_names[:_PAIRS])}, .... {pairs}. Reorder "
        "the rows of its last layer, or rename the folders."
        if has_network
        else "The likeliest cause is the names of the classes: they are not those of their "
        f"columns. {pairs}. Name each column of logits after its class."
    )
    return Trial(pairs or "none is better,", correct, len(labels), advice)


def _assignment(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """For each class the class that the teacher predicts for it, one to one: [C]."""
    confusion = np.zeros((num_classes, num_classes))
    np.add.at(confusion, (labels, predictions), 1)
    confusion += 1e-6 * np.eye(num_classes)  # a class without images stays itself
    return linear_sum_assignment(confusion, maximize=True)[1]


def _other_inputs(
    network: nn.Module,
    spec: InputSpec,
    dataset: Dataset,
    pretrained_input: InputSpec | None,
    device: torch.device,
) -> tuple[Trial, list[Trial], list[Trial]]:
    """The accuracy with the present input, with other normalisations and with other input sizes, on
    the same images."""
    split = dataset.splits["validation"]
    samples = np.unique(np.linspace(0, len(split) - 1, _IMAGES).astype(int))
    labels = split.labels[samples]

    def trial(other: InputSpec, setting: str, advice: str) -> Trial | None:
        try:
            logits = predict_all(network, other, split, device=device, samples=samples)
        except (RuntimeError, AssertionError, ValueError, UserError):
            return None  # a size that the network cannot take
        predictions = logits.argmax(1).numpy()
        return Trial(setting, int((predictions == labels).sum()), len(labels), advice)

    base = trial(spec, "", "")
    assert base is not None, "the network ran on these images before"
    pretrained_size = pretrained_input.size if pretrained_input else None
    normalisations = (
        trial(
            replace(spec, mean=mean, std=std),
            name,
            f"The likeliest cause is the normalisation: the teacher was trained on {name}. Set "
            f"`mean: {_shown(mean)}` and `std: {_shown(std)}` in `teacher.network`.",
        )
        for name, mean, std in _normalisations(spec, dataset, pretrained_input)
    )
    sizes = (
        trial(
            replace(spec, size=size),
            f"{size} pixels" + (" (of its pretraining)" if size == pretrained_size else ""),
            f"The likeliest cause is the input size: set `input_size: {size}` in "
            "`teacher.network`.",
        )
        for size in _sizes(spec, dataset, pretrained_input)
    )
    return base, [t for t in normalisations if t], [t for t in sizes if t]


def _normalisations(
    spec: InputSpec, dataset: Dataset, pretrained_input: InputSpec | None
) -> Iterator[tuple[str, Sequence[float], Sequence[float]]]:
    known = {
        **_NORMALISATIONS,
        "the training images' mean and std": (dataset.mean, dataset.std),
    }
    if pretrained_input:
        known["its pretraining's mean and std"] = (pretrained_input.mean, pretrained_input.std)
    seen = [(list(spec.mean), list(spec.std))]
    for name, values in known.items():
        mean, std = (list(v) * (spec.channels if len(v) == 1 else 1) for v in values)
        if len(mean) == spec.channels and not any(
            np.allclose(mean, m, atol=1e-3) and np.allclose(std, s, rtol=1e-2) for m, s in seen
        ):
            seen.append((mean, std))
            yield name, mean, std


def _sizes(spec: InputSpec, dataset: Dataset, pretrained_input: InputSpec | None) -> list[int]:
    sizes = {dataset.image_size, spec.size // 2, 2 * spec.size}
    if pretrained_input:
        sizes.add(pretrained_input.size)
    return sorted(size for size in sizes - {spec.size} if 8 <= size <= _LARGEST_SIZE)


def _shown(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
