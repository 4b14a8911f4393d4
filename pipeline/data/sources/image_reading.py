"""Read the images of a source by threads, a few at a time."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.prepared.image_decoding import UNREADABLE, available_cores
from pipeline.data.sources.image_encoding import EncodedImage, encode
from pipeline.data.sources.params import DatasetParams
from pipeline.runtime.errors import UserError

DIGEST_BYTES = 16  # of a SHA-256: enough to tell any two contents of a dataset apart
LISTED = 20  # names in a message, at most

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class DecodedImage:
    """One image of a source, ready to be packed."""

    number: int  # of the sample
    digest: bytes  # of the content: equal for duplicates
    pixels: np.ndarray  # [channels, image_size, image_size] uint8: stored, or for statistics
    encoded: EncodedImage | None  # stored with `storage: encoded`


def prepare_image(
    number: int, image: Image.Image, content: bytes | None, params: DatasetParams
) -> DecodedImage:
    """Make an image ready to be packed.

    Args:
        image: upright, 8 bits a channel.
        content: the bytes of its file; None if it has no file: duplicates then have equal pixels.
    """
    hashed = content
    if hashed is None:
        hashed = f"{image.mode} {image.size} ".encode() + image.tobytes()
    digest = hashlib.sha256(hashed).digest()[:DIGEST_BYTES]
    pixels = to_pixels(image, params.image_size, params.channels)
    return DecodedImage(number, digest, pixels, encode(image, content or b"", params))


def to_pixels(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """[channels, size, size] uint8: resize the shorter side to `size`, cut out the middle."""
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def decode_all(
    read: Callable[[Item], DecodedImage],
    items: Iterable[Item],
    name_of: Callable[[Item], str],
    root: str,
) -> Iterator[DecodedImage]:
    """Yield the image of each item, in order, read by threads.

    Args:
        read: raises one of UNREADABLE if an item is not an image.
        name_of: an item's name, for messages.
        root: `dataset.root`, for messages.

    Raises:
        UserError: after the last item: lists the items that cannot be read.
    """

    def attempt(item: Item) -> DecodedImage | str:
        try:
            return read(item)
        except UNREADABLE as error:
            return f"{name_of(item)}: {error}"

    broken, count = [], 0
    for result in map_in_threads(attempt, items):
        if isinstance(result, DecodedImage):
            yield result
            continue
        count += 1
        if count <= LISTED:
            broken.append(result)
    if count:
        more = f"\n  ... and {count - LISTED} more" if count > LISTED else ""
        raise UserError(
            f"{count} files of `{root}` (`dataset.root`) are not images that can be "
            "read; fix or remove them:\n  " + "\n  ".join(broken) + more
        )


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the function's result for each item, in order, from one thread per core.

    Pillow releases the GIL. Threads work only a little ahead, so memory stays flat.
    """
    Image.init()  # not in the threads: while one initialises, another sees formats as unknown
    threads, waiting = available_cores(), deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
