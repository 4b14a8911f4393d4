"""soft_targets: run the teacher once over every view of every training image, and store its logits.

Reads data/prepared/, models/teacher/ and `views`, `soft_targets` of params.yaml; writes
data/soft_targets/, where validation and test are stored as they are, without augmentation.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pipeline import checkpoint
from pipeline.augment import apply_views
from pipeline.checkpoint import TEACHER, InputSpec
from pipeline.dataset import open_dataset
from pipeline.device import default_device
from pipeline.errors import UserError, reported
from pipeline.evaluation import predict
from pipeline.files import atomic_directory
from pipeline.params.loading import load_section
from pipeline.params.soft_targets import SoftTargetsParams
from pipeline.params.views import ViewsParams
from pipeline.progress import bar
from pipeline.soft_targets import (
    STORE,
    Contents,
    ShardPlace,
    canary_digests,
    canary_samples,
    policy_of,
    shard_places,
    write_index,
    write_shard,
)


def views_of(
    images: np.ndarray, contents: Contents, place: ShardPlace, samples: np.ndarray
) -> torch.Tensor:
    """[B, C, H, W] uint8: the views of the samples that the shard is about."""
    pixels = torch.from_numpy(images[samples])
    return apply_views(pixels, policy_of(contents, place.split), contents.seed, place.view, samples)


def shard_logits(
    network: nn.Module,
    spec: InputSpec,
    images: np.ndarray,
    contents: Contents,
    place: ShardPlace,
    batch_size: int,
    device: torch.device,
) -> np.ndarray:
    """[num_samples, num_classes] float32."""
    logits = np.empty((place.num_samples, contents.num_classes), np.float32)
    for start in range(0, place.num_samples, batch_size):
        rows = np.arange(start, min(start + batch_size, place.num_samples))
        views = views_of(images, contents, place, place.first_sample + rows).to(device)
        answer = predict(network, spec, views, precision=contents.precision)
        logits[rows] = answer.cpu().numpy()
    return logits


def check_classes(teacher: Sequence[str], dataset: Sequence[str]) -> None:
    if list(teacher) != list(dataset):
        raise UserError(
            f"`{TEACHER}` was made for the {len(teacher)} classes {list(teacher)[:5]}..., but "
            f"data/prepared has the {len(dataset)} classes {list(dataset)[:5]}.... "
            "Run `dvc repro teacher`."
        )


def main() -> None:
    argparse.ArgumentParser(
        "python -m pipeline.stages.soft_targets", description=__doc__
    ).parse_args()
    views = load_section(ViewsParams, "views")
    params = load_section(SoftTargetsParams, "soft_targets")
    dataset = open_dataset().at(views.image_size)
    network, description = checkpoint.load(TEACHER, made_by="dvc repro teacher")
    check_classes(description.class_names, dataset.class_names)
    device = default_device()
    network.to(device)
    contents = Contents(
        dataset_fingerprint=dataset.fingerprint,
        teacher_fingerprint=checkpoint.fingerprint(TEACHER, made_by="dvc repro teacher"),
        policy=views.policy,
        seed=views.seed,
        image_size=views.image_size,
        encoding=params.encoding,
        k=params.k,
        precision=params.precision,
        num_classes=dataset.num_classes,
    )
    split_sizes = {name: len(split) for name, split in dataset.splits.items()}
    places = list(shard_places(split_sizes, views.num_views))
    start = time.perf_counter()
    with atomic_directory(STORE) as directory:
        for place in bar(places, "soft targets"):
            split = dataset.splits[place.split]
            source = split.images
            canaries = views_of(source, contents, place, canary_samples(place)).numpy()
            logits = shard_logits(
                network, description.input, source, contents, place, params.batch_size, device
            )
            path = directory / place.file_name
            labels = split.labels[place.first_sample : place.first_sample + place.num_samples]
            write_shard(path, contents, place, logits, labels, canary_digests(canaries))
        write_index(directory, contents, dataset.class_names, split_sizes, views.num_views, {})
        size = sum(file.stat().st_size for file in directory.iterdir())
    rows = sum(place.num_samples for place in places)
    print(
        f"{STORE}: {views.num_views} views of {split_sizes['train']:,} training images; "
        f"{rows:,} teacher passes in {time.perf_counter() - start:.1f} s, "
        f"{len(places)} shards, {size / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    with reported():
        main()
