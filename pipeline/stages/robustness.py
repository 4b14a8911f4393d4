"""robustness: predict corrupted test images.

Reads data/prepared/ and, for a student, models/students/NAME/, models/baselines/NAME/ and
`views.image_size` of params.yaml; or with --teacher models/teacher/. Writes each network's
predicted classes for up to 2,000 test images under each corruption and severity to
predictions/robustness/. Images have the size at which the network's test accuracy was measured.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pipeline.comparison.measurement.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    all_variants,
    samples_to_corrupt,
)
from pipeline.compute.device import default_device
from pipeline.data.prepared.dataset import AnySplit, Dataset, open_dataset, verify_dataset
from pipeline.data.prepared.image_decoding import available_cores
from pipeline.models import checkpoint
from pipeline.models.evaluation import batches_of, open_clean_views, predict, write_predictions
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import counted
from pipeline.runtime.outputs import TEACHER, ModelOutputs
from pipeline.runtime.params import check_student, load_section
from pipeline.runtime.progress import bar
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.views.params import ViewsParams


def predict_variants(
    networks: Sequence[tuple[nn.Module, InputSpec]],
    split: AnySplit,
    samples: np.ndarray,
    device: torch.device,
) -> np.ndarray:
    """Predict each variant of each sample: [networks, corruptions, severities, N] int32.

    All networks have one InputSpec and see the same pixels: images are corrupted at the size of the
    views, before they are resized and normalised for the network.
    """
    order = batches_of(samples)
    views = open_clean_views(split, networks[0][1], torch.device("cpu"))
    classes = []
    for batch in bar(views.batches(0, order), "corrupted images", total=len(order)):
        of_batch = []
        for images in all_variants(batch.pixels.numpy(), batch.samples, available_cores()):
            corrupted = torch.from_numpy(images).to(device)
            logits = [predict(*network, corrupted, clean=True) for network in networks]
            of_batch.append([rows.argmax(1).cpu().numpy() for rows in logits])
        classes.append(np.array(of_batch, np.int32).transpose(1, 0, 2))
    variants = len(CORRUPTIONS), len(SEVERITIES)
    return np.concatenate(classes, 2).reshape(len(networks), *variants, len(samples))


def size_of_test_accuracy(dataset: Dataset, model: ModelOutputs, spec: InputSpec) -> int:
    """The side, in pixels, of the test images on which the model's own stage measured it."""
    if model != TEACHER:
        return load_section(ViewsParams, "views").image_size
    return spec.resized_side if dataset.encoded else dataset.image_size


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.robustness", description=__doc__)
    parser.add_argument("name", nargs="?", help="a student in params.yaml")
    parser.add_argument("--teacher", action="store_true", help="the teacher, not a student")
    arguments = parser.parse_args()
    if arguments.teacher == (arguments.name is not None):
        parser.error("expected either the name of a student or --teacher")
    if arguments.teacher:
        inputs, models = StageInputs("robustness_teacher"), [TEACHER]
    else:
        check_student(arguments.name)
        inputs = StageInputs("robustness", arguments.name)
        models = [ModelOutputs(role, arguments.name) for role in ("distilled", "baseline")]
    dataset, device = open_dataset(), default_device()
    test = dataset.splits["test"]
    verify_dataset()
    samples = samples_to_corrupt(len(test))
    networks = []
    for model in models:
        produced_by = f"dvc repro {model.stage}"
        if model == TEACHER and checkpoint.logit_source(model.model, produced_by=produced_by):
            inputs.check()
            write_predictions(
                model.corrupted_predictions, inputs.params, samples=torch.from_numpy(samples).int()
            )
            print("robustness: the teacher is imported logits: it cannot predict other images")
            return
        network, spec = checkpoint.load(model.model, produced_by=produced_by)
        networks.append((network.to(device), spec.input))
        size = size_of_test_accuracy(dataset, model, spec.input)
    if size != dataset.image_size:
        test = test.resized(size)
    labels = np.asarray(test.labels)[samples]
    classes = predict_variants(networks, test, samples, device)
    inputs.check()
    for model, of_model in zip(models, classes, strict=True):
        write_predictions(
            model.corrupted_predictions,
            inputs.params,
            decisions=torch.from_numpy(of_model),
            image_size=torch.tensor([size], dtype=torch.int32),
            samples=torch.from_numpy(samples).int(),
        )
        print(
            f"robustness of {model.stage}: {(of_model == labels).mean():.2%} of "
            f"{counted(len(samples), 'test image')} at {size} pixels under corruption",
            flush=True,
        )


if __name__ == "__main__":
    run_command(main)
