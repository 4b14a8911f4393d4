"""Compare models: every metric, and which differences are significant.

Arithmetic on logits; reads and writes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from sklearn.metrics import f1_score, recall_score

from pipeline.comparison import metrics
from pipeline.comparison.decision import Decision, decide
from pipeline.comparison.measurement import statistics
from pipeline.comparison.measurement.statistics import PairedDifference
from pipeline.comparison.robustness import RobustComparison, Robustness
from pipeline.runtime.outputs import Precision

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
    precision: Precision = "float32"
    path: str | None = None  # of the file; None: there is none


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
    precision: Precision
    path: str | None  # of the file; None: there is none
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
class Comparison:
    class_names: Sequence[str]
    labels: np.ndarray  # [N] of the test images
    teacher: ModelMetrics
    gains: Mapping[str, PairedDifference[ModelMetrics]]  # by student: distilled minus baseline
    #: Of distilled students, with adjusted p-values (Holm).
    pairs: Sequence[PairedDifference[ModelMetrics]]
    decision: Decision | None  # which file to ship; None if there is no file
    robustness: RobustComparison

    @property
    def models(self) -> list[ModelMetrics]:
        """The teacher, then each student's distilled and baseline networks."""
        return [self.teacher, *(m for g in self.gains.values() for m in (g.first, g.second))]


def model_metrics(
    model: Predictions,
    teacher: Predictions,
    labels: Mapping[str, np.ndarray],
    interval: np.ndarray,
    robust: Robustness | None,
) -> ModelMetrics:
    """Compute every metric.

    Args:
        labels: `validation` and `test`, [N] each.
        interval: [2], of the accuracy.
    """
    test, classes = labels["test"], range(model.test.shape[1])
    decisions = model.test.argmax(1)
    correct = decisions == test
    divergences = metrics.kl_divergence(teacher.test, model.test)
    temperature = metrics.fitted_temperature(model.validation, labels["validation"])
    scaled = None if temperature is None else model.test.astype(np.float64) / temperature
    return ModelMetrics(
        name=model.name,
        role=model.role,
        accuracy=float(correct.mean()),
        low=float(interval[0]),
        high=float(interval[1]),
        top5=float(metrics.top_k_correct(model.test, test, 5).mean()),
        nll=float(metrics.nll(model.test, test).mean()),
        ece=metrics.calibration_error(model.test, test),
        temperature=temperature,
        ece_scaled=None if scaled is None else metrics.calibration_error(scaled, test),
        # Over the classes that are a label or a prediction at least once.
        macro_f1=float(f1_score(test, decisions, average="macro")),
        agreement=float((decisions == teacher.test.argmax(1)).mean()),
        kl=float(divergences.mean()),
        precision=model.precision,
        path=model.path,
        robust_accuracy=None if robust is None else robust.accuracy,
        decisions=decisions,
        correct=correct,
        divergences=divergences,
        class_accuracy=recall_score(
            test, decisions, labels=classes, average=None, zero_division=np.nan
        ),
        reliability=metrics.reliability(model.test, test),
        **{cost: getattr(model, cost) for cost in COSTS},
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
    correct = np.stack([p.test.argmax(1) == labels["test"] for p in predictions], 1)
    means = statistics.bootstrap_means(correct)  # [resamples, models]
    intervals = statistics.interval(means).T
    models = [
        model_metrics(model, teacher, labels, interval, robust)
        for model, interval, robust in zip(predictions, intervals, robustness.models, strict=True)
    ]

    def difference(i: int, j: int) -> PairedDifference[ModelMetrics]:
        first, second = models[i], models[j]
        low, high = statistics.interval(means[:, i] - means[:, j])
        return PairedDifference(
            first=first,
            second=second,
            # From integers, so that 0.1 is not 0.09999999999999998.
            gain=(int(first.correct.sum()) - int(second.correct.sum())) / len(first.correct),
            low=float(low),
            high=float(high),
            p_value=statistics.mcnemar(first.correct, second.correct),
        )

    distilled = range(1, len(models), 2)  # each before its baseline
    gains = {name: difference(i, i + 1) for name, i in zip(students, distilled, strict=True)}
    pairs = [difference(i, j) for i, j in combinations(distilled, 2)]
    adjusted = statistics.holm([pair.p_value for pair in pairs])
    return Comparison(
        class_names=class_names,
        labels=labels["test"],
        teacher=models[0],
        gains=gains,
        pairs=[replace(pair, p_value=p) for pair, p in zip(pairs, adjusted, strict=True)],
        decision=decide(models, difference),
        robustness=robustness,
    )
