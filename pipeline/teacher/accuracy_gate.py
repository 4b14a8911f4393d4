"""The accuracy gate: refuse a teacher that knows little, or whose classes are in another order,
before the cache depends on it.

`python -m pipeline.commands.diagnose_teacher` looks for the cause. The gate tries the order of the
classes alone, which needs no forward pass.
"""

import numpy as np
from torch import Tensor

from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.teacher import class_order
from pipeline.teacher.chance import (
    SIGNIFICANCE,
    Agreement,
    compare_with_chance,
    confusion_matrix,
    images_for,
    images_for_perfection,
)
from pipeline.teacher.class_order import OtherOrder, best_other_order
from pipeline.teacher.params import TeacherParams

_FEW = 10  # times as many images that would do are worth a line
#: By `teacher.weights`: what to do about a low accuracy that nothing else explains.
FALLBACK_HINTS = {
    "train": "Train it longer (`teacher.training.epochs`), or with another `learning_rate`.",
    "pretrained": "Check that its logits are for the classes of the folders, or train it longer.",
    "checkpoint": "Check that `teacher.checkpoint` was trained for these classes and images.",
    "logits": "Check that each row has the id of its own image, and that the classes are the same.",
}
_OWN_ORDER = (
    "The likeliest cause is the labels of validation: the teacher has learnt the classes from "
    "train. Compare the class folders of both."
)
#: By `teacher.weights`: what to do about classes in another order.
ORDER_HINTS = {
    "train": _OWN_ORDER,
    "pretrained": _OWN_ORDER,
    "checkpoint": "The likeliest cause is the order of the classes. Set "
    "`teacher.checkpoint_classes`: for each class, in the order of the folders' names, the number "
    "of its output.",
    "logits": "The likeliest cause is the names of the classes: they are not those of their "
    "columns. Name each column of logits after its class.",
}


def check(dataset: Dataset, logits: Tensor, params: TeacherParams) -> None:
    """Refuse a teacher that knows no class better than chance (or, with `minimum_accuracy`, one
    below that), and one that is significantly better with its classes in another order.

    Args:
        logits: [N, num_classes] float32, of the validation images without augmentation.

    Raises:
        UserError: says what was measured, what was expected, and what was tried.
    """
    labels = dataset.splits["validation"].labels
    predictions = logits.argmax(1).numpy()
    confusion = confusion_matrix(predictions, labels, dataset.num_classes)
    correct, total = int(np.diag(confusion).sum()), len(labels)
    order = best_other_order(predictions, labels, dataset.class_names)
    measured = f"teacher accuracy on validation: {correct / total:.2%} ({correct:,} of {total:,})"
    unchanged = f"`{TEACHER.model}` is unchanged."
    minimum, expected = params.minimum_accuracy, None
    if minimum is None:
        expected = _expected_by_the_tests(confusion)
    elif correct / total < minimum:  # 0.55 * 100 is more than 55
        expected = f"`teacher.minimum_accuracy`, {minimum:.2%}, or more"
    if expected is not None:
        raise UserError(
            f"{measured}; expected {expected}. {unchanged}\n"
            f"{explain_order(order, params.weights)}\n{_what_next(order, params.weights)}"
        )
    if order.p_value <= class_order.SIGNIFICANCE:
        raise UserError(
            f"{measured}, but {order.accuracy:.2%} with the classes in another order; expected no "
            f"order that is significantly better than that of the folders' names (exact sign test "
            f"at {class_order.SIGNIFICANCE}). {unchanged}\n{explain_order(order, params.weights)}"
        )
    if order.p_value <= class_order.LIKELY:
        print(
            f"  the classes may be in another order (p = {order.p_value:.3f}; {total:,} validation "
            f"images are too few to be sure): {order.in_words()}"
        )


def explain_order(order: OtherOrder, weights: str) -> str:
    """A line about the best other order, and what to do if it is likely."""
    accuracy = f"  classes in the best other order: {order.accuracy:.2%}"
    if order.p_value > class_order.LIKELY:
        return f"{accuracy}, not significantly better"
    return f"{accuracy}; {order.in_words()}\n{ORDER_HINTS[weights]}"


def _what_next(order: OtherOrder, weights: str) -> str:
    hint = "" if order.p_value <= class_order.LIKELY else f"{FALLBACK_HINTS[weights]} "
    command = "Run `python -m pipeline.commands.diagnose_teacher`"
    if weights == "logits":
        return f"{hint}{command} to see the entropy of its predictions."
    return (
        f"{hint}Normalisations and input sizes were not tried. {command}: it tries them together "
        "with the order."
    )


def _expected_by_the_tests(confusion: np.ndarray) -> str | None:
    """What was expected of a teacher that the tests refuse; None for one that passes, or if the
    images are too few to refuse any."""
    class_counts = confusion.sum(1)
    total = int(class_counts.sum())
    if not compare_with_chance(np.diag(class_counts)).is_significant:
        enough = images_for_perfection(class_counts)
        print(
            f"  {total:,} validation images of these classes are too few to tell a good teacher "
            "from a bad one"
            + (f"; expected {enough:,} or more (`dataset.validation_fraction`)" if enough else "")
        )
        return None
    agreement = compare_with_chance(confusion)
    if agreement.is_significant:
        return None
    few = _if_few(agreement, int(np.diag(confusion).sum()) / total, total)
    return (
        f"significantly more than {agreement.by_chance:.2%}, which such predictions have by chance "
        f"(one-sided binomial test at {SIGNIFICANCE}), or a class that it finds better than by "
        f"chance (Fisher's exact test at {SIGNIFICANCE}, by Bonferroni){few}"
    )


def _if_few(agreement: Agreement, accuracy: float, total: int) -> str:
    enough = images_for(accuracy, agreement.by_chance, _FEW * total)
    if enough is None or enough <= total:
        return ""
    return (
        f"; {total:,} images are few: if this accuracy is its true one, {enough:,} would show that "
        "it is above chance"
    )
