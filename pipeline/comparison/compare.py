"""Compare models: every metric, and which differences are significant.

Arithmetic on logits; reads and writes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from pipeline.comparison import metrics, statistics
from pipeline.comparison.robustness import RobustComparison, Robustness

ALPHA = 1 - statistics.LEVEL
COSTS = ("parameters", "macs", "size_bytes")


@dataclass(frozen=True)
class Predictions:
    """One network's logits and costs."""

    name: str  # of the student; or "teacher"
    role: str  # teacher | distilled | baseline
    validation: np.ndarray  # [N_validation, C] raw logits
    test: np.ndarray  # [N, C] raw logits
    parameters: int | None  # costs are None for imported logits
    macs: int | None
    size_bytes: int | None


@dataclass(frozen=True)
class ModelMetrics:
    """One network's metrics on the test images. Shares are in [0, 1], NLL and KL in nats."""

    name: str
    role: str
    accuracy: float
    low: float  # of the accuracy's 95 % interval
    high: float
    top5: float
    nll: float
    ece: float
    temperature: float | None  # fitted to the validation images; None if NLL has no minimum
    ece_scaled: float | None
    macro_f1: float
    agreement: float  # share of test images with the teacher's prediction
    kl: float  # KL(teacher || model), mean
    parameters: int | None  # costs are None for imported logits
    macs: int | None
    size_bytes: int | None
    robust_accuracy: float | None  # None for imported logits: they cover clean images only
    decisions: np.ndarray  # [N]
    correct: np.ndarray  # [N] bool
    divergences: np.ndarray  # [N] KL(teacher || model)
    class_accuracy: np.ndarray  # [C], NaN for a class without test images
    reliability: np.ndarray  # [15, 3] count, mean confidence, accuracy

    @property
    def figures(self) -> dict[str, Any]:
        """All fields that are no arrays."""
        return {k: v for k, v in vars(self).items() if not isinstance(v, np.ndarray)}


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of `first` minus that of `second`, on the same test images."""

    first: ModelMetrics
    second: ModelMetrics
    gain: float
    low: float  # of the gain's 95 % interval
    high: float
    p_value: float  # McNemar's, two-sided

    @property
    def significant(self) -> bool:
        return is_significant(self.low, self.high, self.p_value)


@dataclass(frozen=True)
class Recommendation:
    """The smallest network that is not significantly less accurate than the best one."""

    chosen: ModelMetrics
    best: ModelMetrics
    difference: PairedDifference  # chosen minus best


@dataclass(frozen=True)
class Comparison:
    class_names: Sequence[str]
    labels: np.ndarray  # [N] of the test images
    teacher: ModelMetrics
    gains: Mapping[str, PairedDifference]  # by student: distilled minus baseline
    pairs: Sequence[PairedDifference]  # of distilled students; p-values adjusted (Holm)
    recommendation: Recommendation
    robustness: RobustComparison

    @property
    def models(self) -> list[ModelMetrics]:
        """The teacher, then each student's distilled and baseline networks."""
        students = [(gain.first, gain.second) for gain in self.gains.values()]
        return [self.teacher, *(model for pair in students for model in pair)]


def is_significant(low: float, high: float, p_value: float) -> bool:
    """Whether a gain's interval excludes 0 and McNemar's test rejects.

    The interval has its rate for large samples; the test is stricter if few images differ.
    """
    return not low <= 0 <= high and p_value < ALPHA


def model_metrics(
    model: Predictions,
    teacher: Predictions,
    labels: Mapping[str, np.ndarray],
    robust: Robustness | None,
) -> ModelMetrics:
    """Compute every metric but the interval: `low` and `high` are NaN until all models are drawn.

    Args:
        labels: `validation` and `test`, [N] each.
    """
    test, num_classes = labels["test"], model.test.shape[1]
    decisions = model.test.argmax(1)
    correct = decisions == test
    divergences = metrics.kl_divergence(teacher.test, model.test)
    temperature = metrics.fitted_temperature(model.validation, labels["validation"])
    return ModelMetrics(
        name=model.name,
        role=model.role,
        accuracy=float(correct.mean()),
        low=np.nan,
        high=np.nan,
        top5=float(metrics.top_k_correct(model.test, test, 5).mean()),
        nll=float(metrics.nll(model.test, test).mean()),
        ece=metrics.calibration_error(model.test, test),
        temperature=temperature,
        ece_scaled=None
        if temperature is None
        else metrics.calibration_error(model.test.astype(np.float64) / temperature, test),
        macro_f1=metrics.macro_f1(decisions, test),
        agreement=float((decisions == teacher.test.argmax(1)).mean()),
        kl=float(divergences.mean()),
        parameters=model.parameters,
        macs=model.macs,
        size_bytes=model.size_bytes,
        robust_accuracy=None if robust is None else robust.accuracy,
        decisions=decisions,
        correct=correct,
        divergences=divergences,
        class_accuracy=metrics.class_accuracy(decisions, test, num_classes),
        reliability=metrics.reliability(model.test, test),
    )


def compare(
    teacher: Predictions,
    students: Mapping[str, tuple[Predictions, Predictions]],
    labels: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    robustness: RobustComparison,
) -> Comparison:
    """Compare every student with its baseline, with the teacher, and with the other students.

    Args:
        students: by name, the distilled network and its baseline.
        labels: `validation` and `test`, [N] each.
    """
    predictions = [teacher, *(model for pair in students.values() for model in pair)]
    models = [
        model_metrics(model, teacher, labels, robustness.of(model.name, model.role))
        for model in predictions
    ]
    means = statistics.bootstrap_means(np.stack([model.correct for model in models], 1))
    models = [
        replace(model, low=float(low), high=float(high))
        for model, (low, high) in zip(models, statistics.interval(means).T, strict=True)
    ]
    means_of = {(model.name, model.role): means[:, i] for i, model in enumerate(models)}

    def difference(first: ModelMetrics, second: ModelMetrics) -> PairedDifference:
        first_means, second_means = (means_of[model.name, model.role] for model in (first, second))
        low, high = statistics.interval(first_means - second_means)
        return PairedDifference(
            first=first,
            second=second,
            # From integers, so that 0.1 is not 0.09999999999999998.
            gain=(int(first.correct.sum()) - int(second.correct.sum())) / len(first.correct),
            low=float(low),
            high=float(high),
            p_value=statistics.mcnemar(first.correct, second.correct),
        )

    gains = {name: difference(*models[1 + 2 * i : 3 + 2 * i]) for i, name in enumerate(students)}
    pairs = [difference(a.first, b.first) for a, b in combinations(gains.values(), 2)]
    adjusted = statistics.holm([pair.p_value for pair in pairs])
    best = max(models[1:], key=lambda model: (model.accuracy, -model.parameters))
    as_good = [model for model in models[1:] if not difference(model, best).significant]
    chosen = min(as_good, key=lambda model: (model.parameters, model.macs, -model.accuracy))
    return Comparison(
        class_names=class_names,
        labels=labels["test"],
        teacher=models[0],
        gains=gains,
        pairs=[replace(pair, p_value=p) for pair, p in zip(pairs, adjusted, strict=True)],
        recommendation=Recommendation(chosen, best, difference(chosen, best)),
        robustness=robustness,
    )


def pareto_front(
    models: Sequence[ModelMetrics], cost: Callable[[ModelMetrics], float]
) -> list[ModelMetrics]:
    """Select the models that no other matches in both accuracy and cost, cheapest first."""
    front: list[ModelMetrics] = []
    with_cost = [model for model in models if cost(model) is not None]
    for model in sorted(with_cost, key=lambda model: (cost(model), -model.accuracy)):
        if not front or model.accuracy > front[-1].accuracy:
            front.append(model)
    return front
