"""Classify image files with an exported student.

    python -m pipeline.commands.predict MODEL.onnx FILE_OR_FOLDER... [--top K] [--json]

Reads each file as the student's test images were read, and prints a line for it: the most likely
classes and their probabilities. If the model card is beside the model, prints the model's accuracy
on test first. Lists the files that are not images at the end, and fails if there are any. Imports
no torch.
"""

from pipeline.runtime.command import run_command

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.prepared.deep_images import FEW_BITS
from pipeline.data.prepared.image_decoding import (
    LARGEST,
    UNREADABLE,
    clean_boxes,
    decode_view,
    read_image,
)
from pipeline.data.sources.image_reading import encode, map_in_threads, to_pixels
from pipeline.data.sources.listing import describe_left_out, list_images
from pipeline.export.model_card import ModelCard, check_card, read_card
from pipeline.export.running.onnx_model import (
    ExportedNetwork,
    OnnxMetadata,
    inference_threads,
    open_file,
)
from pipeline.runtime.errors import UserError, counted, positive_int

BATCH_SIZE = 64  # images


def student_input(
    content: bytes, metadata: OnnxMetadata, warn: Callable[[str], None] = print
) -> np.ndarray:
    """Turn an image file's content into the student's input, [C, S, S] uint8, S of the metadata.

    Args:
        warn: called with what is odd about the image.

    Raises one of UNREADABLE if the content is not an image.
    """
    reading, side, channels = metadata.reading, metadata.image_size, metadata.channels
    image = read_image(content, reading.bit_depth)
    if reading.bit_depth is None and image.info.get(LARGEST, 2**FEW_BITS) < 2**FEW_BITS:
        warn(
            f"it has more than 8 bits a channel, and its largest value is "
            f"{image.info[LARGEST]:,}: read near black, with white at 65,535. The student's "
            "dataset did not set `bit_depth`"
        )
    encoded = encode(image, content, reading, channels)
    if encoded is not None:
        size = np.array([encoded.height, encoded.width])
        (box,) = clean_boxes(size[None], side, reading.resize_ratio)
        bicubic = reading.interpolation == "bicubic"
        return decode_view(encoded.content, size, box, side, channels, bicubic=bicubic)
    pixels = to_pixels(image, reading.image_size, channels)
    if reading.image_size == side:
        return pixels
    return np.concatenate([to_pixels(Image.fromarray(plane), side, 1) for plane in pixels])


def list_files(paths: Sequence[str]) -> list[Path]:
    """List the files, and those below the folders that may be images, as `prepare` does."""
    files, left_out = [], Counter()
    for path in map(Path, paths):
        if path.is_dir():
            listing = list_images(path, key="")
            files += [path / name for name in listing.files]
            left_out.update(listing.left_out)
        else:
            files.append(path)
    if left_out:
        print(f"left out, as no images: {describe_left_out(left_out)}", file=sys.stderr)
    if not files:
        raise UserError(f"there is no image in {', '.join(paths)}; expected images.")
    return files


def classify(
    model: ExportedNetwork, files: Sequence[Path], unreadable: list[str], odd: list[str]
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield each image file, in order, with its probabilities, [num_classes] float64.

    Args:
        unreadable: receives a line for each other file.
        odd: receives a line for each image that may be misread.
    """

    def note(path: Path, oddity: str) -> None:
        odd.append(f"{path}: {oddity}")

    def read(path: Path) -> tuple[Path, np.ndarray | str]:
        try:
            warn = partial(note, path)
            return path, student_input(path.read_bytes(), model.metadata, warn)
        except UNREADABLE as error:
            return path, getattr(error, "strerror", None) or str(error)

    results = map_in_threads(read, files)
    while batch := list(islice(results, BATCH_SIZE)):
        unreadable += [f"{path}: {problem}" for path, problem in batch if isinstance(problem, str)]
        images = [(path, pixels) for path, pixels in batch if isinstance(pixels, np.ndarray)]
        if images:
            logits = model.logits(np.stack([pixels for _, pixels in images]))
            yield from zip([path for path, _ in images], softmax(logits), strict=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    """[B, num_classes] -> the same in float64."""
    scaled = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return scaled / scaled.sum(1, keepdims=True)


def open_model(path: Path) -> tuple[ExportedNetwork, ModelCard | None]:
    """Open an exported file, and the model card beside it if there is one.

    Raises:
        UserError: the file was not written by `export`, or the card describes another file.
    """
    model, card = open_file(path, inference_threads()), None
    if path.with_suffix(".json").is_file():
        card = read_card(path.with_suffix(".json"), produced_by="dvc repro export@NAME")
        check_card(card, path)
    return model, card


def print_classes(model: ExportedNetwork, files: Sequence[Path], top: int, as_json: bool) -> None:
    """Print a line for each image, with the `top` classes of largest probability in descending
    order; of equals, the first. Refuse the files that are not images at the end."""
    names = model.metadata.class_names
    file_width, class_width = max(len(str(path)) for path in files), max(map(len, names))
    unreadable: list[str] = []
    odd: list[str] = []  # in any order: threads read the files
    for path, probabilities in classify(model, files, unreadable, odd):
        order = np.argsort(-probabilities, kind="stable")[:top]
        classes = [(names[label], float(probabilities[label])) for label in order]
        if as_json:
            entries = [{"class": name, "probability": share} for name, share in classes]
            print(json.dumps({"file": str(path), "classes": entries}, ensure_ascii=False))
        else:
            columns = "  ".join(f"{name:{class_width}} {share:7.2%}" for name, share in classes)
            print(f"{path!s:{file_width}}  {columns}")
    for line in sorted(odd):
        print(f"warning: {line}", file=sys.stderr)
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {counted(len(files), 'file')} cannot be read as images:\n  "
            + "\n  ".join(unreadable)
        )


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.commands.predict", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL.onnx", help="an exported student")
    parser.add_argument("paths", metavar="FILE_OR_FOLDER", nargs="+", help="images")
    parser.add_argument("--top", metavar="K", default="1", help="classes to print for each file")
    parser.add_argument("--json", action="store_true", help="print each line as a JSON object")
    arguments = parser.parse_args()
    model, card = open_model(Path(arguments.model))
    if card is not None:
        print(card.in_words(), file=sys.stderr)
    top = positive_int(
        arguments.top,
        "`--top`",
        "how many classes to print for each file",
        most=len(model.metadata.class_names),
    )
    print_classes(model, list_files(arguments.paths), top, arguments.json)


if __name__ == "__main__":
    run_command(main)
