"""Compare passes over encoded images whose decoding processes live on with passes that each start
their own.

    OMP_NUM_THREADS=1 python -m benchmarks.decoding_workers

Random images of 256 pixels, JPEG of quality 90; views of `random_resized_crop`, 32 and 224 pixels,
in batches of 64. A pass is an epoch without a network: decoding is all that it does. With `now`,
the same opened views make every pass; with `before`, each pass opens them again, and its processes
start and end with it.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Row, alternate, median, run_benchmark
from pipeline.data.prepared.dataset import EncodedSplit, open_dataset
from pipeline.data.sources.params import DatasetParams
from pipeline.stages.prepare import write_dataset
from pipeline.views.loader import RESIZED_CROP, AnyViews, batches_of, open_views
from pipeline.views.policy import ViewPolicy

STORED, BATCH = 256, 64
SIDES = (32, 224)


def encoded_noise(folder: Path, count: int) -> EncodedSplit:
    """Prepare random images, coarse as photographs are; returns their training split."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        path = folder / "images/train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((STORED, STORED), Image.Resampling.BICUBIC).save(path, quality=90)
    prepared = folder / "prepared"
    prepared.mkdir()
    params = DatasetParams(
        source="image_folder",
        root=str(folder / "images"),
        storage="encoded",
        image_size=STORED,
        quality="original",
        validation_fraction=0.01,
        test_fraction=0.01,
        split_seed=0,
    )
    write_dataset(params, prepared)
    return open_dataset(prepared).splits["train"]


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        split = encoded_noise(Path(temporary), max(arguments.images))
        for side in SIDES:
            for count in arguments.images:
                order = batches_of(np.arange(min(count, len(split))), BATCH)
                yield {
                    "images in a pass": count,
                    "view": side,
                    **compare(split.resized(side), order, arguments),
                }


def compare(split: EncodedSplit, order: list[np.ndarray], arguments: argparse.Namespace) -> Row:
    def opened() -> AnyViews:
        policy, device = ViewPolicy(RESIZED_CROP), torch.device("cpu")
        return open_views(split, policy, 0, device, num_workers=arguments.workers)

    kept = opened()

    def make(views: AnyViews, number: int) -> None:
        for _ in views.batches(number, order):
            pass

    sides = {"now": lambda it: make(kept, it), "before": lambda it: make(opened(), it)}
    times = alternate(sides, arguments.pairs)
    return {
        "batches": len(order),
        "before / now": median(times["before"] / times["now"]),
    }


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        images=([192, 2048], "in a pass"),
        workers=(2, "processes that decode"),
        pairs=(20, "passes of each side"),
    )


if __name__ == "__main__":
    main()
