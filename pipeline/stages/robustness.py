"""robustness: predict corrupted test images.

Reads data/prepared/ and the exported files of a student and its baseline, or with --teacher of the
teacher, with their model cards. Writes each file's predicted classes for up to 2,000 test images
under each corruption and severity to predictions/robustness/. Images have the size that the files
take.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Sequence

import numpy as np

from pipeline.comparison.measurement.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    all_variants,
    samples_to_corrupt,
)
from pipeline.comparison.measurement.predictions import write_predictions
from pipeline.data.prepared.dataset import AnySplit, open_dataset, verify_dataset
from pipeline.data.prepared.image_decoding import available_cores
from pipeline.export.model_card import ModelCard, read_card
from pipeline.export.running.file_images import open_images
from pipeline.export.running.onnx_model import ExportedNetwork, inference_threads, open_file
from pipeline.runtime.errors import counted
from pipeline.runtime.locks import only_run_of
from pipeline.runtime.outputs import ExportedFile, ExportOutputs
from pipeline.runtime.params import check_student
from pipeline.runtime.progress import bar
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.views.loader import batches_of


def predict_variants(
    models: Sequence[ExportedNetwork], split: AnySplit, samples: np.ndarray
) -> np.ndarray:
    """Predict each variant of each sample: [models, corruptions, severities, N] int32.

    All models take the same images, which are corrupted at the size that they take.
    """
    order = batches_of(samples)
    views = open_images(split, models[0].metadata.reading)
    classes = []
    for batch in bar(views.batches(0, order), "corrupted images", total=len(order)):
        of_batch = [
            [model.logits(images).argmax(1) for model in models]
            for images in all_variants(batch.pixels.numpy(), batch.samples, available_cores())
        ]
        classes.append(np.array(of_batch, np.int32).transpose(1, 0, 2))
    variants = len(CORRUPTIONS), len(SEVERITIES)
    return np.concatenate(classes, 2).reshape(len(models), *variants, len(samples))


def measure(outputs: ExportOutputs, inputs: StageInputs) -> None:
    """Predict the corrupted test images by each file, and write the predicted classes."""
    dataset = open_dataset()
    verify_dataset()
    test = dataset.splits["test"]
    samples = samples_to_corrupt(len(test))
    tensors = {"samples": samples.astype(np.int32)}
    lines = ["robustness: the teacher has no file: it cannot predict other images"]
    again = f"dvc repro {outputs.stage}"
    cards = {
        file: read_card(file.card, produced_by=again)
        for file in (*outputs.files, *outputs.seed_files)
    }
    files = [file for file, card in cards.items() if isinstance(card, ModelCard)]
    if files:
        models = [open_file(file.path, inference_threads()) for file in files]
        size = models[0].metadata.image_size
        if size != dataset.image_size:
            test = test.resized(size)
        classes = predict_variants(models, test, samples)
        tensors["image_size"] = np.array([size], np.int32)
        tensors |= {file.key: of_file for file, of_file in zip(files, classes, strict=True)}
        correct = classes == np.asarray(test.labels)[samples]
        lines = [line(*each, len(samples), size) for each in zip(files, correct, strict=True)]
    inputs.check()
    made_from = {"files": {file.key: cards[file].file.sha256 for file in files}}
    write_predictions(outputs.corrupted_predictions, inputs.params | made_from, tensors)
    print(*lines, sep="\n", flush=True)


def line(file: ExportedFile, correct: np.ndarray, images: int, size: int) -> str:
    return (
        f"robustness of {file.path}: {correct.mean():.2%} of {counted(images, 'test image')} at "
        f"{size} pixels under corruption"
    )


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.robustness", description=__doc__)
    parser.add_argument("name", nargs="?", help="a student in params.yaml")
    parser.add_argument("--teacher", action="store_true", help="the teacher, not a student")
    arguments = parser.parse_args()
    if arguments.teacher == (arguments.name is not None):
        parser.error("expected either the name of a student or --teacher")
    if arguments.name is not None:
        check_student(arguments.name)
    outputs = ExportOutputs(arguments.name)
    stage = outputs.robustness_stage
    with only_run_of(stage):
        measure(outputs, StageInputs(stage.partition("@")[0], arguments.name))


if __name__ == "__main__":
    run_command(main)
