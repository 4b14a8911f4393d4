"""Compare making views of encoded images with the usual ways.

    python -m benchmarks.decoding PHOTOGRAPHS

PHOTOGRAPHS is a folder or an archive of image files. `prepare` stores them with `storage: encoded`,
with `quality: original` and with quality 90 and a shorter side of at most 256 pixels. This process
makes views of `random_resized_crop`, 224 and 112 pixels, of all of them, in turns with (1) the same
views of the same bytes, each image decoded whole, and (2) torchvision's ImageFolder with
RandomResizedCrop, RandomHorizontalFlip and PILToTensor on the source's files.
"""

from pipeline.runtime.command import run_command

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.harness import Row, alternate, median, run_benchmark
from pipeline.data.prepared.dataset import EncodedSplit, open_dataset
from pipeline.data.prepared.image_decoding import read_image
from pipeline.data.sources.archives import read_files
from pipeline.data.sources.params import DatasetParams
from pipeline.runtime.errors import UserError
from pipeline.stages.prepare import write_dataset
from pipeline.views.geometry import crop_boxes, flips
from pipeline.views.loader import RESIZED_CROP, open_views
from pipeline.views.policy import ViewPolicy

SEED = 0
SIDES = (224, 112)
FORMS = {"original": "original", "quality 90, 256": 90}  # name -> `quality`


def write_files(photographs: Path, folder: Path) -> None:
    """Write the photographs as files of two classes, below `train/`."""
    count = 0
    for name, content in read_files(photographs):
        path = folder / "train" / "ab"[count % 2] / f"{count:06d}{Path(name).suffix.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        count += 1
    if count < 8:
        raise UserError(f"`{photographs}` holds {count} files; expected 8 images or more.")


def kept(folder: Path, prepared: Path, quality: int | str) -> EncodedSplit:
    """Prepare the photographs; returns their training split, which lacks one image in fifty."""
    prepared.mkdir()
    params = DatasetParams(
        source="image_folder",
        root=str(folder),
        storage="encoded",
        image_size=256,
        quality=quality,
        validation_fraction=0.01,
        test_fraction=0.01,
        split_seed=0,
    )
    write_dataset(params, prepared)
    return open_dataset(prepared).splits["train"]


def ours(split: EncodedSplit, side: int) -> Callable[[int], torch.Tensor]:
    split = replace(split, image_size=side)
    views = open_views(split, ViewPolicy(RESIZED_CROP), SEED, torch.device("cpu"), num_workers=0)
    return lambda view: next(views.batches(view, [np.arange(len(split))])).pixels


def decoded_whole(split: EncodedSplit, side: int) -> Callable[[int], torch.Tensor]:
    samples = np.arange(len(split))

    def views(view: int) -> torch.Tensor:
        pixels = np.empty((len(split), 3, side, side), np.uint8)
        parts = crop_boxes(SEED, view, samples, split.sizes)
        flipped = flips(SEED, view, samples)
        for sample, (top, left, height, width) in enumerate(parts):
            image = read_image(split.content(sample)).convert("RGB")
            corners = (left, top, left + width, top + height)
            image = image.resize((side, side), Image.Resampling.BILINEAR, box=corners)
            pixels[sample] = np.asarray(image)[:, :: -1 if flipped[sample] else 1].transpose(
                2, 0, 1
            )
        return torch.from_numpy(pixels)

    return views


def torchvisions(folder: Path, split: EncodedSplit, side: int) -> Callable[[int], torch.Tensor]:
    steps = [
        transforms.RandomResizedCrop(side),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
    images = ImageFolder(str(folder / "train"), transforms.Compose(steps))
    number = {str(Path(path).relative_to(folder)): i for i, (path, _) in enumerate(images.samples)}
    same = Subset(images, [number[sample_id] for sample_id in split.sample_ids])
    return lambda _: torch.stack([same[index][0] for index in range(len(same))])


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        write_files(arguments.photographs, folder)
        for number, (form, quality) in enumerate(FORMS.items()):
            split = kept(folder, Path(temporary) / f"prepared{number}", quality)
            for side in SIDES:
                make = ours(split, side)
                sides = {"ours": make, "whole": decoded_whole(split, side)}
                whole = alternate(sides, arguments.pairs)
                sides = {"ours": make, "torchvision": torchvisions(folder, split, side)}
                theirs = alternate(sides, arguments.pairs)
                yield {
                    "kept as": form,
                    "bytes": round(split.offsets[-1].item() / len(split)),
                    "view": side,
                    "images/s": len(split) / median([*whole["ours"], *theirs["ours"]]).median,
                    "over decoding whole": median(whole["whole"] / whole["ours"]),
                    "over torchvision": median(theirs["torchvision"] / theirs["ours"]),
                }


def main() -> None:
    pairs = (20, "of passes through all images")
    run_benchmark(__doc__, measure, "photographs", pairs=pairs)


if __name__ == "__main__":
    run_command(main)
