"""Compare the rate of `soft_targets` with the teacher's bare forward pass.

    python -m benchmarks.writing

A ResNet-56 on 32-pixel images, batches of 256. The stage's side makes whole shards like the stage,
four in a round: views, normalisation, forward pass, and in a thread encoding, checksums, file,
flush to disk. The other side runs the same network on batches that are ready: augmented,
normalised, in memory. By default there are 100 classes, and shards have 1,024 rows, a sixteenth of
a full one, so the fixed cost of a shard counts sixteen times. Images and weights are random; their
values do not matter to speed.
"""

from pipeline.runtime.command import run_command

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import stores
from benchmarks.harness import Row, alternate, median, run_benchmark
from pipeline.compute.device import default_device
from pipeline.data.prepared.dataset import Dataset, Split
from pipeline.models.spec import InputSpec
from pipeline.networks import cifar_resnet
from pipeline.store.format.schema import ShardKey
from pipeline.store.format.views_by_split import open_views_by_split
from pipeline.store.writing.job import StoreJob, make_shards
from pipeline.store.writing.teacher_logits import TeacherForward

BATCH, SIZE = 256, 32
SHARDS = 4  # of a round: all but the last are written while the teacher runs
ENCODINGS = {"dense": None, "top_k": 10}


def make_job(rows: int, classes: int) -> StoreJob:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (rows, 3, SIZE, SIZE), dtype=np.uint8)
    labels = rng.integers(0, classes, rows)
    names = [str(number) for number in range(classes)]
    statistics = ([0.5] * 3, [0.25] * 3)
    split = Split(labels, Path(), "train", images)
    torch.manual_seed(0)
    network = cifar_resnet.build("resnet56", classes, 3).to(memory_format=torch.channels_last)
    device = default_device()
    contents = stores.identity(classes, size=SIZE)
    dataset = Dataset("0" * 64, names, 3, SIZE, *statistics, {"train": split})
    views, spec = open_views_by_split(dataset, contents, device), InputSpec(3, SIZE, *statistics)
    return StoreJob(
        teacher=TeacherForward(network.to(device).eval(), spec, views, "float32", BATCH),
        dataset=dataset,
        identity=contents,
        views=views,
        num_views=162,
        batch_size=BATCH,
        device=device,
    )


def ready_batches(job: StoreJob) -> list[torch.Tensor]:
    (batch,) = job.views["train"].batches(0, [np.arange(job.split_sizes["train"])])
    return list(job.teacher.spec.apply(batch.pixels).split(BATCH))


@torch.inference_mode()
def bare_forward(job: StoreJob, batches: list[torch.Tensor]) -> None:
    for batch in batches * SHARDS:
        logits = job.teacher.network(batch)
    logits.cpu()  # on CUDA, waits for all


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    rows, classes = arguments.rows, arguments.classes
    job = make_job(rows, classes)
    batches = ready_batches(job)
    with tempfile.TemporaryDirectory() as folder:
        for encoding, k in ENCODINGS.items():
            writer = replace(
                job, identity=stores.identity(classes, encoding=encoding, k=k, size=SIZE)
            )

            def make(turn: int, writer: StoreJob = writer) -> None:
                views = (np.arange(SHARDS) + SHARDS * turn) % writer.num_views
                keys = [ShardKey("train", view, 0, rows) for view in views.tolist()]
                make_shards(writer, Path(folder), keys)

            sides = {"stage": make, "forward": lambda _: bare_forward(job, batches)}
            times = alternate(sides, arguments.pairs)
            yield {
                "encoding": encoding,
                "stage, images/s": SHARDS * rows / median(times["stage"]).median,
                "forward, images/s": SHARDS * rows / median(times["forward"]).median,
                "stage / forward": median(times["forward"] / times["stage"]),
            }


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        pairs=(100, "pairs for each encoding"),
        rows=(1024, "of a shard"),
        classes=(100, "of the teacher"),
    )


if __name__ == "__main__":
    run_command(main)
