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
from pipeline.teacher.params import TeacherParams

SIGNIFICANCE = 1e-3  # of the one-sided binomial tests
_PAIRS = 3  # of classes, in a message
#: By `teacher.weights`: what to do about a low accuracy that nothing else explains.
FALLBACK_HINTS = {
    "train": "Train it longer (`teacher.training.epochs`), or with another `learning_rate`.",
    "pretrained": "Check that its logits are for the classes of the folders, or train it longer.",
    "checkpoint": "Check that `teacher.checkpoint` was trained for these classes and images.",
    "logits": "Check that each row has the id of its own image, and that the classes are the same.",
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

    def is_better_than(self, accuracy: float) -> bool:
        return _p_value(self.correct, self.total, accuracy) <= SIGNIFICANCE


def check(dataset: Dataset, logits: Tensor, params: TeacherParams) -> None:
    """Refuse a teacher that is not significantly better than always predicting the majority class.

    Args:
        logits: [N, num_classes] float32, of the validation images without augmentation.

    Raises:
        UserError: validation accuracy is below the minimum, or not significantly above the share
            of the majority class; names the order of the classes if that explains it.
    """
    labels = dataset.splits["validation"].labels
    predictions = logits.argmax(1).numpy()
    correct, total = int((predictions == labels).sum()), len(labels)
    majority = majority_share(labels)
    if params.minimum_accuracy is not None and correct < params.minimum_accuracy * total:
        expected = f"`teacher.minimum_accuracy`, {params.minimum_accuracy:.2%}, or more"
    elif majority**total > SIGNIFICANCE:
        print(
            f"  {total} validation images of these classes are too few to tell a good teacher from "
            "a bad one"
        )
        return
    elif _p_value(correct, total, majority) > SIGNIFICANCE:
        expected = (
            f"significantly more than {majority:.2%}, the share of the majority class (one-sided "
            f"binomial test at {SIGNIFICANCE})"
        )
    else:
        return
    imported = params.weights == "logits"
    order = in_another_order(predictions, labels, dataset.class_names, imported)
    if order.is_better_than(max(correct / total, majority)):
        advice = order.advice
    else:
        advice = f"No other order explains it. {FALLBACK_HINTS[params.weights]}"
    more = "entropy" if imported else "accuracy with other normalisations and input sizes"
    raise UserError(
        f"teacher accuracy on validation: {correct / total:.2%} ({correct:,} of {total:,}); "
        f"expected {expected}. `{TEACHER.model}` is unchanged.\n"
        f"  classes in the best other order: {order.setting} {order.accuracy:.2%}\n"
        f"{advice}\nRun `python -m pipeline.commands.diagnose_teacher` to see its {more}."
    )


def majority_share(labels: np.ndarray) -> float:
    return np.bincount(labels).max() / len(labels)


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
