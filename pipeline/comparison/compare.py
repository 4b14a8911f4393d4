"""Models beside one another: every measure, and which differences are more than noise.

Arithmetic on logits; reads and writes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from pipeline.comparison import metrics as measures
from pipeline.comparison import statistics
from pipeline.comparison.robustness import RobustComparison

ALPHA = 1 - statistics.LEVEL


@dataclass(frozen=True)
class Predictions:
    """What one network answers, and what it costs."""

    name: str  # of the student; or "teacher"
    role: str  # teacher | distilled | baseline
    validation: np.ndarray  # [N_validation, C] raw logits
    test: np.ndarray  # [N, C] raw logits
    # of a teacher that is no network but a table or a store of logits: None
    parameters: int | None
    macs: int | None
    size_bytes: int | None


@dataclass(frozen=True)
class ModelMetrics:
    """One network's figures on the test images. Shares are in [0, 1], NLL and KL in nats."""

    name: str
    role: str
    accuracy: float
    low: float  # of the accuracy's 95 % interval
    high: float
    top5: float
    nll: float
    ece: float
    temperature: float | None  # fitted to the validation images; None: it has no minimum
    ece_scaled: float | None
    macro_f1: float
    agreement: float  # with the teacher's decisions
    kl: float  # KL(teacher || model), mean
    parameters: int | None  # as of Answers
    macs: int | None
    size_bytes: int | None
    decisions: np.ndarray  # [N]
    right: np.ndarray  # [N] bool
    divergences: np.ndarray  # [N] KL(teacher || model)
    class_accuracy: np.ndarray  # [C], NaN for a class without test images
    reliability: np.ndarray  # [15, 3] count, mean confidence, accuracy

    @property
    def figures(self) -> dict[str, Any]:
        """What is not an array."""
        return {k: v for k, v in vars(self).items() if not isinstance(v, np.ndarray)}


@dataclass(frozen=True)
class PairedDifference:
    """The accuracy of `first` less that of `second`, on the same test images."""

    first: ModelMetrics
    second: ModelMetrics
    gain: float
    low: float  # of the gain's 95 % interval
    high: float
    p_value: float  # McNemar's, two-sided

    @property
    def within_noise(self) -> bool:
        return within_noise(self.low, self.high, self.p_value)


@dataclass(frozen=True)
class Comparison:
    class_names: Sequence[str]
    labels: np.ndarray  # [N] of the test images
    teacher: ModelMetrics
    gains: Mapping[str, PairedDifference]  # by student: distilled less baseline
    pairs: Sequence[PairedDifference]  # of distilled students; p-values adjusted for being several
    ship: "Recommendation"
    robustness: RobustComparison | None = None  # None: no network was shown corrupted images

    @property
    def models(self) -> list[ModelMetrics]:
        """The teacher, then each student's distilled and baseline networks."""
        students = [(gain.first, gain.second) for gain in self.gains.values()]
        return [self.teacher, *(model for pair in students for model in pair)]


@dataclass(frozen=True)
class Recommendation:
    """The smallest network that cannot be told from the most accurate one."""

    chosen: ModelMetrics
    best: ModelMetrics
    difference: PairedDifference  # chosen less best


def within_noise(low: float, high: float, p_value: float) -> bool:
    """Whether a gain is no more than the choice of test images may give.

    Its interval holds 0, or McNemar's test does not reject. (The interval's rate is that of large
    samples; where few images differ, the test is the stricter of the two.)
    """
    return low <= 0 <= high or p_value >= ALPHA


def model_metrics(
    model: Predictions, teacher: Predictions, labels: Mapping[str, np.ndarray]
) -> ModelMetrics:
    """All but the interval, which needs every model's resamples: `low` and `high` are NaN.

    Args:
        labels: `validation` and `test`, [N] each.
    """
    test, num_classes = labels["test"], model.test.shape[1]
    decisions = model.test.argmax(1)
    right = decisions == test
    divergences = measures.kl_divergence(teacher.test, model.test)
    temperature = measures.fitted_temperature(model.validation, labels["validation"])
    return ModelMetrics(
        name=model.name,
        role=model.role,
        accuracy=float(right.mean()),
        low=np.nan,
        high=np.nan,
        top5=float(measures.top_k_correct(model.test, test, 5).mean()),
        nll=float(measures.nll(model.test, test).mean()),
        ece=measures.calibration_error(model.test, test),
        temperature=temperature,
        ece_scaled=None
        if temperature is None
        else measures.calibration_error(model.test.astype(np.float64) / temperature, test),
        macro_f1=measures.macro_f1(decisions, test, num_classes),
        agreement=float((decisions == teacher.test.argmax(1)).mean()),
        kl=float(divergences.mean()),
        parameters=model.parameters,
        macs=model.macs,
        size_bytes=model.size_bytes,
        decisions=decisions,
        right=right,
        divergences=divergences,
        class_accuracy=measures.class_accuracy(decisions, test, num_classes),
        reliability=measures.reliability(model.test, test),
    )


def compare(
    teacher: Predictions,
    students: Mapping[str, tuple[Predictions, Predictions]],
    labels: Mapping[str, np.ndarray],
    class_names: Sequence[str],
) -> Comparison:
    """Everything that the report tells.

    Args:
        students: by name, the distilled network and its baseline.
        labels: `validation` and `test`, [N] each.
    """
    answers = [teacher, *(model for pair in students.values() for model in pair)]
    measured = [model_metrics(model, teacher, labels) for model in answers]
    means = statistics.bootstrap_means(np.stack([model.right for model in measured], 1))
    measured = [
        replace(model, low=float(low), high=float(high))
        for model, (low, high) in zip(measured, statistics.interval(means).T, strict=True)
    ]
    columns = {(model.name, model.role): i for i, model in enumerate(measured)}

    def difference(first: ModelMetrics, second: ModelMetrics) -> PairedDifference:
        one, two = (columns[model.name, model.role] for model in (first, second))
        low, high = statistics.interval(means[:, one] - means[:, two])
        return PairedDifference(
            first=first,
            second=second,
            # Of whole numbers, so that 0.1 is not 0.09999999999999998.
            gain=(int(first.right.sum()) - int(second.right.sum())) / len(first.right),
            low=float(low),
            high=float(high),
            p_value=statistics.mcnemar(first.right, second.right),
        )

    gains = {name: difference(*measured[1 + 2 * i : 3 + 2 * i]) for i, name in enumerate(students)}
    pairs = [difference(a.first, b.first) for a, b in combinations(gains.values(), 2)]
    adjusted = statistics.holm([pair.p_value for pair in pairs])
    best = max(measured[1:], key=lambda model: (model.accuracy, -model.parameters))
    equals = [model for model in measured[1:] if difference(model, best).within_noise]
    chosen = min(equals, key=lambda model: (model.parameters, model.macs, -model.accuracy))
    return Comparison(
        class_names=class_names,
        labels=labels["test"],
        teacher=measured[0],
        gains=gains,
        pairs=[replace(pair, p_value=p) for pair, p in zip(pairs, adjusted, strict=True)],
        ship=Recommendation(chosen, best, difference(chosen, best)),
    )


def pareto_front(
    models: Sequence[ModelMetrics], cost: Callable[[ModelMetrics], float]
) -> list[ModelMetrics]:
    """The models that no other matches or beats in both accuracy and cost, cheapest first."""
    front: list[ModelMetrics] = []
    known = [model for model in models if cost(model) is not None]
    for model in sorted(known, key=lambda model: (cost(model), -model.accuracy)):
        if not front or model.accuracy > front[-1].accuracy:
            front.append(model)
    return front
