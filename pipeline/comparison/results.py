"""Read what the other stages wrote. Refuse what is damaged, or was made from other inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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

from pipeline.comparison.cache_economics import Economics
from pipeline.comparison.compare import COSTS, Predictions
from pipeline.comparison.measurement.corruptions import CORRUPTIONS, SEVERITIES, samples_to_corrupt
from pipeline.comparison.measurement.latency import (
    MEASURE_AGAIN,
    SPEED_FILE,
    Speeds,
)
from pipeline.comparison.measurement.predictions import (
    HELD_OUT,
    check_params,
    hint,
    read_logits,
    read_tensors,
)
from pipeline.comparison.robustness import (
    CorruptionPredictions,
    RobustComparison,
    compare_robustness,
)
from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.outputs import (
    NOT_ASKED,
    STORE,
    TEACHER,
    ExportedFile,
    ExportOutputs,
    ModelOutputs,
    NetworkCosts,
    Role,
    Start,
)
from pipeline.runtime.params import paired_views, read_params
from pipeline.runtime.validation import Record, read_model

STUDENT_ROLES: tuple[Role, ...] = ("distilled", "baseline")

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
    policy: str
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
    kept: list[bool]  # whether the epoch's weights are the network's

    @model_validator(mode="after")
    def _every_epoch(self) -> Self:
        if self.epoch != list(range(1, len(self.epoch) + 1)):
            raise ValueError("expected a row for each epoch from 1")
        return self


class _FileFacts(_Part):
    bytes: PositiveInt
    sha256: str


class _NetworkFacts(_Part):
    input_size: PositiveInt


class _Int8Facts(_Part):
    trained: bool = False  # by `export.int8_training`


class _Card(_Part):
    """The model card of a file, or why there is none."""

    training: Mapping[str, Any]  # the parameters of the stage that trained the network
    network: _NetworkFacts | None = None
    start: Start | None = None
    file: _FileFacts | None = None
    int8: _Int8Facts | None = None
    no_file: str | None = None


def read_exported(outputs: ExportOutputs, dataset: Dataset) -> list[Predictions]:
    """Read logits and costs of each file of the teacher, or of a student and its baseline, and then
    of the files of their other seeds. A teacher without a file has the logits that its own stage
    computed.

    Raises:
        UserError: a file is absent or damaged, or is not of these images or these parameters;
            names the command that writes it.
    """
    cards = {
        file: read_model(file.card, _Card, produced_by=f"dvc repro {outputs.stage}")
        for file in (*outputs.files, *outputs.seed_files)
    }
    cards = {f: card for f, card in cards.items() if card.file or f.role == "teacher"}
    keys = [f"{file.key}." for file in cards]
    logits, _ = read_logits(outputs.predictions, outputs.stage, dataset, keys)
    return [
        Predictions(
            name=outputs.name or "teacher",
            role=file.role,
            precision=file.precision,
            seed=file.seed,
            path=str(file.path) if card.file else None,
            no_file=card.no_file,
            sha256=card.file.sha256 if card.file else None,
            input_size=card.network.input_size if card.network else None,
            start=cards[replace(file, precision="float32")].start,
            int8_trained=card.int8 is not None and card.int8.trained,
            **{split: logits[f"{file.key}.{split}"] for split in HELD_OUT},
            **_costs(file, card),
        )
        for file, card in cards.items()
    ]


def read_refused(names: list[str]) -> dict[tuple[str, str], str]:
    """Read, by student and role, why there is no int8 file where params.yaml asks for one."""
    return {
        (name, file.role): card.no_file
        for name in names
        for file in ExportOutputs(name).files
        if file.precision == "int8"
        for card in [read_model(file.card, _Card, produced_by=f"dvc repro export@{name}")]
        if card.no_file is not None and card.no_file != NOT_ASKED
    }


def _costs(file: ExportedFile, card: _Card) -> dict[str, int | None]:
    """Read what a network costs, and check that it was trained with the parameters of now."""
    model = ModelOutputs(file.role, file.name)
    check_params(file.card, card.training, model.stage)
    if file.role == "teacher" and read_params()["teacher"]["weights"] == "logits":
        return dict.fromkeys(COSTS)
    costs = read_model(model.metrics, NetworkCosts, produced_by=f"dvc repro {model.stage}")
    return costs.model_dump() | {"size_bytes": card.file.bytes if card.file else None}


def read_students(
    names: list[str], read: Callable[[ModelOutputs], Result]
) -> dict[str, tuple[Result, Result]]:
    """Read, by student, what its distilled network and its baseline wrote."""
    return {name: tuple(read(ModelOutputs(role, name)) for role in STUDENT_ROLES) for name in names}


def read_robustness(
    teacher: Predictions, students: Mapping[str, Sequence[Predictions]], dataset: Dataset
) -> RobustComparison:
    """Read the predictions for corrupted images and compare them with those of the same images
    without corruption, which are the files' test predictions.

    Raises:
        UserError: a file is absent or damaged, or is not of these images, corruptions and exported
            files.
    """
    labels = np.asarray(dataset.splits["test"].labels)
    samples = samples_to_corrupt(len(labels))

    def read(outputs: ExportOutputs, models: Sequence[Predictions]) -> list[CorruptionPredictions]:
        with_file = [model for model in models if model.path is not None]
        path, stage, count = outputs.corrupted_predictions, outputs.robustness_stage, len(samples)
        shape = [len(CORRUPTIONS), len(SEVERITIES), count]
        expected = {f"samples int32 [{count}]", *(f"{m.key} int32 {shape}" for m in with_file)}
        if with_file:
            expected.add("image_size int32 [1]")
        tensors, made_from = read_tensors(path, stage, ", ".join(sorted(expected)))
        files = {model.key: model.sha256 for model in with_file}
        if made_from.get("files", files) != files:
            raise UserError(
                f"`{path}` was made from other files than those in models/exported; expected the "
                f"same. {hint(path, stage)}"
            )
        if not np.array_equal(tensors["samples"], samples):
            raise UserError(
                f"`{path}` is of other test images; expected {count:,} of data/prepared, evenly "
                f"spread. {hint(path, stage)}"
            )
        return [
            CorruptionPredictions(
                model.test[samples].argmax(1),
                tensors[model.key],
                int(tensors["image_size"][0]),
                role=model.role,
                precision=model.precision,
                seed=model.start.seed if model.start else None,
                is_main=model.seed is None,
            )
            for model in with_file
        ]

    of_students = {name: read(ExportOutputs(name), models) for name, models in students.items()}
    of_teacher = next(iter(read(ExportOutputs(), [teacher])), None)
    return compare_robustness(of_teacher, of_students, labels[samples])


def read_training(outputs: ModelOutputs) -> Training:
    """Read which epoch was kept, and the optimiser steps."""
    return read_model(outputs.metrics, Training, produced_by=f"dvc repro {outputs.stage}")


def read_training_curves(names: list[str]) -> pd.DataFrame:
    """Read every epoch of the teacher, each student and each baseline, one a row; none of a teacher
    that was not trained.

    Raises:
        UserError: a history is absent or damaged, or of a training that has not finished; names the
            command that writes it.
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
    if outputs == TEACHER and table.empty:  # it was not trained
        return table
    if table["kept"].sum() != 1:
        raise UserError(
            f"`{path}` is of a training that did not finish: it has "
            f"{counted(len(table), 'epoch')}, and none of them is kept. {hint}"
        )
    kept = int(table["epoch"][table["kept"]].item())
    if outputs != TEACHER and kept != (expected := read_training(outputs).kept_epoch):
        raise UserError(
            f"`{path}` says that epoch {kept} was kept, but `{outputs.metrics}` says epoch "
            f"{expected}; expected both of one training. {hint}"
        )
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


def cache_economics(
    index: StoreIndex, curves: pd.DataFrame, trainings: Mapping[str, int]
) -> Economics:
    """Count what the store's index and the histories imply.

    Args:
        curves: one row per epoch of each main training.
        trainings: of each student, one for each seed.
    """
    epochs = curves[curves["role"] == "distilled"].groupby("student", sort=False).size()
    return Economics(
        views=index.num_views,
        training_images=index.splits.train,
        held_out_images=index.splits.validation + index.splits.test,
        epochs={name: int(count) * trainings[name] for name, count in epochs.items()},
        of_both_views=frozenset(
            name
            for name in trainings
            if index.policy.startswith("weak=") and paired_views(read_params(), name) == "both"
        ),
        bytes_per_row=index.fidelity.bytes_per_row,
        extra_passes=index.fidelity.extra_passes,
    )


def read_speed(names: list[str]) -> Speeds:
    """Read the speed of the files.

    Raises:
        UserError: the file is absent or damaged, or lacks a student.
    """
    speeds = read_model(SPEED_FILE, Speeds, produced_by="dvc repro speed")
    settings = speeds.settings.values()
    missing = [name for name in names if any(not speed.find(name) for speed in settings)]
    if missing:
        raise UserError(
            f"`{SPEED_FILE}` has no figures of {', '.join(missing)}. Run `{MEASURE_AGAIN}`."
        )
    return speeds
