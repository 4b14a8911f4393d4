"""Classify image files with an exported student.

    python -m pipeline.commands.predict MODEL.onnx FILE_OR_FOLDER... [--top K] [--json]

Each file is read as the images were that the student was tested on. Prints a line for each, with
the classes that are most likely and their probabilities; at the end names the files that are no
images, and then fails. Imports no torch.
"""

from pipeline.runtime.command import run_command

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.data.prepared.image_decoding import (
    UNREADABLE,
    available_cores,
    clean_boxes,
    decode_view,
    eight_bits,
)
from pipeline.data.sources.archives import names_in
from pipeline.data.sources.image_encoding import encode
from pipeline.data.sources.image_reading import map_in_threads, to_pixels
from pipeline.data.sources.params import DatasetParams
from pipeline.export.onnx_model import OnnxMetadata, OnnxStudent
from pipeline.runtime.errors import UserError

BATCH_SIZE = 64  # images
Classes = list[tuple[str, float]]  # names and probabilities


def square(content: bytes, card: OnnxMetadata) -> np.ndarray:
    """An image as the student was tested on such: [C, S, S] uint8, of the card's size.

    Args:
        content: of the image's file.

    Raises:
        one of UNREADABLE: it is no image.
    """
    # All that the functions below look at; the rest of the section is about a whole dataset.
    params = DatasetParams.model_construct(channels=card.channels, **card.reading)
    image = eight_bits(Image.open(io.BytesIO(content)))
    kept = encode(image, content, params)
    if kept is not None:
        size = np.array([kept.height, kept.width])
        (box,) = clean_boxes(size[None], card.image_size)
        return decode_view(kept.content, size, box, card.image_size, card.channels)
    pixels = to_pixels(image, params.image_size, card.channels)
    if params.image_size == card.image_size:
        return pixels
    planes = [to_pixels(Image.fromarray(plane), card.image_size, 1) for plane in pixels]
    return np.concatenate(planes)


def files_of(places: Sequence[str]) -> list[Path]:
    """The files, and those in the folders at any depth, without hidden ones.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """
    files = []
    for place in map(Path, places):
        if place.is_dir():
            files += [place / name for name in names_in(place) if not name.endswith("/")]
        else:
            files.append(place)
    if not files:
        raise UserError(f"there is no file in {', '.join(places)}; expected images.")
    return files


def classified(
    model: OnnxStudent, files: Sequence[Path], unreadable: list[str]
) -> Iterator[tuple[Path, np.ndarray]]:
    """Each file that is an image, in order, with its probabilities, [num_classes] float64.

    Args:
        unreadable: gets a line for each of the others.
    """

    def read(path: Path) -> tuple[Path, np.ndarray | str]:
        try:
            return path, square(path.read_bytes(), model.card)
        except UnidentifiedImageError:  # whose text has an address in memory
            return path, "not an image of a kind that is known"
        except UNREADABLE as error:
            return path, getattr(error, "strerror", None) or str(error)

    done = map_in_threads(read, files)
    while part := list(islice(done, BATCH_SIZE)):
        unreadable += [f"{path}: {result}" for path, result in part if isinstance(result, str)]
        images = [(path, pixels) for path, pixels in part if isinstance(pixels, np.ndarray)]
        if images:
            logits = model.logits(np.stack([pixels for _, pixels in images]))
            yield from zip([path for path, _ in images], softmax(logits), strict=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    """[B, num_classes], in float64."""
    scaled = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return scaled / scaled.sum(1, keepdims=True)


def most_likely(probabilities: np.ndarray, class_names: Sequence[str], top: int) -> Classes:
    """The classes of the `top` largest, of equals the first, from the largest down."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [(class_names[label], float(probabilities[label])) for label in order]


def as_line(path: Path, classes: Classes, file_width: int, class_width: int) -> str:
    shown = "  ".join(f"{name:{class_width}} {share:7.2%}" for name, share in classes)
    return f"{path!s:{file_width}}  {shown}"


def as_json(path: Path, classes: Classes) -> str:
    found = [{"class": name, "probability": share} for name, share in classes]
    return json.dumps({"file": str(path), "classes": found}, ensure_ascii=False)


def count_of_classes(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        raise UserError(
            f"`--top` is `{text}`; expected how many classes to name for each file, 1 to {most}."
        )
    return int(text)


def opened(path: str) -> OnnxStudent:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"`{path}` cannot be read ({error.strerror}); expected a student that `dvc repro "
            "export@NAME` wrote, such as `models/exported/NAME.onnx`."
        ) from None
    return OnnxStudent(content, path, available_cores())


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.commands.predict", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL.onnx", help="an exported student")
    parser.add_argument("places", metavar="FILE_OR_FOLDER", nargs="+", help="images")
    parser.add_argument("--top", metavar="K", default="1", help="classes to name for each file")
    parser.add_argument("--json", action="store_true", help="print each line as a JSON object")
    arguments = parser.parse_args()
    model = opened(arguments.model)
    names = model.card.class_names
    top = count_of_classes(arguments.top, len(names))
    files = files_of(arguments.places)
    widths = max(len(str(path)) for path in files), max(map(len, names))
    unreadable: list[str] = []
    for path, probabilities in classified(model, files, unreadable):
        classes = most_likely(probabilities, names, top)
        print(as_json(path, classes) if arguments.json else as_line(path, classes, *widths))
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {len(files)} files are not images that can be read:\n  "
            + "\n  ".join(unreadable)
        )


if __name__ == "__main__":
    run_command(main)
