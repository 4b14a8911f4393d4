"""Find out why the stage `teacher` refused the teacher.

    python -m pipeline.commands.diagnose_teacher

Measures the teacher of params.yaml on validation: as it is, with the classes in another order, with
other normalisations and with other input sizes. Prints the accuracies, the entropy of its
predictions, and what to do. A trained teacher is read from the state that the stage keeps when it
refuses one. Writes nothing.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import softmax
from scipy.stats import entropy
from torch import nn

from pipeline.compute.device import default_device
from pipeline.data.prepared.dataset import Dataset, open_dataset
from pipeline.models.evaluation import predict_all
from pipeline.models.spec import InputSpec, family_module, native_input
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section
from pipeline.teacher.accuracy_gate import (
    FALLBACK_HINTS,
    Trial,
    in_another_order,
    majority_share,
)
from pipeline.teacher.initial_network import build_initial_network, is_trained, training_inputs
from pipeline.teacher.params import TeacherParams
from pipeline.training.resume import read_state

_IMAGES = 256  # of validation, evenly spread, for each other input
_LARGEST_SIZE = 512  # pixels, of the input sizes that are tried
_WRONG_SIZE = (RuntimeError, AssertionError, ValueError)  # what networks raise for it

_NORMALISATIONS = {
    "pixels in 0 to 1": ([0.0], [1.0]),
    "pixels in 0 to 255": ([0.0], [1 / 255]),
    "pixels in -1 to 1": ([0.5], [0.5]),
    "ImageNet's mean and std": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


@dataclass(frozen=True)
class Teacher:
    """A teacher with a network, and the images at the size of its input."""

    network: nn.Module
    input: InputSpec
    dataset: Dataset
    pretrained_input: InputSpec | None  # that the network was pretrained with, if it is known


def load_teacher(params: TeacherParams, dataset: Dataset) -> Teacher:
    """Build the teacher that the stage measures. Refuse one that is trained if no finished training
    with these parameters is kept."""
    network, spec = build_initial_network(params, dataset)
    if is_trained(params, spec):
        state = read_state(TEACHER.scratch, training_inputs(params, network, spec, dataset))
        if state is None or state["epochs"] < params.training.epochs:
            raise UserError(
                f"`{TEACHER.scratch}` has no finished training with these parameters, images and "
                "weights; expected the state of a teacher that the stage refused. Run `dvc repro "
                "teacher` first; a teacher that it accepts needs no diagnosis."
            )
        average = state["optimisation"]["average"]
        network.load_state_dict((average or state)["network"])
    if dataset.encoded:  # decoded at the size of the network's input
        dataset = dataset.resized(spec.input.size)
    native = native_input(params.family, params.network.name)
    return Teacher(network.to(default_device()), spec.input, dataset, native)


def diagnose(
    logits: np.ndarray, dataset: Dataset, teacher: Teacher | None, fallback_hint: str
) -> list[str]:
    """Lines with the accuracies under other settings, and what to do.

    Args:
        logits: [N, num_classes], of the validation images.
        teacher: None for imported logits: then only the order of the classes can be wrong.
        fallback_hint: what to do if no other setting explains a low accuracy.
    """
    labels = dataset.splits["validation"].labels
    predictions = logits.argmax(1)
    is_correct = predictions == labels
    samples = np.unique(np.linspace(0, len(labels) - 1, _IMAGES).astype(int))
    order = in_another_order(predictions, labels, dataset.class_names, teacher is None)
    trials = {"classes in the best other order": [order]}
    for kind, trial in _try_other_inputs(teacher, samples) if teacher else ():
        trials.setdefault(kind, []).append(trial)
    lines = [
        f"teacher accuracy on validation: {is_correct.mean():.2%} ({is_correct.sum():,} of "
        f"{len(labels):,}); the share of the majority class is {majority_share(labels):.2%}",
        *(
            f"  {name}: " + "; ".join(f"{trial.setting} {trial.accuracy:.2%}" for trial in group)
            for name, group in trials.items()
        ),
        f"  mean entropy of its predictions: {entropy(softmax(logits, 1), axis=1).mean():.2f} "
        f"nats, of at most {np.log(logits.shape[1]):.2f}",
    ]
    present = max(is_correct[samples].mean(), majority_share(labels))
    better = [t for group in trials.values() for t in group if t.is_better_than(present)]
    if better:
        lines.append(max(better, key=lambda trial: trial.accuracy).advice)
    else:
        tried = "order, normalisation or size" if teacher else "order"
        lines.append(f"No other {tried} explains a low accuracy. {fallback_hint}")
    return lines


def _try_other_inputs(teacher: Teacher, samples: np.ndarray) -> Iterator[tuple[str, Trial]]:
    """Measure each input of `_other_inputs` that the network can take, by its kind."""
    split, device = teacher.dataset.splits["validation"], default_device()
    for kind, setting, spec, advice in _other_inputs(teacher):
        with suppress(*_WRONG_SIZE, UserError):
            logits = predict_all(teacher.network, spec, split, device=device, samples=samples)
            correct = int((logits.argmax(1).numpy() == split.labels[samples]).sum())
            yield kind, Trial(setting, correct, len(samples), advice)


def _other_inputs(teacher: Teacher) -> Iterator[tuple[str, str, InputSpec, str]]:
    """Kind, setting, input and advice of each other input."""
    present, native = teacher.input, teacher.pretrained_input
    for name, mean, std in _normalisations(teacher):
        advice = (
            f"The likeliest cause is the normalisation: the teacher was trained on {name}. Set "
            f"`mean: {_shown(mean)}` and `std: {_shown(std)}` in `teacher.network`."
        )
        yield "other normalisations", name, replace(present, mean=mean, std=std), advice
    sizes = {teacher.dataset.image_size, present.size // 2, 2 * present.size}
    native_size = native.size if native else present.size
    for size in sorted({*sizes, native_size} - {present.size}):
        if 8 <= size <= _LARGEST_SIZE:
            name = f"{size} pixels" + (" (of its pretraining)" if size == native_size else "")
            advice = (
                f"The likeliest cause is the input size: set `input_size: {size}` in "
                "`teacher.network`."
            )
            yield "other input sizes", name, replace(present, size=size), advice


def _normalisations(teacher: Teacher) -> Iterator[tuple[str, Sequence[float], Sequence[float]]]:
    """Name, mean and std of each known normalisation that differs from the present one."""
    spec, dataset, native = teacher.input, teacher.dataset, teacher.pretrained_input
    known = {
        **_NORMALISATIONS,
        "the training images' mean and std": (dataset.mean, dataset.std),
        **({"its pretraining's mean and std": (native.mean, native.std)} if native else {}),
    }
    for name, values in known.items():
        mean, std = (list(v) * (spec.channels if len(v) == 1 else 1) for v in values)
        if len(mean) == spec.channels:
            same_mean = np.allclose(mean, spec.mean, atol=1e-3)
            if not (same_mean and np.allclose(std, spec.std, rtol=1e-2)):
                yield name, mean, std


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
    hint = FALLBACK_HINTS[params.weights]
    for line in diagnose(logits.astype(np.float64), dataset, teacher, hint):
        print(line)


if __name__ == "__main__":
    run_command(main)
