"""Measure which near-copies across splits `prepare` finds, which others it takes for one, its cost.

    python -m benchmarks.near_copies IMAGES [--side 32] [--images 4000] [--counts N N]

IMAGES is a folder or an archive of image files, or `digits`. Up to `--images` of them, evenly
spread, become squares of `--side` pixels, as in `prepare`. They are halved at random, as training
and test split: `told` are test images that are called a near-copy of a training image, false
alarms or copies that the source has. Then all are the training split, and a copy of each the test
split (0.5 to 2 times its size by one of three filters, then a JPEG of quality 50 to 95): `found`
are those that are called a copy of their own image. `cost` is the time of sketches and search over
that of decoding and resizing, on one core, with a tenth of the images held out. Each is the mean
of `--rounds`.

`--counts`: the search for a held-out image among so many training images, in microseconds on one
core. The images are random crops of IMAGES, three quarters of the side: more alike than those of a
dataset.
"""

from pipeline.runtime.command import run_command

import argparse
import io
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import Row, run_benchmark
from pipeline.data.prepared.image_decoding import eight_bits, open_image
from pipeline.data.sources.archives import read_files
from pipeline.data.sources.image_reading import to_pixels
from pipeline.data.sources.leftovers import has_picture_suffix
from pipeline.data.sources.near_copies import find_near_copies, sketch
from pipeline.data.sources.splits import TEST, TRAIN, SampleTable
from pipeline.runtime.errors import UserError

FILTERS = [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]
HELD_OUT = 5000  # images of `--counts`


def read_contents(path: Path, most: int) -> list[bytes]:
    """Read the files of up to `most` images, evenly spread over the source."""
    if str(path) == "digits":
        from sklearn.datasets import load_digits  # noqa: PLC0415  (takes seconds)

        pixels = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[:most]
        return [_saved(Image.fromarray(image), "PNG") for image in pixels]
    contents = [content for _, content in read_files(path, has_picture_suffix)]
    if len(contents) < 8:
        raise UserError(f"`{path}` holds {len(contents)} images; expected 8 or more.")
    return contents[:: -(-len(contents) // most)]


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decoded(contents: Sequence[bytes], side: int) -> list[np.ndarray]:
    return [to_pixels(eight_bits(open_image(content)), side, 3) for content in contents]


def copy_of(content: bytes, rng: np.random.Generator) -> bytes:
    """The image at 0.5 to 2 times its size, as a JPEG."""
    image = eight_bits(open_image(content)).convert("RGB")
    scale = 2 ** rng.uniform(-1, 1)
    size = [max(1, round(side * scale)) for side in image.size]
    resized = image.resize(size, rng.choice(FILTERS))
    return _saved(resized, "JPEG", quality=int(rng.integers(50, 96)))


def near_copies(rows: np.ndarray, is_test: np.ndarray) -> dict[str, str]:
    """The training image that each test image is called a copy of, by their numbers."""
    samples = SampleTable(
        [str(number) for number in range(len(rows))],
        np.zeros(len(rows), np.int64),
        np.where(is_test, TEST, TRAIN).astype(np.int8),
    )
    digests = np.arange(len(rows))[:, None]  # no equal files
    found = find_near_copies(samples, rows, digests, shown=len(rows))
    pairs = found["near_copies"]["first"] if found else []
    return {copy: original for original, copy in pairs}


def of_a_round(contents: Sequence[bytes], side: int, turn: int) -> Row:
    rng, count = np.random.default_rng(turn), len(contents)
    start = time.process_time()
    images = decoded(contents, side)
    middle = time.process_time()
    rows = np.array([sketch(image) for image in images], np.float16)
    near_copies(rows, rng.random(count) < 0.1)
    end = time.process_time()
    told = near_copies(rows, rng.permutation(count) < count // 2)
    copies = decoded([copy_of(content, rng) for content in contents], side)
    both = np.concatenate([rows, np.array([sketch(image) for image in copies], np.float16)])
    originals = near_copies(both, np.arange(2 * count) >= count)
    found = sum(originals.get(str(count + number)) == str(number) for number in range(count))
    return {
        "told": len(told) / (count // 2),
        "found": found / count,
        "cost": (end - middle) / (middle - start),
    }


def crops(images: np.ndarray, count: int) -> np.ndarray:
    """[count, frequencies] sketches of random crops."""
    rng, side = np.random.default_rng(0), images.shape[-1] * 3 // 4
    rows = []
    for _ in range(count):
        top, left = rng.integers(0, images.shape[-1] - side + 1, 2)
        image = images[rng.integers(len(images)), :, top : top + side, left : left + side]
        rows.append(sketch(image[:, :: rng.choice((-1, 1)), :: rng.choice((-1, 1))]))
    return np.array(rows, np.float16)


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield from measured(arguments)
    finally:
        os.sched_setaffinity(0, cores)


def measured(arguments: argparse.Namespace) -> Iterator[Row]:
    contents = read_contents(arguments.images_of, arguments.images)
    turns = [of_a_round(contents, arguments.side, turn) for turn in range(arguments.rounds)]
    means = {name: float(np.mean([turn[name] for turn in turns])) for name in turns[0]}
    yield {"images": f"{len(contents):,} of {arguments.images_of.name}", **means}
    counts = [count for count in arguments.counts if count]
    if counts:
        rows = crops(np.stack(decoded(contents, arguments.side)), max(counts) + HELD_OUT)
    for count in counts:
        is_test = np.arange(count + HELD_OUT) < HELD_OUT
        start = time.process_time()
        near_copies(rows[: count + HELD_OUT], is_test)
        taken = time.process_time() - start
        yield {
            "training images": f"{count:,}",
            "us for each held-out image": 1e6 * taken / HELD_OUT,
        }


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        "images_of",
        side=(32, "of the prepared images, in pixels"),
        images=(4000, "images, at most"),
        rounds=(3, "halvings, and copies of all images"),
        counts=([0], "training images of a search"),
    )


if __name__ == "__main__":
    run_command(main)
