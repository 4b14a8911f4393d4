"""The comparison as figures for metrics/comparison.json and as tables for CSV files."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import numpy as np
import pandas as pd
from pydantic import AfterValidator

from pipeline.comparison.cache_economics import CacheFigures, Economics
from pipeline.comparison.compare import COSTS, Comparison, ModelMetrics
from pipeline.comparison.decision import Decision, Reason, TrainingReason
from pipeline.comparison.measurement.statistics import Gain, PairedDifference
from pipeline.comparison.starts import StartKind, different_starts
from pipeline.runtime.outputs import Precision, Role
from pipeline.runtime.validation import Record

MOST_CLASSES = 20  # that a heat map or bars show one by one
#: A share, nats or a difference, to 6 decimals.
Figure = Annotated[float, AfterValidator(lambda value: round(value, 6) + 0.0)]


class TeacherFigures(Record):
    accuracy: Figure
    ece: Figure
    ece_scaled: Figure | None
    macro_f1: Figure
    parameters: int | None  # costs are None for imported logits
    macs: int | None
    robust_accuracy: Figure | None = None  # absent without a network


class SeedTraining(Record):
    """The accuracies of a student and its baseline, of one seed."""

    seed: int
    accuracy: Figure
    baseline: Figure


class SeedFigures(Record):
    trainings: Sequence[SeedTraining]  # a list, which `dvc metrics` leaves out
    needed: int | None  # the fewest with which an equal gain is significant; None: over 100


class StudentFigures(Record):
    """A distilled network's; `gain` is over its baseline's accuracy. Of several seeds, means."""

    accuracy: Figure
    baseline: Figure
    gain: Figure
    gain_low: Figure
    gain_high: Figure
    p_value: Figure
    agreement: Figure
    kl: Figure
    ece: Figure
    ece_scaled: Figure | None
    macro_f1: Figure
    parameters: int
    macs: int
    robust_accuracy: Figure
    robust_gain: Figure
    robust_gain_low: Figure
    robust_gain_high: Figure
    robust_p_value: Figure = 0.0
    #: Over seeds and test images, or over test images where there is one seed.
    agreement_low: Figure
    agreement_high: Figure
    ece_low: Figure
    ece_high: Figure
    #: Absent with one seed.
    accuracy_deviation: Figure | None = None  # standard deviation between seeds
    baseline_deviation: Figure | None = None
    gain_deviation: Figure | None = None
    seeds: SeedFigures | None = None
    #: Of the distilled network and of its baseline; absent where they are equal or not recorded.
    optimiser_steps: int | None = None
    baseline_optimiser_steps: int | None = None
    #: What the network started from, and its baseline; absent where not recorded, and the
    #: baseline's where it is the same.
    start: str | None = None
    baseline_start: str | None = None

    @property
    def tested_gain(self) -> Gain:
        return Gain(gain=self.gain, low=self.gain_low, high=self.gain_high, p_value=self.p_value)

    @property
    def tested_robust_gain(self) -> Gain:
        return Gain(
            gain=self.robust_gain,
            low=self.robust_gain_low,
            high=self.robust_gain_high,
            p_value=self.robust_p_value,
        )


class DifferenceFigures(Record):
    """A difference of two accuracies on the same test images."""

    difference: Figure
    low: Figure  # of its 95 % interval
    high: Figure
    p_value: Figure

    @classmethod
    def of(cls, gain: Gain) -> Self:
        return cls(difference=gain.gain, low=gain.low, high=gain.high, p_value=gain.p_value)

    @property
    def tested(self) -> Gain:
        return Gain(gain=self.difference, low=self.low, high=self.high, p_value=self.p_value)


class FileFigures(Record):
    """An exported file."""

    path: str
    student: str
    role: Role
    precision: Precision
    bytes: int
    accuracy: Figure
    low: Figure  # of the accuracy's 95 % interval
    high: Figure


class OtherFileFigures(FileFigures):
    to_chosen: DifferenceFigures  # its accuracy minus that of the file to ship


class DecisionFigures(FileFigures):
    """The file to ship, and why: `Decision` has what the names mean."""

    teacher_bytes: int | None  # of the teacher's file; None if it has none
    to_teacher: DifferenceFigures  # its accuracy minus the teacher's
    below_teacher: bool  # significantly
    gain: DifferenceFigures | None  # distilled minus baseline, in its precision
    baseline_better: bool  # significantly, than distilled
    reason: Reason
    training: TrainingReason
    best: FileFigures  # the most accurate file; it may be this one
    to_best: DifferenceFigures
    runner_up: OtherFileFigures | None
    trade_off: OtherFileFigures | None
    start: str | None = None  # what its training started from; absent where not recorded
    #: Whether `gain` compares a file that `int8_training` trained on with one that it did not;
    #: absent where both are alike.
    unequal_training: bool = False


class FileRow(Record):
    """A network's file in the plot of accuracy against size."""

    network: str  # the student's name; or "teacher"
    role: Role
    precision: Precision
    accuracy: Figure
    low: Figure  # of the accuracy's 95 % interval
    high: Figure
    size_bytes: int | None  # None for a teacher without a file
    parameters: int | None
    macs: int | None


class Figures(Record):
    """metrics/comparison.json; keys that are absent are not written."""

    test_images: int
    decision: DecisionFigures | None  # None if there is no file to ship
    teacher: TeacherFigures
    students: Mapping[str, StudentFigures]
    #: The distilled students by the kind of their start; absent where all are of one kind.
    different_starts: Mapping[StartKind, list[str]] | None = None
    cache: CacheFigures | None = None  # absent for imported logits
    #: For `dvc plots`. As a list it is no metric: `dvc metrics` and `dvc exp show` leave it out.
    files: Sequence[FileRow] = ()


def headline_figures(
    comparison: Comparison,
    economics: Economics | None,
    steps: Mapping[str, tuple[int | None, int | None]],
) -> Figures:
    """Collect the figures to decide by.

    Args:
        steps: by student, the optimiser steps of the distilled network and of its baseline, None
            where not recorded.
    """

    def of_model(model: ModelMetrics, record: type[Record]) -> dict[str, Any]:
        figures = {name: v for name, v in model.figures.items() if name in record.model_fields}
        if model.robust_accuracy is None:
            figures.pop("robust_accuracy", None)
        return figures

    def of_seeds(name: str) -> dict[str, Any]:
        """Means over the seeds, if there are several."""
        if name not in comparison.seeds:
            return {}
        seeds = comparison.seeds[name]
        of_each = [of_model(model, StudentFigures) for model in seeds.distilled]
        means = {}
        for key in of_each[0]:
            values = [each[key] for each in of_each]
            if None in values:
                means[key] = None
            elif isinstance(values[0], float):
                means[key] = float(np.mean(values))
        accuracies = [[m.accuracy for m in role] for role in (seeds.distilled, seeds.baselines)]
        trainings = zip(seeds.seeds, *accuracies, strict=True)
        return means | {
            "baseline": float(np.mean(accuracies[1])),
            "accuracy_deviation": float(np.std(accuracies[0], ddof=1)),
            "baseline_deviation": float(np.std(accuracies[1], ddof=1)),
            "gain_deviation": seeds.gain.deviation,
            "seeds": SeedFigures(
                trainings=[
                    SeedTraining(seed=seed, accuracy=accuracy, baseline=baseline)
                    for seed, accuracy, baseline in trainings
                ],
                needed=seeds.gain.seeds_needed,
            ),
        }

    def of_student(name: str, gain: PairedDifference[ModelMetrics]) -> StudentFigures:
        robust = comparison.robustness.gains[name]
        distilled, baseline = steps[name]
        budgets = {"optimiser_steps": distilled, "baseline_optimiser_steps": baseline}
        unequal = None not in (distilled, baseline) and distilled != baseline
        other = comparison.intervals[name]
        figures = {
            "baseline": gain.second.accuracy,
            "gain": gain.gain,
            "gain_low": gain.low,
            "gain_high": gain.high,
            "p_value": gain.p_value,
            "robust_gain": robust.gain,
            "robust_gain_low": robust.low,
            "robust_gain_high": robust.high,
            "robust_p_value": robust.p_value,
            "agreement_low": other.agreement[0],
            "agreement_high": other.agreement[1],
            "ece_low": other.ece[0],
            "ece_high": other.ece[1],
            **of_model(gain.first, StudentFigures),
            **(budgets if unequal else {}),
            **_starts(comparison.pairs_by_seed(name)),
        }
        return StudentFigures(**figures | of_seeds(name))

    students = {name: of_student(name, gain) for name, gain in comparison.gains.items()}
    kinds = different_starts({name: student.start for name, student in students.items()})
    return Figures(
        test_images=len(comparison.labels),
        decision=comparison.decision and decision_figures(comparison.decision),
        teacher=TeacherFigures(**of_model(comparison.teacher, TeacherFigures)),
        students=students,
        **({"different_starts": kinds} if kinds else {}),
        **({} if economics is None else {"cache": economics.figures}),
        files=[
            FileRow(network=model.name, **of_model(model, FileRow)) for model in comparison.models
        ],
    )


def _starts(pairs: Sequence[tuple[ModelMetrics, ModelMetrics]]) -> dict[str, str]:
    """What a student started from, and what its baseline did if the two differ, with any seed."""
    starts = [(distilled.start, baseline.start) for distilled, baseline in pairs]
    distilled, baseline = starts[0]
    if distilled is None:
        return {}
    differ = any(one and other and one.sha256 != other.sha256 for one, other in starts)
    return {"start": distilled.text} | ({"baseline_start": baseline.text} if differ else {})


def decision_figures(decision: Decision) -> DecisionFigures:
    def of_file(model: ModelMetrics) -> dict[str, Any]:
        renamed = {"student": model.name, "bytes": model.size_bytes}
        kept = FileFigures.model_fields.keys() - renamed
        return renamed | {name: v for name, v in model.figures.items() if name in kept}

    def other(difference: PairedDifference[ModelMetrics] | None) -> OtherFileFigures | None:
        if difference is None:
            return None
        to_chosen = DifferenceFigures.of(difference)
        return OtherFileFigures(**of_file(difference.first), to_chosen=to_chosen)

    teacher, gain, start = decision.to_teacher.second, decision.gain, decision.file.start
    unequal = gain is not None and gain.first.int8_trained != gain.second.int8_trained
    return DecisionFigures(
        **of_file(decision.file),
        teacher_bytes=None if teacher.path is None else teacher.size_bytes,
        to_teacher=DifferenceFigures.of(decision.to_teacher),
        below_teacher=decision.to_teacher.verdict == "loss",
        gain=None if gain is None else DifferenceFigures.of(gain),
        baseline_better=gain is not None and gain.verdict == "loss",
        reason=decision.reason,
        training=decision.training,
        best=FileFigures(**of_file(decision.to_best.second)),
        to_best=DifferenceFigures.of(decision.to_best),
        runner_up=other(decision.runner_up),
        trade_off=other(decision.trade_off),
        **({} if start is None else {"start": start.text}),
        **({"unequal_training": True} if unequal else {}),
    )


def models_table(comparison: Comparison) -> pd.DataFrame:
    """Tabulate every figure, one row per model."""
    table = pd.DataFrame(model.figures for model in comparison.models)
    integers = dict.fromkeys(COSTS, "Int64")  # nullable: a teacher without a network has none
    return table.rename(columns={"name": "model"}).astype(integers)


def confused_pairs(labels: np.ndarray, decisions: np.ndarray) -> pd.Series:
    """Count the wrong predictions by (label, prediction), the most frequent first."""
    wrong = labels != decisions
    pairs = pd.DataFrame({"label": labels[wrong], "decision": decisions[wrong]})
    counts = pairs.groupby(["label", "decision"]).size()
    return counts.sort_values(ascending=False, kind="stable")


def confusion_table(comparison: Comparison) -> pd.DataFrame:
    """Tabulate the label and the predicted class of test images, by the file to ship: a row per
    image, as DVC's template `confusion` counts them.

    Of more than MOST_CLASSES classes, the table has those of the most frequent wrong predictions,
    and the images of which both are among them: the template draws every cell, and a browser ends
    neither a million of them nor 50,000 rows in the page.
    """
    if comparison.decision is None:
        return pd.DataFrame(columns=["actual", "predicted"])
    labels, decisions = comparison.labels, comparison.decision.file.decisions
    names = np.array(comparison.class_names)
    if len(names) > MOST_CLASSES:
        pairs = confused_pairs(labels, decisions).index
        shown = list(dict.fromkeys(label for pair in pairs for label in pair))[:MOST_CLASSES]
        kept = np.isin(labels, shown) & np.isin(decisions, shown)
        labels, decisions = labels[kept], decisions[kept]
    return pd.DataFrame({"actual": names[labels], "predicted": names[decisions]})


def class_table(comparison: Comparison) -> pd.DataFrame:
    """Tabulate accuracy in the class, which is its recall, and precision: one row per class, two
    columns per file."""
    columns: dict[str, Any] = {
        "class": comparison.class_names,
        "test_images": np.bincount(comparison.labels, minlength=len(comparison.class_names)),
    }
    for model in comparison.models:
        name = model.name if model.role == "teacher" else f"{model.role}/{model.name}"
        name = name if model.precision == "float32" else f"{name} {model.precision}"
        columns |= {name: model.class_accuracy, f"{name}, precision": model.class_precision}
    return pd.DataFrame(columns)
