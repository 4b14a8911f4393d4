"""The best other order of the classes, and whether it is significantly better than the given one.

Two orders are compared on the images on which they differ, by an exact sign test (McNemar's):
images that are right in the other order alone, against those that are right in the given order
alone.
Three kinds of orders are tested, each so that many candidates do not make a good one by chance:

- usual orders of the names, such as the natural one, by Bonferroni;
- every swap of two classes, by Bonferroni;
- the best of all orders, found on one half of the images and measured on the other, in turn.

A teacher that predicts one class for the images of two, the rarer one, has more right images if the
two are swapped. So the moved classes must also agree with the predictions more than by chance.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom

from pipeline.initial_weights.class_rows import classes_among, imagenet_names
from pipeline.teacher.chance import compare_with_chance, confusion_matrix

SIGNIFICANCE = 1e-3  # of an order that refuses a teacher
LIKELY = 0.05  # of an order that explains a low accuracy, and of each cycle of classes in it
_KINDS = 3  # of orders that are tested
_SHOWN = 12  # pairs or names in a message


@dataclass(frozen=True)
class OtherOrder:
    """An order of the classes other than that of the folders' names."""

    predicted_as: np.ndarray  # [C]: the class that the teacher predicts for each class
    correct: int  # images, as far as possible of a half on which the order was not found
    total: int
    p_value: float  # if the given order were as good
    class_names: Sequence[str]
    name: str | None  # of the order, if it is a usual one

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    def in_words(self) -> str:
        """The pairs of classes, and the usual order that explains them."""
        names, order = self.class_names, self.predicted_as
        moved = np.flatnonzero(order != np.arange(len(order)))
        pairs = [f"images of `{names[c]}` are predicted as `{names[order[c]]}`" for c in moved]
        if not pairs:
            return "no other order is better"
        text = _first(pairs)
        if self.name is None:
            return text
        in_order = [names[c] for c in np.argsort(order)]
        return f"the outputs are in {self.name} ({_first(in_order)}): {text}"


def _first(texts: Sequence[str]) -> str:
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f", and {more} more" if more > 0 else "")


def best_other_order(
    predictions: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> OtherOrder:
    """Find the order in which most images are right.

    Args:
        predictions: [N] class numbers, in the given order.
        labels: [N] class numbers.
    """
    confusion = confusion_matrix(predictions, labels, len(class_names))
    correct, searched_p = _search_by_halves(predictions, labels, len(class_names))
    swaps, swaps_p = _best_swaps(confusion)
    found, name = _clear_cycles(confusion, _best_assignment(confusion)), None
    if swaps_p < searched_p:
        found, correct = swaps, _correct(confusion, swaps)
    named_p = 1.0
    for order_name, order in (named := _usual_orders(class_names)).items():
        named_p = min(named_p, len(named) * _sign_test(confusion, order))
        if _correct(confusion, order) >= correct:
            found, correct, name = order, _correct(confusion, order), order_name
    p_value = min(1.0, _KINDS * min(named_p, swaps_p, searched_p))
    p_value = max(p_value, _sign_test(confusion, found))
    if not _is_associated(confusion, found):
        p_value = 1.0
    if name is None and p_value <= LIKELY:  # not before: it imports torchvision
        order = _order_of_imagenet(class_names)
        if order is not None and _correct(confusion, order) >= correct:
            found, name = order, "ImageNet's order"
    return OtherOrder(found, correct, int(confusion.sum()), p_value, class_names, name)


def _correct(confusion: np.ndarray, order: np.ndarray) -> int:
    return int(confusion[np.arange(len(order)), order].sum())


def _sign_test(confusion: np.ndarray, order: np.ndarray) -> float:
    """The p-value of the order against the given one, on the images on which they differ."""
    moved = np.flatnonzero(order != np.arange(len(order)))
    gains = confusion[moved, order[moved]].sum()
    losses = confusion[moved, moved].sum()
    return float(binom.sf(gains - 1, gains + losses, 0.5))


def _is_associated(confusion: np.ndarray, order: np.ndarray) -> bool:
    """Whether the predictions of the moved classes agree with these more than by chance."""
    moved = np.flatnonzero(order != np.arange(len(order)))
    agreement = compare_with_chance(confusion[np.ix_(moved, order[moved])])
    return min(agreement.p_accuracy, agreement.p_class) <= LIKELY


def _best_assignment(confusion: np.ndarray) -> np.ndarray:
    """For each class the class that the teacher predicts for it, one to one: [C]."""
    preferred = confusion + 1e-6 * np.eye(len(confusion))  # a class without images stays itself
    return linear_sum_assignment(preferred, maximize=True)[1]


def _search_by_halves(
    predictions: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[int, float]:
    """The right images in the best order of the other half of the images, and the p-value."""
    half = np.empty(len(labels), int)
    half[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % 2
    correct = gains = losses = 0
    for part in (0, 1):
        own, other = (
            confusion_matrix(predictions[half == p], labels[half == p], num_classes)
            for p in (part, 1 - part)
        )
        order = _best_assignment(own)
        moved = np.flatnonzero(order != np.arange(num_classes))
        correct += _correct(other, order)
        gains += other[moved, order[moved]].sum()
        losses += other[moved, moved].sum()
    return correct, float(binom.sf(gains - 1, gains + losses, 0.5))


def _best_swaps(confusion: np.ndarray) -> tuple[np.ndarray, float]:
    """The best swap of two classes and all others that are likely beside it, and the p-value of the
    best."""
    num_classes, right = len(confusion), np.diag(confusion)
    gains, losses = confusion + confusion.T, right[:, None] + right
    first, second = np.nonzero(np.triu(gains > losses, 1))
    gains, losses = gains[first, second], losses[first, second]
    p_values = binom.sf(gains - 1, gains + losses, 0.5) * num_classes * (num_classes - 1) / 2
    order = np.arange(num_classes)
    ranked = np.argsort(p_values, kind="stable")
    for rank, pair in enumerate(ranked):
        a, b = first[pair], second[pair]
        if (rank and p_values[pair] > LIKELY) or rank >= num_classes**2:
            break
        if order[a] == a and order[b] == b:
            order[a], order[b] = b, a
    return order, float(p_values[ranked[0]]) if len(ranked) else 1.0


def _clear_cycles(confusion: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The order with only those of its cycles that are likely by themselves; all if none is."""
    clear = np.arange(len(order))
    for cycle in _cycles(order):
        alone = np.arange(len(order))
        alone[cycle] = order[cycle]
        if _sign_test(confusion, alone) <= LIKELY and _is_associated(confusion, alone):
            clear[cycle] = order[cycle]
    return order if (clear == np.arange(len(order))).all() else clear


def _cycles(order: np.ndarray) -> Iterator[list[int]]:
    """The classes that replace one another, for each round of more than one."""
    seen: set[int] = set()
    for start in map(int, np.flatnonzero(order != np.arange(len(order)))):
        cycle, at = [], start
        while at not in seen:
            seen.add(at)
            cycle.append(at)
            at = int(order[at])
        if cycle:
            yield cycle


def _usual_orders(class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """By name, each order in which libraries and file managers list the names, as the place of each
    class in it: [C]. Without the given order, and each once."""
    orders: dict[str, np.ndarray] = {}
    for name, key in _USUAL_KEYS.items():
        order = np.empty(len(class_names), int)
        order[sorted(range(len(order)), key=lambda c, key=key: key(class_names[c]))] = np.arange(
            len(order)
        )
        known = [np.arange(len(order)), *orders.values()]
        if not any((order == other).all() for other in known):
            orders[name] = order
    return orders


def _order_of_imagenet(class_names: Sequence[str]) -> np.ndarray | None:
    """The place of each class among ImageNet's, [C], if all are among these."""
    numbers = classes_among(class_names, imagenet_names())
    return None if numbers is None else np.argsort(np.argsort(numbers))


def _natural(name: str) -> list[tuple[bool, Any]]:
    parts = re.split(r"([0-9]+)", name)  # every second one is a number
    return [
        (not number, int(part) if number else part)
        for number, part in ((i % 2 == 1, part) for i, part in enumerate(parts))
        if part
    ]


def _letters(name: str) -> str:
    return re.sub(r"\W|_", "", name.casefold())


_USUAL_KEYS: dict[str, Callable[[str], Any]] = {
    "natural order": _natural,
    "alphabetical order that ignores case": str.casefold,
    "natural order that ignores case": lambda name: _natural(name.casefold()),
    "alphabetical order that ignores case and punctuation": _letters,
    "natural order that ignores case and punctuation": lambda name: _natural(_letters(name)),
}
