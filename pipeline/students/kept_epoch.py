"""Which epoch's weights a training keeps: decided after each epoch, on the validation images.

The highest of many noisy accuracies is partly luck, and training longer is not: of the epochs that
validation cannot tell from the best, the latest is kept.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

SIGNIFICANCE = 0.05


def is_best(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether the last epoch is the best so far: by accuracy, then by NLL; the first of equals."""
    return all(_quality(history[-1]) > _quality(entry) for entry in history[:-1])


def is_kept(
    rule: str, history: Sequence[Mapping[str, float]], correct: Tensor, best_correct: Tensor
) -> bool:
    """Whether the rule keeps the last epoch instead of the one kept before.

    Args:
        rule: a value of `training.keep`.
        correct: [N] bool, whether the last epoch classifies each validation image correctly.
        best_correct: the same for the best epoch so far.
    """
    if rule == "last" or is_best(history):
        return True
    return rule == "latest_not_worse" and mcnemar_p_value(correct, best_correct) >= SIGNIFICANCE


def mcnemar_p_value(first: Tensor, second: Tensor) -> float:
    """Compute the exact two-sided p-value of McNemar's test, as the comparison of students does.

    Args:
        first, second: [N] bool, whether each epoch classifies an image correctly.
    """
    from scipy.stats import binomtest  # noqa: PLC0415  (a training starts sooner without it)

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def _quality(entry: Mapping[str, float]) -> tuple[float, float]:
    return entry["validation_accuracy"], -entry["validation_nll"]
