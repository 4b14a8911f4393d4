"""Whether predictions agree with labels more than by chance: of all classes, and of any one."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, hypergeom

SIGNIFICANCE = 1e-3  # of each of the two tests


@dataclass(frozen=True)
class Agreement:
    """Two one-sided tests against predictions that are independent of the labels."""

    by_chance: float  # the accuracy that these predictions have by chance, as in Cohen's kappa
    p_accuracy: float  # binomial test of the accuracy against that
    p_class: float  # the least p-value of Fisher's exact tests of each class, by Bonferroni

    @property
    def is_significant(self) -> bool:
        return min(self.p_accuracy, self.p_class) <= SIGNIFICANCE


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the images by label (rows) and prediction (columns): [C, C] int64."""
    cells = labels.astype(np.int64) * num_classes + predictions
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def compare_with_chance(confusion: np.ndarray) -> Agreement:
    """Test the diagonal of a confusion matrix, [C, C], given the sums of its rows and columns.

    The first test sees a little knowledge of many classes, the second good knowledge of one. The
    number of right images varies less if the labels are permuted than in the binomial distribution
    (by N * sum(a * b * (a + b)) - 2 * (sum(a * b))**2, where a and b are the shares of labels and
    predictions; it is never negative), so the first is conservative. The second is exact.
    """
    labels, predictions = confusion.sum(1), confusion.sum(0)
    total, right = int(labels.sum()), np.diag(confusion)
    if total == 0:
        return Agreement(0.0, 1.0, 1.0)
    by_chance = float(labels @ predictions.astype(float)) / total**2
    tested = (labels > 0) & (predictions > 0)
    p_classes = hypergeom.sf(right[tested] - 1, total, labels[tested], predictions[tested])
    p_class = min(1.0, len(p_classes) * p_classes.min()) if len(p_classes) else 1.0
    return Agreement(by_chance, float(binom.sf(right.sum() - 1, total, by_chance)), p_class)


def images_for_perfection(class_counts: np.ndarray) -> int:
    """The number of images, of classes as frequent as these, on which a teacher that is always
    right is significantly better than chance."""
    shares = class_counts / class_counts.sum()
    by_chance = float((shares**2).sum())
    if by_chance >= 1:
        return 0
    return int(np.ceil(np.log(SIGNIFICANCE) / np.log(by_chance)))


def images_for(accuracy: float, by_chance: float, largest: int) -> int | None:
    """The number of images from which this accuracy is significantly better than chance; None if
    `largest` are too few."""
    totals = np.arange(1, largest + 1)
    right = np.floor(accuracy * totals)
    too_few = totals[binom.sf(right - 1, totals, by_chance) > SIGNIFICANCE]
    enough = int(too_few.max(initial=0)) + 1
    return enough if enough <= largest else None
