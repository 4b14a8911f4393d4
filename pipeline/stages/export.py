"""export: write a student and its baseline, or the teacher, as ONNX files, and measure the files.

Reads data/prepared/, models/students/NAME/ and models/baselines/NAME/ (with --teacher:
models/teacher/), their predictions, and `dataset`, `views`, `export`, `students.NAME` of
params.yaml. Compares each file's logits with PyTorch's, and writes the files and their model cards
to models/exported/, the files' logits to predictions/exported/ and the differences to
metrics/export/. Files run in onnxruntime on the CPU.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from pipeline.comparison.measurement.predictions import HELD_OUT, read_logits, write_predictions
from pipeline.data.prepared.dataset import Dataset, open_dataset, verify_dataset
from pipeline.data.prepared.image_decoding import CLEAN_RATIO
from pipeline.data.sources.params import DatasetParams
from pipeline.export.file_card import describe_file
from pipeline.export.int8 import calibration_views, float_operations, to_int8
from pipeline.export.int8_checks import KERNEL_IMAGES, int8_accuracy, verify_kernels
from pipeline.export.model_card import Int8Facts, ModelCard, NoFile
from pipeline.export.params import ExportParams, load_export
from pipeline.export.running.file_images import evenly_spread, file_logits
from pipeline.export.running.onnx_model import ExportedNetwork, OnnxMetadata, inference_threads
from pipeline.export.running.reading import Reading
from pipeline.export.to_onnx import OPSET, Graphs, NotExportable, to_onnx
from pipeline.export.verification import float32_error, verify_logits
from pipeline.models import checkpoint
from pipeline.models.spec import InputSpec, ModelSpec
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import read_json, write_bytes, write_json
from pipeline.runtime.locks import only_run_of
from pipeline.runtime.outputs import (
    NOT_ASKED,
    TEACHER,
    ExportedFile,
    ExportOutputs,
    ModelOutputs,
    Start,
)
from pipeline.runtime.params import check_student, load_section
from pipeline.runtime.signals import remove
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.views.params import ViewsParams


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What is written of one network: its card, and its file if it is a `WrittenFile`."""

    file: ExportedFile
    card: ModelCard | NoFile
    figures: Mapping[str, Any] = field(default_factory=dict)
    logits: Mapping[str, np.ndarray] = field(default_factory=dict)  # [N, num_classes] by split


@dataclass(frozen=True, kw_only=True)
class WrittenFile(Exported):
    card: ModelCard
    spec: ModelSpec
    metadata: OnnxMetadata
    content: bytes


def reading_of(params: DatasetParams, spec: InputSpec) -> Reading:
    """Describe how images become the file's input."""
    encoded = {}
    if params.storage == "encoded":
        own = spec.resize_ratio is not None  # then the file itself cuts the middle out
        encoded = {
            "quality": params.quality,
            "resize_ratio": 1.0 if own else CLEAN_RATIO,
            "interpolation": spec.interpolation or "bilinear" if own else "bilinear",
        }
    return Reading(
        storage=params.storage,
        image_size=params.image_size,
        bit_depth=params.bit_depth,
        **encoded,
    )


def images_taken(model: ModelOutputs, spec: InputSpec, dataset: Dataset) -> Dataset:
    """The dataset with images of the side that the network's file takes: those with which the
    network's stage measured it."""
    own = model == TEACHER or spec.resize_ratio is not None
    return dataset.resized(spec.resized_side) if dataset.encoded and own else dataset


def onnx_metadata(
    model: ModelOutputs, spec: ModelSpec, dataset: Dataset, reading: Reading
) -> OnnxMetadata:
    """The metadata of the float32 file. Refuses a network of other images than the prepared."""
    again = f"dvc repro {model.stage}"
    trained_for = (list(spec.class_names), spec.input.channels)
    if trained_for != (list(dataset.class_names), dataset.channels):
        raise UserError(
            f"`{model.model}` was trained for {spec.num_classes} classes and images of "
            f"{spec.input.channels} channels, but data/prepared has {dataset.num_classes} "
            f"classes, of these or other names, and {dataset.channels} channels. Run `{again}`."
        )
    return OnnxMetadata(
        name=model.name or "teacher",
        role=model.role,
        precision="float32",
        fingerprint=checkpoint.fingerprint(model.model, produced_by=again),
        class_names=list(dataset.class_names),
        opset=OPSET,
        channels=dataset.channels,
        image_size=dataset.image_size,
        reading=reading,
    )


def export_network(
    model: ModelOutputs,
    dataset: Dataset,
    params: DatasetParams,
    licence: str | None,
    graphs: Graphs,
) -> WrittenFile:
    """Export one network in float32, and compare the file with the logits of its stage.

    Args:
        dataset: for a student, of images of the views' size.
        graphs: of `to_onnx`.

    Raises:
        NotExportable: with the reason.
        UserError: the file's logits are not the network's.
    """
    file = ExportedFile(model.role, model.name, seed=model.seed)
    network, spec = checkpoint.load(model.model, produced_by=f"dvc repro {model.stage}")
    dataset = images_taken(model, spec.input, dataset)
    metadata = onnx_metadata(model, spec, dataset, reading_of(params, spec.input))
    content = to_onnx(network, spec.input, metadata, graphs)
    main = replace(model, seed=None)
    keys = ["", *(replace(model, seed=seed).logits_key for seed in main.other_seeds)]
    expected, made_from = read_logits(model.predictions, model.stage, dataset, keys)
    session = ExportedNetwork(content, str(file.path), inference_threads())
    metadata, logits = session.metadata, held_out_logits(session, dataset)
    test = dataset.splits["test"]
    figures = verify_logits(
        metadata.described,
        expected[f"{model.logits_key}test"],
        logits["test"],
        test.labels,
        partial(float32_error, network, spec.input, test),
    )
    card = describe_file(
        file,
        content,
        metadata,
        spec,
        dataset,
        logits["test"],
        training=made_from,
        start=checkpoint.read_start(model.model, produced_by=f"dvc repro {model.stage}"),
        teacher=teacher_facts() if model.role == "distilled" else None,
        licence=licence,
    )
    return WrittenFile(
        file=file,
        card=card,
        figures=figures,
        logits=logits,
        spec=spec,
        metadata=metadata,
        content=content,
    )


def held_out_logits(session: ExportedNetwork, dataset: Dataset) -> dict[str, np.ndarray]:
    """Compute raw logits, [N, num_classes] float32, of each held-out split."""
    return {name: file_logits(session, dataset.splits[name]) for name in HELD_OUT}


def teacher_facts() -> dict[str, Any]:
    """Read what models/teacher/ says of the network behind the soft targets."""
    content = read_json(TEACHER.model / checkpoint.DESCRIPTION, produced_by="dvc repro teacher")
    return {key: content[key] for key in ("family", "network", "options") if key in content}


def without_file(
    file: ExportedFile,
    reason: NotExportable,
    training: Mapping[str, Any],
    start: Start | None = None,
) -> NoFile:
    """Make the card that replaces a file that is not written."""
    return NoFile(
        name=file.name or "teacher",
        role=file.role,
        precision=file.precision,
        no_file=str(reason),
        training=training,
        start=start,
    )


def export_teacher() -> None:
    inputs = StageInputs("export_teacher")
    outputs, dataset = ExportOutputs(), open_dataset()
    verify_dataset()
    params = load_section(DatasetParams, "dataset")
    licence = load_export().licence
    (file,) = outputs.files
    try:
        if checkpoint.logit_source(TEACHER.model, produced_by="dvc repro teacher"):
            raise NotExportable("it is imported logits, which have no network")
        exported = export_network(TEACHER, dataset, params, licence, graphs={})
    except NotExportable as error:
        logits, training = read_logits(TEACHER.predictions, TEACHER.stage, dataset)
        exported = Exported(file=file, card=without_file(file, error, training), logits=logits)
    write(outputs, inputs, [exported], dataset)


def export_student(name: str) -> None:
    inputs = StageInputs("export", name)
    views, params = load_section(ViewsParams, "views"), load_section(DatasetParams, "dataset")
    options, dataset = load_export(name), open_dataset().resized(views.image_size)
    verify_dataset()
    graphs: Graphs = {}

    def export(model: ModelOutputs) -> WrittenFile:
        return export_network(model, dataset, params, options.licence, graphs)

    mains = [ModelOutputs(role, name) for role in ("distilled", "baseline")]
    floats = [export(main) for main in mains]
    ints = [quantised(each, dataset, views, options, graphs) for each in floats]
    others = [export(replace(main, seed=seed)) for main in mains for seed in main.other_seeds]
    outputs = ExportOutputs(name)
    write(outputs, inputs, [*floats, *ints, *others], dataset)
    # So that the folder, which DVC keeps, is never empty.
    files = {each.file.key: str(each.file.path) for each in others}
    write_json(outputs.seed_folder / "files.json", files)


def quantised(
    float32: WrittenFile,
    dataset: Dataset,
    views: ViewsParams,
    options: ExportParams,
    graphs: Graphs,
) -> Exported:
    """Quantise a network to int8, if the parameters ask for it. Where the int8 file is refused, the
    card says why."""
    file, figures = replace(float32.file, precision="int8"), {}
    dataset = dataset.resized(float32.metadata.image_size)
    try:
        if options.precision == "float32":
            raise NotExportable(NOT_ASKED)
        content = int8_source(float32, graphs)
        reading = float32.metadata.reading if float32.spec.input.resize_ratio is not None else None
        content = to_int8(content, calibration_views(dataset, views, clean=reading))
        session = ExportedNetwork(content, str(file.path), inference_threads())
        metadata, logits = session.metadata, held_out_logits(session, dataset)
        as_written = ExportedNetwork(content, str(file.path), inference_threads(), optimised=False)
        test = dataset.splits["test"]
        some = evenly_spread(len(test), KERNEL_IMAGES)
        figures |= verify_kernels(
            metadata.described, logits["test"][some], file_logits(as_written, test, some)
        )
        accuracy = int8_accuracy(
            float32.logits["test"], logits["test"], np.asarray(test.labels), options.largest_loss
        )
        lost = {key: round(getattr(accuracy.gain, key), 6) for key in ("gain", "low", "high")}
        figures |= lost
        if accuracy.refused:
            raise NotExportable(accuracy.sentence)
    except NotExportable as error:
        known = float32.card.training, float32.card.start
        return Exported(file=file, card=without_file(file, error, *known), figures=figures)
    card = describe_file(
        file,
        content,
        metadata,
        float32.spec,
        dataset,
        logits["test"],
        training=float32.card.training,
        start=float32.card.start,
        teacher=float32.card.teacher,
        licence=options.licence,
        int8=Int8Facts(
            **lost,
            float_operations=float_operations(content),
            trained=metadata.fingerprint != float32.metadata.fingerprint,
        ),
    )
    return replace(
        float32,
        file=file,
        card=card,
        figures=figures,
        logits=logits,
        metadata=metadata,
        content=content,
    )


def int8_source(float32: WrittenFile, graphs: Graphs) -> bytes:
    """The file that becomes int8: the float32 file, or one of what `int8_training` made of its
    network."""
    model = ModelOutputs(float32.file.role, float32.file.name)
    trained, produced_by = model.int8_source, f"dvc repro int8_training@{model.name}"
    if trained == model.model:
        return float32.content
    network, spec = checkpoint.load(trained, produced_by=produced_by)
    fingerprint = checkpoint.fingerprint(trained, produced_by=produced_by)
    metadata = float32.metadata.model_copy(update={"fingerprint": fingerprint})
    return to_onnx(network, spec.input, metadata, graphs)


def write(
    outputs: ExportOutputs, inputs: StageInputs, exported: Sequence[Exported], dataset: Dataset
) -> None:
    """Write files, cards, logits and figures, and print a line for each file."""
    inputs.check()
    if outputs.name is not None:
        remove(outputs.seed_folder)
    for each in exported:
        if isinstance(each, WrittenFile):
            write_bytes(each.file.path, each.content)
        else:
            each.file.path.unlink(missing_ok=True)
        write_json(each.file.card, each.card.model_dump(exclude_none=True))
    write_predictions(
        outputs.predictions,
        inputs.params,
        {
            f"{each.file.key}.{split}": logits
            for each in exported
            for split, logits in each.logits.items()
        },
    )
    write_json(outputs.metrics, {each.file.key: each.figures for each in exported})
    images = counted(len(dataset.splits["test"]), "test image")
    for each in exported:
        if getattr(each.card, "no_file", None) == NOT_ASKED:
            continue
        print(describe(each, images), flush=True)


def describe(exported: Exported, images: str) -> str:
    """A line for the console."""
    file, card, figures = exported.file, exported.card, exported.figures
    if isinstance(card, NoFile):
        return f"{file.path}: not written: {card.no_file}"
    line = (
        f"{file.path}: {card.file.bytes:,} bytes; on {images}, accuracy {card.test.accuracy:.2%} "
    )
    if card.int8 is not None:
        low, high = 100 * card.int8.low, 100 * card.int8.high
        return (
            f"{line}({100 * card.int8.gain:+.2f} points against float32, {low:+.2f} to {high:+.2f})"
        )
    return (
        f"{line}(PyTorch {figures['torch_accuracy']:.2%}), largest difference of a logit "
        f"{figures['largest_difference']:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.export", description=__doc__)
    parser.add_argument("name", nargs="?", help="a student in params.yaml")
    parser.add_argument("--teacher", action="store_true", help="the teacher, not a student")
    arguments = parser.parse_args()
    if arguments.teacher == (arguments.name is not None):
        parser.error("expected either the name of a student or --teacher")
    if arguments.name is not None:
        check_student(arguments.name)
    with only_run_of(ExportOutputs(arguments.name).stage):
        export_teacher() if arguments.teacher else export_student(arguments.name)


if __name__ == "__main__":
    run_command(main)
