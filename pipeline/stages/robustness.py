"""robustness: what networks answer on corrupted test images.

Reads data/prepared/ and, for a student, models/students/NAME/ and models/baselines/NAME/; or with
--teacher models/teacher/. Writes what each names for up to 2,000 test images, clean and under each
corruption and severity, to predictions/robustness/.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save as serialised
from torch import nn

from pipeline.comparison.measurement.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    chosen_samples,
    corrupted,
)
from pipeline.compute.device import default_device
from pipeline.data.prepared.dataset import AnySplit, open_dataset, verify_dataset
from pipeline.data.prepared.image_decoding import available_cores
from pipeline.models import checkpoint
from pipeline.models.evaluation import BATCH_SIZE, PREDICTIONS, predict
from pipeline.models.spec import InputSpec
from pipeline.runtime.files import write_bytes
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import check_student
from pipeline.runtime.progress import bar
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.views.loader import open_views
from pipeline.views.plan import ViewPolicy


def variants(pixels: np.ndarray, samples: np.ndarray) -> Iterator[np.ndarray]:
    """[B, C, H, W] uint8: the images clean, then under each corruption, at each severity.

    Args:
        pixels: [B, C, H, W] uint8.
        samples: [B] sample numbers.
    """
    yield pixels
    with ThreadPoolExecutor(available_cores()) as pool:  # NumPy and Pillow let go of Python's lock
        for corruption in CORRUPTIONS:
            for severity in SEVERITIES:
                corrupt = partial(corrupted, corruption=corruption, severity=severity)
                yield np.stack(list(pool.map(corrupt, pixels, samples.tolist())))


def decide(
    networks: Sequence[tuple[nn.Module, InputSpec]],
    split: AnySplit,
    samples: np.ndarray,
    device: torch.device,
) -> np.ndarray:
    """[networks, 1 + corruptions * severities, N] int32: the class that each network names for each
    variant of each sample. All see the same: images are corrupted at the dataset's size, before
    they become a network's own input."""
    order = np.split(samples, range(BATCH_SIZE, len(samples), BATCH_SIZE))
    batches = open_views(split, ViewPolicy("none"), 0, torch.device("cpu")).batches(0, order)
    decisions = []
    for batch in bar(batches, "corrupted images", total=len(order)):
        answers = []
        for images in variants(batch.pixels.numpy(), batch.samples):
            shown = torch.from_numpy(images).to(device)
            answers.append(
                [predict(*network, shown).argmax(1).cpu().numpy() for network in networks]
            )
        decisions.append(np.array(answers, np.int32).transpose(1, 0, 2))
    return np.concatenate(decisions, 2)


def write(place: str, samples: np.ndarray, decisions: np.ndarray | None) -> None:
    """Args:
    samples: [N] sample numbers of test.
    decisions: [1 + corruptions * severities, N] int32; None: of a teacher without a network.
    """
    tensors = {"samples": samples.astype(np.int32)}
    if decisions is not None:
        tensors["clean"] = np.ascontiguousarray(decisions[0])
        tensors["decisions"] = np.ascontiguousarray(
            decisions[1:].reshape(len(CORRUPTIONS), len(SEVERITIES), -1)
        )
    write_bytes(PREDICTIONS / "robustness" / f"{place}.safetensors", serialised(tensors))


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.robustness", description=__doc__)
    parser.add_argument("name", nargs="?", help="a student in params.yaml")
    parser.add_argument("--teacher", action="store_true", help="the teacher, not a student")
    asked = parser.parse_args()
    if asked.teacher == (asked.name is not None):
        parser.error("expected either the name of a student or --teacher")
    inputs = (
        StageInputs("robustness_teacher")
        if asked.teacher
        else StageInputs("robustness", asked.name)
    )
    test, device = open_dataset().splits["test"], default_device()
    verify_dataset()
    samples = chosen_samples(len(test))
    if asked.teacher:
        produced_by = {"teacher": "dvc repro teacher"}
        if checkpoint.logit_source(TEACHER.model, produced_by=produced_by["teacher"]) is not None:
            inputs.check()
            write("teacher", samples, None)
            print("robustness: the teacher is a table of answers; it has none for other pixels")
            return
    else:
        check_student(asked.name)
        produced_by = {
            f"{kind}s/{asked.name}": f"dvc repro {kind}@{asked.name}"
            for kind in ("student", "baseline")
        }
    networks = []
    for place, command in produced_by.items():
        network, description = checkpoint.load(Path("models") / place, produced_by=command)
        networks.append((network.to(device), description.input))
    labels = np.asarray(test.labels)[samples]
    decided = decide(networks, test, samples, device)
    inputs.check()
    for place, decisions in zip(produced_by, decided, strict=True):
        write(place, samples, decisions)
        right = decisions == labels
        print(
            f"robustness {place}: of {len(samples):,} test images {right[0].mean():.2%} right, "
            f"corrupted {right[1:].mean():.2%}",
            flush=True,
        )


if __name__ == "__main__":
    run_command(main)
