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
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.pairs import alternate, median
from pipeline.data.prepared.dataset import EncodedSplit, open_dataset
from pipeline.data.prepared.image_decoding import eight_bits
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
        parts = crop_boxes(ViewPolicy(RESIZED_CROP), SEED, view, samples, split.sizes)
        flipped = flips(ViewPolicy(RESIZED_CROP), SEED, view, samples)
        for sample, (top, left, height, width) in enumerate(parts):
            image = eight_bits(Image.open(io.BytesIO(split.content(sample)))).convert("RGB")
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


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--pairs", type=int, default=20, help="of passes through all images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        write_files(arguments.photographs, folder)
        print(f"one process, one thread, {arguments.pairs} alternating pairs of each")
        print(f"{'kept as':>16} {'bytes':>8} {'view':>5} {'images/s':>9}"
              "  speed-up over decoding whole; over torchvision (95 %)")  # fmt: skip
        for number, (form, quality) in enumerate(FORMS.items()):
            split = kept(folder, Path(temporary) / f"prepared{number}", quality)
            size = split.offsets[-1].item() / len(split)
            found[form] = {"images": len(split), "bytes_per_image": round(size)}
            for side in SIDES:
                make = ours(split, side)
                times, whole = alternate(make, decoded_whole(split, side), arguments.pairs)
                again, theirs = alternate(make, torchvisions(folder, split, side), arguments.pairs)
                ratios = median(whole / times), median(theirs / again)
                rate = len(split) / np.median(np.concatenate([times, again]))
                print(f"{form:>16} {size:8,.0f} {side:5} {rate:9.1f}  {ratios[0]}; {ratios[1]}")
                found[form][f"views_of_{side}"] = {
                    "images_per_second": round(rate, 1),
                    "over_decoded_whole": ratios[0].as_list(),
                    "over_torchvision": ratios[1].as_list(),
                }
    print(json.dumps({"benchmark": "decoding", **found}))


if __name__ == "__main__":
    run_command(main)
