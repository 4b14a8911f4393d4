"""Compare models: every metric, and which differences are significant.

Arithmetic on logits; reads and writes nothing.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from typing import Any

import numpy as np

from pipeline.comparison import metrics
from pipeline.comparison.decision import Decision, decide
from pipeline.comparison.measurement import statistics
from pipeline.comparison.measurement.seeds import seed_mean
from pipeline.comparison.measurement.statistics import PairedDifference
from pipeline.comparison.robustness import RobustComparison, Robustness
from pipeline.comparison.seeds import SeedComparison, agreement_interval, calibration_interval
from pipeline.runtime.outputs import ExportedFile, Precision, Role, Start

COSTS = ("parameters", "macs", "size_bytes")


@dataclass(frozen=True, kw_only=True)
class MeasuredFile:
    """One exported file: what it is, and its costs."""

    name: str  # of the student; or "teacher"
    role: Role
    precision: Precision = "float32"
    path: str | None  # of the file; None for a teacher without one
    no_file: str | None = None  # the reason
    input_size: int | None = None  # pixels, of the network
    #: None for a teacher, and where an older export did not record it.
    start: Start | None = None
    int8_trained: bool = False  # by `export.int8_training`
    parameters: int | None  # of the network; None for imported logits
    macs: int | None
    size_bytes: int | None  # of the file; None without one


@dataclass(frozen=True, kw_only=True)
class Predictions(MeasuredFile):
    """One file's logits."""

    seed: int | None = None  # of a training beside the main one, whose file does not ship
    sha256: str | None = None  # of the file
    validation: np.ndarray  # [N_validation, C] raw logits
    test: np.ndarray  # [N, C] raw logits

    @property
    def key(self) -> str:
        return ExportedFile(self.role, self.name, self.precision, self.seed).key


@dataclass(frozen=True, kw_only=True)
class ModelMetrics(MeasuredFile):
    """One file's metrics on the test images. Shares are in [0, 1], NLL and KL in nats."""

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
    robust_accuracy: float | None  # None for a teacher without a file
    decisions: np.ndarray  # [N]
    correct: np.ndarray  # [N] bool
    divergences: np.ndarray  # [N] KL(teacher || model)
    confidences: np.ndarray  # [N] probability of the predicted class
    class_precision: np.ndarray  # [C], NaN for a class that is never predicted
    class_accuracy: np.ndarray  # [C], which is the recall; NaN for a class without test images
    reliability: np.ndarray  # [15, 3] count, mean confidence, accuracy

    @property
    def figures(self) -> dict[str, Any]:
        """All fields that are no arrays, without those of the network itself."""
        network = ("input_size", "start", "int8_trained")
        return {
            k: v
            for k, v in vars(self).items()
            if not isinstance(v, np.ndarray) and k not in network
        }


@dataclass(frozen=True)
class OtherIntervals:
    """The 95 % intervals of a distilled student, over its seeds if it has several."""

    agreement: tuple[float, float]
    ece: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    class_names: Sequence[str]
    labels: np.ndarray  # [N] of the test images
    teacher: ModelMetrics
    #: By student: the distilled and the baseline's float32 file, then the int8 files.
    students: Mapping[str, Sequence[ModelMetrics]]
    #: By student: the distilled file minus the baseline's, both float32; of several seeds the mean
    #: over them, while `first` and `second` are the main trainings.
    gains: Mapping[str, PairedDifference[ModelMetrics]]
    int8: Sequence[PairedDifference[ModelMetrics]]  # each int8 file minus its float32 file
    #: Of distilled students, with adjusted p-values (Holm).
    pairs: Sequence[PairedDifference[ModelMetrics]]
    decision: Decision | None  # which file to ship; None if there is no file
    seeds: Mapping[str, SeedComparison]  # by student, of those with more than one
    intervals: Mapping[str, OtherIntervals]  # by student
    robustness: RobustComparison
    #: By student and role, why there is no int8 file where one was asked for.
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def pairs_by_seed(self, name: str) -> Sequence[tuple[ModelMetrics, ModelMetrics]]:
        """A student's distilled and baseline float32 files of each seed."""
        if name in self.seeds:
            seeds = self.seeds[name]
            return list(zip(seeds.distilled, seeds.baselines, strict=True))
        return [(self.gains[name].first, self.gains[name].second)]

    @property
    def models(self) -> list[ModelMetrics]:
        """The teacher, then each student's files."""
        return [self.teacher, *(m for models in self.students.values() for m in models)]


def model_metrics(
    model: Predictions,
    teacher: Predictions,
    labels: Mapping[str, np.ndarray],
    interval: np.ndarray,
    robust: Robustness | None,
) -> ModelMetrics:
    """Compute every metric.

    Args:
        teacher: whose predictions the model's are compared with.
        labels: `validation` and `test`, [N] each.
        interval: [2], of the accuracy.
    """
    # Takes a second, which `compare --show` saves.
    from sklearn.metrics import f1_score, precision_recall_fscore_support  # noqa: PLC0415

    test, classes = labels["test"], range(model.test.shape[1])
    decisions = model.test.argmax(1)
    correct = decisions == test
    divergences = metrics.kl_divergence(teacher.test, model.test)
    temperature = metrics.fitted_temperature(model.validation, labels["validation"])
    scaled = None if temperature is None else model.test.astype(np.float64) / temperature
    precision, recall, _, _ = precision_recall_fscore_support(
        test, decisions, labels=classes, zero_division=np.nan
    )
    return ModelMetrics(
        **{of.name: getattr(model, of.name) for of in fields(MeasuredFile)},
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
        robust_accuracy=None if robust is None else robust.accuracy,
        decisions=decisions,
        correct=correct,
        divergences=divergences,
        confidences=metrics.confidences(model.test),
        class_precision=precision,
        class_accuracy=recall,
        reliability=metrics.reliability(model.test, test),
    )


Training = tuple[str, str]  # the student's name, and the role


@dataclass(frozen=True)
class _Files:
    """All files, by their positions in `models`."""

    models: Sequence[ModelMetrics]
    means: np.ndarray  # [resamples, models], of the accuracies
    place: Mapping[tuple[str, str, str], int]  # of the main trainings: name, role, precision
    by_seed: Mapping[Training, Mapping[int | None, int]]  # the float32 files

    def difference(self, i: int, j: int) -> PairedDifference[ModelMetrics]:
        """Compare two files."""
        first, second = self.models[i], self.models[j]
        low, high = statistics.interval(self.means[:, i] - self.means[:, j])
        return PairedDifference(
            first=first,
            second=second,
            # From integers, so that 0.1 is not 0.09999999999999998.
            gain=(int(first.correct.sum()) - int(second.correct.sum())) / len(first.correct),
            low=float(low),
            high=float(high),
            p_value=statistics.mcnemar(first.correct, second.correct),
        )

    def over_seeds(
        self, first: Training, second: Training
    ) -> tuple[PairedDifference[ModelMetrics], SeedComparison | None]:
        """Compare two trainings over the seeds that both have; by their files if that is one."""
        of_files = self.difference(self.place[*first, "float32"], self.place[*second, "float32"])
        seeds = sorted(self.by_seed[first].keys() & self.by_seed[second].keys() - {None})
        if len(seeds) < 2:
            return of_files, None
        one, other = ([self.by_seed[which][seed] for seed in seeds] for which in (first, second))
        firsts, seconds = ([self.models[i] for i in which] for which in (one, other))
        counts = [  # integers, so that equal gains are equal
            int(a.correct.sum()) - int(b.correct.sum())
            for a, b in zip(firsts, seconds, strict=True)
        ]
        differences = np.array(counts) / len(self.models[0].correct)
        mean = seed_mean(differences, self.means[:, one] - self.means[:, other])
        (low, high), p_value = mean.interval, mean.p_value
        if not mean.varies:  # each image has the same difference, with every seed
            p_value = statistics.mcnemar(firsts[0].correct, seconds[0].correct)
        gain = replace(of_files, gain=mean.mean, low=low, high=high, p_value=p_value)
        return gain, SeedComparison(seeds, firsts, seconds, mean)


def _by_seed(predictions: Sequence[Predictions]) -> dict[Training, dict[int | None, int]]:
    """The positions of float32 files by training and seed; None where it was not recorded."""
    found: dict[Training, dict[int | None, int]] = defaultdict(dict)
    for i, p in enumerate(predictions):
        if p.precision == "float32":
            seed = p.start.seed if p.seed is None and p.start else p.seed
            found[p.name, p.role][seed] = i
    return found


def compare(
    teacher: Predictions,
    students: Mapping[str, Sequence[Predictions]],
    labels: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    robustness: RobustComparison,
) -> Comparison:
    """Compare every student with its baseline, with the teacher, and with the other students.

    Args:
        students: by name, the distilled and the baseline's float32 file, the int8 files, then the
            files of other seeds.
        labels: `validation` and `test`, [N] each.
    """
    predictions = [teacher, *(model for models in students.values() for model in models)]
    robust = {id(p): r for p, r in zip(predictions, robustness.every_model, strict=True)}
    predictions.sort(key=lambda p: p.seed is not None)  # the main trainings first
    correct = np.stack([p.test.argmax(1) == labels["test"] for p in predictions], 1)
    means = statistics.bootstrap_means(correct)  # [resamples, models]
    intervals = statistics.share_intervals(correct, means).T
    models = [
        model_metrics(model, teacher, labels, interval, robust[id(model)])
        for model, interval in zip(predictions, intervals, strict=True)
    ]
    main = range(sum(p.seed is None for p in predictions))
    place = {(models[i].name, models[i].role, models[i].precision): i for i in main}
    files = _Files(models, means, place, _by_seed(predictions))
    int8 = [
        files.difference(i, place[models[i].name, models[i].role, "float32"])
        for i in main
        if models[i].precision == "int8"
    ]
    over_seeds = {
        name: files.over_seeds((name, "distilled"), (name, "baseline")) for name in students
    }
    gains = {name: gain for name, (gain, _) in over_seeds.items()}
    seeds = {name: of_seeds for name, (_, of_seeds) in over_seeds.items() if of_seeds is not None}
    every = {
        name: seeds[name].distilled if name in seeds else [gains[name].first] for name in students
    }
    pairs = [
        files.over_seeds((one, "distilled"), (other, "distilled"))[0]
        for one, other in combinations(students, 2)
    ]
    adjusted = statistics.holm([pair.p_value for pair in pairs])
    return Comparison(
        class_names=class_names,
        labels=labels["test"],
        teacher=models[0],
        students={
            name: [models[i] for i in main if i and models[i].name == name] for name in students
        },
        gains=gains,
        int8=int8,
        pairs=[replace(pair, p_value=p) for pair, p in zip(pairs, adjusted, strict=True)],
        decision=decide([models[i] for i in main], files.difference),
        seeds=seeds,
        intervals={
            name: OtherIntervals(agreement_interval(of, models[0]), calibration_interval(of))
            for name, of in every.items()
        },
        robustness=robustness,
    )
