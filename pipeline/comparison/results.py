"""Read what the other stages wrote. Refuse what is damaged, or was made from other inputs."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import numpy as np
import pandas as pd
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from pipeline.comparison.cache_economics import Economics
from pipeline.comparison.compare import COSTS, Predictions
from pipeline.comparison.measurement.corruptions import CORRUPTIONS, SEVERITIES, samples_to_corrupt
from pipeline.comparison.measurement.latency import (
    MEASURE_AGAIN,
    SPEED_FILE,
    Speeds,
)
from pipeline.comparison.robustness import (
    CorruptionPredictions,
    RobustComparison,
    compare_robustness,
)
from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import canonical_json, recovery_hint
from pipeline.runtime.outputs import STORE, TEACHER, ModelOutputs, NetworkCosts, Role
from pipeline.runtime.params import PARAMS_FILE, read_params
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.runtime.validation import Record, read_model

STUDENT_ROLES: tuple[Role, ...] = ("distilled", "baseline")
HELD_OUT = ("validation", "test")

Result = TypeVar("Result")


class _Part(Record, extra="ignore"):
    """The keys that the comparison needs, of a file that holds others."""


class StoredImages(_Part):
    train: PositiveInt
    validation: NonNegativeInt
    test: NonNegativeInt


class Fidelity(_Part):
    bytes_per_row: PositiveFloat | None = None  # of stored training rows, where measured
    extra_passes: NonNegativeInt = 0  # that measured the store's fidelity alone


class StoreIndex(_Part):
    """data/soft_targets/store.json."""

    dataset_fingerprint: str
    teacher_fingerprint: str
    num_views: PositiveInt
    splits: StoredImages
    fidelity: Fidelity


class Training(_Part):
    """What the stage of a student or baseline says of its training, in its metrics."""

    kept_epoch: PositiveInt  # counted from 1: the epoch whose weights are the network's
    optimiser_steps: PositiveInt | None = None


class History(_Part):
    """metrics/history/*.csv, by column."""

    epoch: list[int]
    train_loss: list[float]  # the mean over the epoch's samples
    learning_rate: list[NonNegativeFloat]  # of the epoch's last step
    validation_accuracy: list[Annotated[float, Field(ge=0, le=1)]]
    validation_nll: list[NonNegativeFloat]

    @model_validator(mode="after")
    def _every_epoch(self) -> Self:
        if self.epoch != list(range(1, len(self.epoch) + 1)):
            raise ValueError("expected a row for each epoch from 1")
        return self


def read_predictions(outputs: ModelOutputs, dataset: Dataset) -> Predictions:
    """Read a model's logits and costs.

    Raises:
        UserError: a file is absent or damaged, or is not of these images or these parameters;
            names the command that writes it.
    """
    path = outputs.predictions
    is_imported = outputs == TEACHER and read_params()["teacher"]["weights"] == "logits"
    costs = dict.fromkeys(COSTS)
    if not is_imported:
        produced_by = f"dvc repro {outputs.stage}"
        costs = read_model(outputs.metrics, NetworkCosts, produced_by=produced_by).model_dump()
    shapes = {name: [len(dataset.splits[name]), dataset.num_classes] for name in sorted(HELD_OUT)}
    expected = ", ".join(f"{name} float32 {shape}" for name, shape in shapes.items())
    logits, made_from = _read_tensors(path, outputs.stage, expected)
    for name, of_split in logits.items():
        if not np.isfinite(of_split).all():
            raise UserError(
                f"`{path}` holds logits for {name} that are not finite: the training diverged. "
                "Lower its learning rate in params.yaml."
            )
    _check_params(path, made_from, outputs.stage)
    return Predictions(outputs.name or "teacher", outputs.role, **logits, **costs)


def _check_params(path: Path, made_from: Mapping[str, Any], stage: str) -> None:
    """Refuse predictions that were made from other parameters, whatever DVC has recorded."""
    params = StageInputs(*stage.split("@")).params
    for key, value in json.loads(canonical_json(params)).items():
        if key in made_from and made_from[key] != value:
            raise UserError(
                f"`{path}` was made when `{PARAMS_FILE}: {key}` was {json.dumps(made_from[key])}; "
                f"now that is {json.dumps(value)}. Run `dvc repro --force --single-item "
                f"{stage}`, then `dvc repro`."
            )


def _read_tensors(
    path: Path, stage: str, *expected: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file of predictions, and the parameters that it was made from.

    Args:
        expected: names, types and shapes of the tensors; any of several.

    Raises:
        UserError: the file is absent or damaged, or holds other tensors.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, "numpy") as file:
            made_from = json.loads((file.metadata() or {}).get("made_from", "{}"))
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"`{path}` is absent or damaged ({error}). {_hint(path, stage)}") from None
    held = ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in sorted(tensors.items()))
    if held not in expected:
        raise UserError(
            f"`{path}` holds {held}; expected {expected[0]}, for the images of data/prepared. "
            f"{_hint(path, stage)}"
        )
    return tensors, made_from


def _hint(path: Path, stage: str) -> str:
    return recovery_hint(path, f"dvc repro --force --single-item {stage}")


def read_students(
    names: list[str], read: Callable[[ModelOutputs], Result]
) -> dict[str, tuple[Result, Result]]:
    """Read, by student, what its distilled network and its baseline wrote."""
    return {name: tuple(read(ModelOutputs(role, name)) for role in STUDENT_ROLES) for name in names}


def read_robustness(
    teacher: Predictions, students: Mapping[str, tuple[Predictions, Predictions]], dataset: Dataset
) -> RobustComparison:
    """Read the predictions for corrupted images and compare them with those of the same images
    without corruption, which are the networks' test predictions.

    Raises:
        UserError: a file is absent or damaged, or is not of these images and corruptions.
    """
    labels = np.asarray(dataset.splits["test"].labels)
    samples = samples_to_corrupt(len(labels))

    def read(predictions: Predictions) -> CorruptionPredictions | None:
        """None for a teacher without a network."""
        is_teacher = predictions.role == "teacher"
        outputs = TEACHER if is_teacher else ModelOutputs(predictions.role, predictions.name)
        path, count = outputs.corrupted_predictions, len(samples)
        stage = "robustness_teacher" if is_teacher else f"robustness@{outputs.name}"
        decisions = [len(CORRUPTIONS), len(SEVERITIES), count]
        only_samples = f"samples int32 [{count}]"
        expected = [f"decisions int32 {decisions}, image_size int32 [1], {only_samples}"]
        if is_teacher:
            expected.append(only_samples)
        tensors, made_from = _read_tensors(path, stage, *expected)
        _check_params(path, made_from, stage)
        if not np.array_equal(tensors["samples"], samples):
            raise UserError(
                f"`{path}` is of other test images; expected {count:,} of data/prepared, evenly "
                f"spread. {_hint(path, stage)}"
            )
        if "decisions" not in tensors:
            return None
        clean, (size,) = predictions.test[samples].argmax(1), tensors["image_size"].tolist()
        return CorruptionPredictions(clean, tensors["decisions"], size)

    pairs = {name: (read(first), read(second)) for name, (first, second) in students.items()}
    return compare_robustness(read(teacher), pairs, labels[samples])


def read_training(outputs: ModelOutputs) -> Training:
    """Read which epoch was kept, and the optimiser steps."""
    return read_model(outputs.metrics, Training, produced_by=f"dvc repro {outputs.stage}")


def read_training_curves(names: list[str]) -> pd.DataFrame:
    """Read every epoch of the teacher, each student and each baseline, one a row, with `kept`:
    whether it is the epoch whose weights were kept, as the training itself wrote it. A teacher that
    was not trained has no row.

    Raises:
        UserError: a history is absent or damaged; names the command that writes it.
    """
    histories = {("teacher", TEACHER.role): _read_history(TEACHER)} | {
        (name, role): history
        for name, pair in read_students(names, _read_history).items()
        for role, history in zip(STUDENT_ROLES, pair, strict=True)
    }
    trained = {key: history for key, history in histories.items() if len(history)}
    curves = pd.concat(trained, names=["student", "role"])
    return curves.reset_index(["student", "role"]).reset_index(drop=True)


def _read_history(outputs: ModelOutputs) -> pd.DataFrame:
    path, hint = outputs.history, f"Run `dvc repro --force --single-item {outputs.stage}`."
    if not path.is_file():
        raise UserError(f"`{path}` is absent. {hint}")
    try:
        table = pd.read_csv(path)
        History.model_validate(table.to_dict("list"))
    except (OSError, ValueError):
        raise UserError(
            f"`{path}` is damaged; expected a row for each epoch from 1, and in each "
            "`validation_accuracy` from 0 to 1, and a finite `train_loss`, `learning_rate` and "
            f"`validation_nll`. {hint}"
        ) from None
    if outputs == TEACHER:  # keeps its last epoch
        return table.assign(kept=table["epoch"] == len(table))
    kept = read_training(outputs).kept_epoch
    if kept > len(table):
        raise UserError(
            f"`{path}` has {counted(len(table), 'epoch')}, but `{outputs.metrics}` says that epoch "
            f"{kept} was kept; expected both of one training. {hint}"
        )
    return table.assign(kept=table["epoch"] == kept)


def read_store_index(dataset: Dataset) -> StoreIndex:
    """Read the index of the store that the students were trained from.

    Raises:
        UserError: it is absent or damaged, or the store holds soft targets of other images.
    """
    index = read_model(STORE / "store.json", StoreIndex, produced_by="dvc repro soft_targets")
    if index.dataset_fingerprint != dataset.fingerprint:
        raise UserError(
            f"`{STORE}`, which the students were trained from, was written for dataset "
            f"{index.dataset_fingerprint[:12]}…, but data/prepared is "
            f"{dataset.fingerprint[:12]}…. Run `dvc repro`."
        )
    return index


def cache_economics(index: StoreIndex, curves: pd.DataFrame) -> Economics:
    """Count what the store's index and the histories imply.

    Args:
        curves: one row per epoch of each training.
    """
    epochs = curves[curves["role"] == "distilled"].groupby("student", sort=False).size()
    return Economics(
        views=index.num_views,
        training_images=index.splits.train,
        held_out_images=index.splits.validation + index.splits.test,
        epochs=epochs.to_dict(),
        bytes_per_row=index.fidelity.bytes_per_row,
        extra_passes=index.fidelity.extra_passes,
    )


def read_speed(names: list[str]) -> Speeds:
    """Read the networks' speed.

    Raises:
        UserError: the file is absent or damaged, or lacks a student.
    """
    speeds = read_model(SPEED_FILE, Speeds, produced_by="dvc repro speed")
    devices = speeds.devices.values()
    missing = [name for name in names if any(name not in device.students for device in devices)]
    if missing:
        raise UserError(
            f"`{SPEED_FILE}` has no figures of {', '.join(missing)}. Run `{MEASURE_AGAIN}`."
        )
    return speeds
