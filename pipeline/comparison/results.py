"""Read what the other stages wrote. Refuse what is damaged, or was made from other inputs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import pandas as pd
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from pipeline.comparison.cache_economics import Economics
from pipeline.comparison.compare import COSTS, Predictions
from pipeline.comparison.measurement.corruptions import CORRUPTIONS, SEVERITIES, samples_to_corrupt
from pipeline.comparison.measurement.latency import SPEED_FILE, DeviceSpeed, Speeds
from pipeline.comparison.robustness import (
    CorruptionPredictions,
    RobustComparison,
    compare_robustness,
)
from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json, recovery_hint
from pipeline.runtime.outputs import STORE, TEACHER, ModelOutputs, Role
from pipeline.runtime.params import PARAMS_FILE, read_params
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.runtime.validation import Record, read_model

STUDENT_ROLES: tuple[Role, ...] = ("distilled", "baseline")
HELD_OUT = ("validation", "test")


class _Part(Record, extra="ignore"):
    """The keys that the comparison needs, of a file that holds others."""


class Costs(_Part):
    """metrics/*.json of a network."""

    parameters: NonNegativeInt
    macs: NonNegativeInt
    size_bytes: NonNegativeInt


class StoredImages(_Part):
    train: PositiveInt
    validation: NonNegativeInt
    test: NonNegativeInt


class Fidelity(_Part):
    bytes_per_row: PositiveFloat | None = None  # of stored training rows, where measured


class StoreIndex(_Part):
    """data/soft_targets/store.json."""

    dataset_fingerprint: str
    teacher_fingerprint: str
    num_views: PositiveInt
    splits: StoredImages
    fidelity: Fidelity


class History(_Part):
    """metrics/history/*.csv, by column."""

    epoch: list[int]
    validation_accuracy: list[Annotated[float, Field(ge=0, le=1)]]

    @model_validator(mode="after")
    def _every_epoch(self) -> Self:
        if not self.epoch or self.epoch != list(range(1, len(self.epoch) + 1)):
            raise ValueError("expected a row for each epoch from 1")
        return self


def read_predictions(outputs: ModelOutputs, dataset: Dataset) -> Predictions:
    """Read a model's logits and costs.

    Raises:
        UserError: a file is absent or damaged, or is not of these images or these parameters;
            names the command that writes it.
    """
    stage_inputs, produced_by = StageInputs(*outputs.stage.split("@")), f"dvc repro {outputs.stage}"
    is_imported = outputs == TEACHER and read_params()["teacher"]["weights"] == "logits"
    costs = dict.fromkeys(COSTS)
    if not is_imported:
        costs = read_model(outputs.metrics, Costs, produced_by=produced_by).model_dump()
    logits = _read_logits(outputs, dataset)
    _check_made_from(outputs, stage_inputs)
    return Predictions(outputs.name or "teacher", outputs.role, **logits, **costs)


def _read_logits(outputs: ModelOutputs, dataset: Dataset) -> dict[str, np.ndarray]:
    """Read the [N, C] raw logits of validation and test."""
    path, num_classes = outputs.predictions, dataset.num_classes
    logits = _read_tensors(path, outputs.stage)
    shapes = {name: [len(dataset.splits[name]), num_classes] for name in sorted(HELD_OUT)}
    wanted = ", ".join(f"{name} float32 {shape}" for name, shape in shapes.items())
    _check_tensors(path, logits, wanted, outputs.stage)
    for name, of_split in logits.items():
        if not np.isfinite(of_split).all():
            raise UserError(
                f"`{path}` holds logits for {name} that are not finite: the training diverged. "
                "Lower its learning rate in params.yaml."
            )
    return logits


def _check_made_from(outputs: ModelOutputs, stage_inputs: StageInputs) -> None:
    """Raises: UserError: the predictions are of other parameters, whatever DVC has recorded."""
    with safe_open(outputs.predictions, "numpy") as file:
        made_from = json.loads((file.metadata() or {}).get("made_from", "{}"))
    for key, value in json.loads(canonical_json(stage_inputs.params)).items():
        if key in made_from and made_from[key] != value:
            raise UserError(
                f"`{outputs.predictions}` was made when `{PARAMS_FILE}: {key}` was "
                f"{json.dumps(made_from[key])}; now that is {json.dumps(value)}. Run `dvc repro "
                f"--force --single-item {outputs.stage}`, then `dvc repro`."
            )


def _read_tensors(path: Path, stage: str) -> dict[str, np.ndarray]:
    """Raises: UserError: the file is absent or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"`{path}` is absent or damaged ({error}). {_hint(path, stage)}") from None


def _check_tensors(path: Path, tensors: Mapping[str, np.ndarray], wanted: str, stage: str) -> None:
    """Raises: UserError: the tensors have other names, types or shapes."""
    held = ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in sorted(tensors.items()))
    if held != wanted:
        raise UserError(
            f"`{path}` holds {held}; expected {wanted}, for the images of data/prepared. "
            f"{_hint(path, stage)}"
        )


def _hint(path: Path, stage: str) -> str:
    return recovery_hint(path, f"dvc repro --force {stage}")


def read_robustness(names: list[str], dataset: Dataset) -> RobustComparison:
    """Read the predictions for corrupted images and compare them.

    Raises:
        UserError: a file is absent or damaged, or is not of these images and corruptions.
    """
    labels = np.asarray(dataset.splits["test"].labels)
    samples = samples_to_corrupt(len(labels))
    teacher = _read_corrupted(TEACHER, "robustness_teacher", samples)
    students = {
        name: tuple(
            _read_corrupted(ModelOutputs(role, name), f"robustness@{name}", samples)
            for role in STUDENT_ROLES
        )
        for name in names
    }
    return compare_robustness(teacher, students, labels[samples])


def _read_corrupted(
    outputs: ModelOutputs, stage: str, samples: np.ndarray
) -> CorruptionPredictions | None:
    """Read the predicted classes of corrupted images; None for a teacher without a network."""
    path, count = outputs.corrupted_predictions, len(samples)
    tensors = _read_tensors(path, stage)
    if outputs == TEACHER and list(tensors) == ["samples"]:
        return None
    decisions = [len(CORRUPTIONS), len(SEVERITIES), count]
    wanted = f"clean int32 [{count}], decisions int32 {decisions}, samples int32 [{count}]"
    _check_tensors(path, tensors, wanted, stage)
    if not np.array_equal(tensors["samples"], samples):
        raise UserError(
            f"`{path}` is of other test images; expected {count:,} of data/prepared, evenly "
            f"spread. {_hint(path, stage)}"
        )
    return CorruptionPredictions(tensors["clean"], tensors["decisions"])


def read_training_curves(names: list[str]) -> pd.DataFrame:
    """Read every epoch of every student and baseline, one a row.

    Raises:
        UserError: a history is absent or damaged; names the command that writes it.
    """
    curves = []
    for name in names:
        for role in STUDENT_ROLES:
            history = _read_history(ModelOutputs(role, name))
            history.insert(0, "student", name)
            history.insert(1, "role", role)
            curves.append(history)
    return pd.concat(curves, ignore_index=True)


def _read_history(outputs: ModelOutputs) -> pd.DataFrame:
    path, hint = outputs.history, f"Run `dvc repro --force {outputs.stage}`."
    if not path.is_file():
        raise UserError(f"`{path}` is absent. {hint}")
    try:
        table = pd.read_csv(path)
        History.model_validate(table.to_dict("list"))
    except (OSError, ValueError):
        raise UserError(
            f"`{path}` is damaged; expected a row for each epoch from 1, and in each "
            f"`validation_accuracy` from 0 to 1. {hint}"
        ) from None
    return table


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
    )


def read_speed(names: list[str]) -> dict[str, DeviceSpeed]:
    """Read the networks' speed, by the device's type.

    Raises:
        UserError: the file is absent or damaged, or lacks a student.
    """
    devices = read_model(SPEED_FILE, Speeds, produced_by="dvc repro speed").devices
    missing = [name for name in names if any(name not in d.students for d in devices.values())]
    if missing:
        raise UserError(
            f"`{SPEED_FILE}` has no figures of {', '.join(missing)}. Run `dvc repro --force speed`."
        )
    return devices
