"""Find out why the stage `teacher` refused the teacher.

    python -m pipeline.commands.diagnose_teacher

Measures the teacher of params.yaml on validation as it is, and then on a sample with other input
sizes and normalisations together, each with the classes in the given and in the best other order,
and the best of these with the channels reversed. Prints what it tried, and what to do. A trained
teacher is taken from the state that the stage keeps when it refuses one. Writes nothing.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import softmax
from scipy.stats import binom, entropy
from torch import Tensor, nn

from pipeline.compute.device import default_device
from pipeline.data.prepared.dataset import Dataset, EncodedSplit, open_dataset
from pipeline.models.evaluation import predict_all
from pipeline.models.spec import InputSpec, family_module, native_input
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section
from pipeline.teacher.accuracy_gate import FALLBACK_HINTS, ORDER_HINTS, explain_order
from pipeline.teacher.chance import SIGNIFICANCE, compare_with_chance, confusion_matrix
from pipeline.teacher.class_order import LIKELY, OtherOrder, best_other_order
from pipeline.teacher.initial_network import build_initial_network, is_trained, training_inputs
from pipeline.teacher.params import TeacherParams
from pipeline.training.resume import read_finished

_SCREENED = 48  # images of validation, for each setting
_SCREENED_AT_LEAST = 16  # images, for the largest inputs
_SCREENED_SIZE = 128  # pixels; above, fewer images for the same number of pixels
_MEASURED = 256  # images of validation, for each of the best settings
_BEST = 4  # settings that are measured
_PER_CLASS = 4  # images of a class in a sample, for its order
_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 384)  # pixels, as published networks have
_SMALLEST_SIZE, _LARGEST_SIZE = 8, 512  # pixels
_WRONG_SIZE = (RuntimeError, AssertionError, ValueError, UserError)  # what networks raise for it

_IMAGENET_MEAN = [0.485, 0.456, 0.406]
_NORMALISATIONS = {
    "0 to 1": ([0.0], [1.0]),
    "0 to 255": ([0.0], [1 / 255]),
    "-1 to 1": ([0.5], [0.5]),
    "ImageNet": (_IMAGENET_MEAN, [0.229, 0.224, 0.225]),
    "Caffe": (_IMAGENET_MEAN, [1 / 255]),  # less the mean, and not divided
}
_NOT_IN_PARAMS = (
    "The network takes BGR, and there is no parameter for that: reverse the input channels of its "
    "first layer's weights (for ONNX, set `options: {channels: bgr}` in `teacher.network`)."
)


@dataclass(frozen=True)
class Teacher:
    """A teacher with a network, and the images at the size of its input."""

    network: nn.Module
    input: InputSpec
    dataset: Dataset
    pretrained_input: InputSpec | None  # that the network was pretrained with, if it is known


@dataclass(frozen=True)
class Setting:
    """What is done to an image before the network."""

    input: InputSpec
    normalisation: str = "present"
    is_bgr: bool = False

    def changes(self, present: "Setting") -> int:
        """Count which of the three differ from the present ones."""
        return (
            (self.input.size != present.input.size)
            + (self.normalisation != present.normalisation)
            + (self.is_bgr != present.is_bgr)
        )


@dataclass(frozen=True)
class Trial:
    """The teacher's accuracy in one setting, in the given and in the best other order."""

    setting: Setting
    correct: int
    order: OtherOrder
    floor: float  # the share of the class with most images

    @property
    def most_correct(self) -> int:
        return max(self.correct, self.order.correct)

    @property
    def accuracy(self) -> float:
        return self.most_correct / self.order.total

    @property
    def reorders(self) -> bool:
        return self.order.correct > self.correct

    @property
    def score(self) -> float:
        """The accuracy, from 0 for always the same class to 1: samples have different classes."""
        return (self.accuracy - self.floor) / (1 - self.floor) if self.floor < 1 else 0.0

    def changes(self, present: Setting) -> int:
        return self.setting.changes(present) + self.reorders


class _ReversedChannels(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.flip(1))


def load_teacher(params: TeacherParams, dataset: Dataset) -> Teacher:
    """Build the teacher that the stage measures. Refuse one that is trained if no finished training
    with these parameters is kept."""
    network, spec = build_initial_network(params, dataset)
    if is_trained(params, spec):
        state = read_finished(TEACHER.scratch, training_inputs(params, network, spec, dataset))
        if state is None:
            raise UserError(
                f"`{TEACHER.scratch}` has no finished training with these parameters, images and "
                "weights; expected the one to diagnose. Run `dvc repro teacher` first."
            )
        network.load_state_dict(state["network"])
    if dataset.encoded:  # decoded at the size of the network's input
        dataset = dataset.resized(spec.input.size)
    native = native_input(params.family, params.network.name, params.network.options)
    return Teacher(network.to(default_device()), spec.input, dataset, native)


def diagnose(
    logits: np.ndarray, dataset: Dataset, teacher: Teacher | None, weights: str
) -> Iterator[str]:
    """Yield lines with the accuracies under other settings, and what to do.

    Args:
        logits: [N, num_classes], of the validation images.
        teacher: None for imported logits: then only the order of the classes can be wrong.
        weights: `teacher.weights`.
    """
    labels = dataset.splits["validation"].labels
    predictions = logits.argmax(1)
    correct = int((predictions == labels).sum())
    by_chance = compare_with_chance(
        confusion_matrix(predictions, labels, dataset.num_classes)
    ).by_chance
    yield (
        f"teacher accuracy on validation: {correct / len(labels):.2%} ({correct:,} of "
        f"{len(labels):,}); such predictions have {by_chance:.2%} by chance"
    )
    yield (
        f"  mean entropy of its predictions: {entropy(softmax(logits, 1), axis=1).mean():.2f} "
        f"nats, of at most {np.log(logits.shape[1]):.2f}"
    )
    order = best_other_order(predictions, labels, dataset.class_names)
    if teacher is None:
        yield explain_order(order, weights)
        if order.p_value > LIKELY:
            yield f"Tried: other orders of the classes. {FALLBACK_HINTS[weights]}"
        return
    yield from _try_settings(teacher, predictions, order, weights)


def _try_settings(
    teacher: Teacher, predictions: np.ndarray, order: OtherOrder, weights: str
) -> Iterator[str]:
    """Try every setting on few images, and the best on more."""
    labels, present = teacher.dataset.splits["validation"].labels, Setting(teacher.input)
    few, more = _sample(labels, _SCREENED), _sample(labels, _MEASURED)
    normalisations = _normalisations(teacher)
    yield (
        "  accuracy in the given / in the best other order of the classes, in %, by normalisation, "
        f"on {len(few)} images or fewer:"
    )
    yield f"{'input size':>12} {'images':>7}" + "".join(f"{n:>13}" for n in normalisations)
    trials: list[Trial] = []
    impossible: list[str] = []
    for size in _sizes(teacher):
        images = int(_SCREENED * min(1, _SCREENED_SIZE / size) ** 2)
        sample = _sample(labels, max(images, _SCREENED_AT_LEAST))
        try:
            row = [
                _measure(
                    teacher, Setting(replace(teacher.input, size=size, **values), name), sample
                )
                for name, values in normalisations.items()
            ]
        except _WRONG_SIZE:
            impossible.append(str(size))
            continue
        trials += row
        yield _table_row(row)
    if impossible:
        yield f"  input sizes that the network cannot take: {', '.join(impossible)}"

    def rank(trial: Trial) -> tuple[float, int]:
        """The most accurate first; of equal ones, that with the fewest changes."""
        return -trial.score, trial.changes(present)

    settings = [t.setting for t in sorted(trials, key=rank) if t.setting.changes(present)][:_BEST]
    if present.input.channels == 3:
        settings += [replace(setting, is_bgr=True) for setting in (present, *settings)]
    best = [_measure(teacher, setting, more) for setting in settings]
    best.sort(key=rank)
    reversed_too = ", and with the channels reversed (BGR)" if present.input.channels == 3 else ""
    yield f"  the best of them on {len(more)} images{reversed_too}:"
    for trial in best:
        yield f"    {trial.accuracy:7.2%}  {_in_words(trial)}"
    now = _trial(present, predictions[more], labels[more], order.class_names)
    bar = max(now.correct / len(more), now.floor)
    likely = [now] if order.p_value <= LIKELY else []
    likely += [trial for trial in best if _is_better(trial, bar, 2 * len(trials))]
    if not likely or likely[0].setting.changes(present):
        yield f"  present settings, best other order of the classes: {order.accuracy:.2%}"
    if likely:
        cause = _simplest(likely, present)
        if cause.setting.changes(present):
            yield from _advice(cause, present, weights)
        else:
            yield explain_order(order, weights)
    yield (
        f"Tried: {len(trials) // len(normalisations)} input sizes and {len(normalisations)} "
        "normalisations together, each with the classes in the given and in the best other order"
        + ("; BGR in the best of these." if present.input.channels == 3 else ".")
        + ("" if likely else f" None is significantly better. {FALLBACK_HINTS[weights]}")
    )


def _measure(teacher: Teacher, setting: Setting, samples: np.ndarray) -> Trial:
    split = teacher.dataset.splits["validation"]
    if isinstance(split, EncodedSplit):
        split = split.resized(setting.input.size)
    network = _ReversedChannels(teacher.network) if setting.is_bgr else teacher.network
    logits = predict_all(network, setting.input, split, device=default_device(), samples=samples)
    predictions = logits.argmax(1).numpy()
    return _trial(setting, predictions, split.labels[samples], teacher.dataset.class_names)


def _trial(
    setting: Setting, predictions: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> Trial:
    return Trial(
        setting,
        int((predictions == labels).sum()),
        best_other_order(predictions, labels, class_names),
        np.bincount(labels).max() / len(labels),
    )


def _sample(labels: np.ndarray, count: int) -> np.ndarray:
    """Sample numbers: as many images of each class, so that a rare one counts. If there are many
    classes, of some of them: in too few images of each, no order of the classes can be found."""
    classes = np.unique(labels)
    kept = classes[_evenly(len(classes), count // _PER_CLASS)]
    groups = [np.flatnonzero(labels == label) for label in kept]
    return np.sort(
        np.concatenate([group[_evenly(len(group), count // len(kept))] for group in groups])
    )


def _evenly(total: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(total, count)).astype(int))


def _sizes(teacher: Teacher) -> list[int]:
    present, native = teacher.input.size, teacher.pretrained_input
    sizes = {*_SIZES, present // 2, present, 2 * present, teacher.dataset.image_size}
    sizes |= {native.size} if native else set()
    return sorted(s for s in sizes if s == present or _SMALLEST_SIZE <= s <= _LARGEST_SIZE)


def _normalisations(teacher: Teacher) -> dict[str, dict[str, list[float]]]:
    """`mean` and `std` of each known normalisation, by name, without equal ones."""
    spec, dataset, native = teacher.input, teacher.dataset, teacher.pretrained_input
    known = {"present": (spec.mean, spec.std)}
    if not getattr(teacher.network, "takes_pixels", False):
        known |= _NORMALISATIONS | {"own images": (dataset.mean, dataset.std)}
        known |= {"pretraining": (native.mean, native.std)} if native else {}
    different: dict[str, dict[str, list[float]]] = {}
    for name, values in known.items():
        mean, std = (list(v) * (spec.channels if len(v) == 1 else 1) for v in values)
        if len(mean) == len(std) == spec.channels and not any(
            np.allclose(mean, other["mean"], atol=1e-3)
            and np.allclose(std, other["std"], rtol=1e-2)
            for other in different.values()
        ):
            different[name] = {"mean": mean, "std": std}
    return different


def _is_better(trial: Trial, bar: float, trials: int) -> bool:
    """Whether the accuracy is significantly above a lower one, by a binomial test and Bonferroni's
    correction for the number of trials."""
    if trial.reorders and trial.order.p_value > LIKELY:
        return False
    return trials * binom.sf(trial.most_correct - 1, trial.order.total, bar) <= SIGNIFICANCE


def _simplest(trials: Sequence[Trial], present: Setting) -> Trial:
    """The one with the fewest changes of those that are not significantly worse than the best."""
    best = max(trials, key=lambda trial: trial.accuracy)
    expected = (best.most_correct + 1) / (best.order.total + 2)  # below 1
    close = [t for t in trials if binom.cdf(t.most_correct, t.order.total, expected) > LIKELY]
    return min(close or [best], key=lambda trial: (trial.changes(present), -trial.accuracy))


def _table_row(row: Sequence[Trial]) -> str:
    total = row[0].order.total
    cells = [f"{100 * t.correct / total:.0f} / {100 * t.order.correct / total:.0f}" for t in row]
    return f"{row[0].setting.input.size:12} {total:7}" + "".join(f"{cell:>13}" for cell in cells)


def _in_words(trial: Trial) -> str:
    setting = trial.setting
    order = ", other order of the classes" if trial.reorders else ""
    channels = ", BGR" if setting.is_bgr else ""
    return f"{setting.input.size} pixels, normalisation `{setting.normalisation}`{channels}{order}"


def _advice(trial: Trial, present: Setting, weights: str) -> Iterator[str]:
    """What to set for this trial."""
    setting, values, causes = trial.setting, [], []
    if setting.input.size != present.input.size:
        causes.append("the input size")
        values.append(f"`input_size: {setting.input.size}`")
    if setting.normalisation != present.normalisation:
        causes.append("the normalisation")
        values.append(f"`mean: {_shown(setting.input.mean)}`")
        values.append(f"`std: {_shown(setting.input.std)}`")
    causes += ["the order of the channels"] if setting.is_bgr else []
    causes += ["the order of the classes"] if trial.reorders else []
    yield f"The likeliest cause is {' and '.join(causes)} ({_in_words(trial)})."
    if values:
        yield f"Set {' and '.join(values)} in `teacher.network`."
    if setting.is_bgr:
        yield _NOT_IN_PARAMS
    if trial.reorders:
        yield f"In this setting {trial.order.in_words()}."
        yield ORDER_HINTS[weights]


def _shown(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m pipeline.commands.diagnose_teacher", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args()
    params = load_section(TeacherParams, "teacher")
    dataset, teacher = open_dataset(), None
    if params.weights == "logits":
        source = family_module(params.family).open_source(Path(params.checkpoint), dataset)
        logits = source.held_out["validation"]
    else:
        teacher = load_teacher(params, dataset)
        dataset = teacher.dataset
        split, device = dataset.splits["validation"], default_device()
        logits = predict_all(teacher.network, teacher.input, split, device=device).numpy()
    for line in diagnose(logits.astype(np.float64), dataset, teacher, params.weights):
        print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
