"""robustness: predict corrupted test images.

Reads data/prepared/ and, for a student, models/students/NAME/ and models/baselines/NAME/; or with
--teacher models/teacher/. Writes each network's predicted classes for up to 2,000 test images,
clean and under each corruption and severity, to predictions/robustness/.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from safetensors.numpy import save as serialised
from torch import nn

from pipeline.comparison.measurement.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    all_variants,
    samples_to_corrupt,
)
from pipeline.compute.device import default_device
from pipeline.data.prepared.dataset import AnySplit, open_dataset, verify_dataset
from pipeline.data.prepared.image_decoding import available_cores
from pipeline.models import checkpoint
from pipeline.models.evaluation import batches_of, predict
from pipeline.models.spec import InputSpec
from pipeline.runtime.files import write_bytes
from pipeline.runtime.outputs import TEACHER, ModelOutputs
from pipeline.runtime.params import check_student
from pipeline.runtime.progress import bar
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.views.loader import open_views
from pipeline.views.policy import ViewPolicy


def predict_variants(
    networks: Sequence[tuple[nn.Module, InputSpec]],
    split: AnySplit,
    samples: np.ndarray,
    device: torch.device,
) -> np.ndarray:
    """Predict each variant of each sample: [networks, 1 + corruptions * severities, N] int32.

    All networks see the same pixels: images are corrupted at the dataset's size, before they are
    resized and normalised for a network.
    """
    order = batches_of(samples)
    batches = open_views(split, ViewPolicy("none"), 0, torch.device("cpu")).batches(0, order)
    classes = []
    for batch in bar(batches, "corrupted images", total=len(order)):
        of_batch = []
        for images in all_variants(batch.pixels.numpy(), batch.samples, available_cores()):
            views = torch.from_numpy(images).to(device)
            of_batch.append(
                [predict(*network, views).argmax(1).cpu().numpy() for network in networks]
            )
        classes.append(np.array(of_batch, np.int32).transpose(1, 0, 2))
    return np.concatenate(classes, 2)


def write_classes(outputs: ModelOutputs, samples: np.ndarray, classes: np.ndarray | None) -> None:
    """Write one network's predicted classes.

    Args:
        samples: [N] sample numbers of test.
        classes: [1 + corruptions * severities, N] int32; None for a teacher without a network.
    """
    tensors = {"samples": samples.astype(np.int32)}
    if classes is not None:
        tensors["clean"] = np.ascontiguousarray(classes[0])
        tensors["decisions"] = np.ascontiguousarray(
            classes[1:].reshape(len(CORRUPTIONS), len(SEVERITIES), -1)
        )
    write_bytes(outputs.corrupted_predictions, serialised(tensors))


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
    test, device = open_dataset().splits["test"], default_device()
    verify_dataset()
    samples = samples_to_corrupt(len(test))
    networks = []
    for model in models:
        produced_by = f"dvc repro {model.stage}"
        if model == TEACHER and checkpoint.logit_source(model.model, produced_by=produced_by):
            inputs.check()
            write_classes(model, samples, None)
            print("robustness: the teacher is imported logits: it cannot predict other images")
            return
        network, spec = checkpoint.load(model.model, produced_by=produced_by)
        networks.append((network.to(device), spec.input))
    labels = np.asarray(test.labels)[samples]
    classes = predict_variants(networks, test, samples, device)
    inputs.check()
    for model, of_model in zip(models, classes, strict=True):
        write_classes(model, samples, of_model)
        correct = of_model == labels
        print(
            f"robustness of {model.stage}: accuracy on {len(samples):,} test images "
            f"{correct[0].mean():.2%}, corrupted {correct[1:].mean():.2%}",
            flush=True,
        )


if __name__ == "__main__":
    run_command(main)
