"""The accuracy gate: refuse a teacher that knows little, before the cache depends on it.

`python -m pipeline.commands.diagnose_teacher` looks for the cause. The gate looks for the commonest
one alone, the order of the classes, which needs no forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from torch import Tensor

from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER

SIGNIFICANCE = 1e-3  # of the one-sided binomial tests
_PAIRS = 3  # of classes, in a message


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

    def is_better_than(self, accuracy: float) -> bool:
        return _p_value(self.correct, self.total, accuracy) <= SIGNIFICANCE


def check(
    dataset: Dataset,
    logits: Tensor,
    *,
    minimum_accuracy: float | None,
    fallback_hint: str,
    imported: bool = False,
) -> None:
    """Refuse a teacher that is not significantly better than always predicting the majority class.

    Args:
        logits: [N, num_classes] float32, of the validation images without augmentation.
        minimum_accuracy: on validation, between 0 and 1, or None.
        fallback_hint: what to do if another order of the classes does not explain a low accuracy.
        imported: the logits are of no network that the project runs.

    Raises:
        UserError: validation accuracy is below the minimum, or not significantly above the share
            of the majority class; names the order of the classes if that explains it.
    """
    labels = dataset.splits["validation"].labels
    predictions = logits.argmax(1).numpy()
    correct, total = int((predictions == labels).sum()), len(labels)
    majority = majority_share(labels)
    expected = _unmet_requirement(correct, total, majority, minimum_accuracy)
    if expected is None:
        return
    order = in_another_order(predictions, labels, dataset.class_names, imported)
    explained = order.is_better_than(max(correct / total, majority))
    more = "entropy" if imported else "accuracy with other normalisations and input sizes"
    raise UserError(
        f"teacher accuracy on validation: {correct / total:.2%} ({correct:,} of {total:,}); "
        f"expected {expected}. `{TEACHER.model}` is unchanged.\n"
        f"  classes in the best other order: {order.setting} {order.accuracy:.2%}\n"
        f"{order.advice if explained else f'No other order explains it. {fallback_hint}'}\n"
        f"Run `python -m pipeline.commands.diagnose_teacher` to see its {more}."
    )


def majority_share(labels: np.ndarray) -> float:
    return np.bincount(labels).max() / len(labels)


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


def in_another_order(
    predictions: np.ndarray, labels: np.ndarray, class_names: Sequence[str], imported: bool
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
        "The likeliest cause is the names of the classes: they are not those of their columns. "
        f"{pairs}. Name each column of logits after its class."
        if imported
        else "The likeliest cause is the order of the classes: the teacher's logits must be in the "
        f"order of the folders' names, {', '.join(class_names[:_PAIRS])}, .... {pairs}. Reorder "
        "the rows of its last layer, or rename the folders."
    )
    return Trial(pairs or "none is better,", correct, len(labels), advice)


def _assignment(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """For each class the class that the teacher predicts for it, one to one: [C]."""
    confusion = np.zeros((num_classes, num_classes))
    np.add.at(confusion, (labels, predictions), 1)
    confusion += 1e-6 * np.eye(num_classes)  # a class without images stays itself
    return linear_sum_assignment(confusion, maximize=True)[1]
