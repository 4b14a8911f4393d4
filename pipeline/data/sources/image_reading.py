"""Images on their way into the prepared dataset: read by threads, few at a time.

Contract code: an edit here runs the teacher again.
"""

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

DIGEST_BYTES = 16  # of a SHA-256: no two contents of any dataset share them
LISTED = 20  # names in a message

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class DecodedImage:
    """One image, read."""

    number: int  # of the sample
    digest: bytes  # of the content by which duplicates are found
    pixels: np.ndarray  # [channels, image_size, image_size] uint8: kept, or for statistics
    encoded: EncodedImage | None  # storage: encoded: what is kept of it


def picture_of(
    number: int, image: Image.Image, content: bytes | None, params: DatasetParams
) -> DecodedImage:
    """Args:
    image: upright and with 8 bits a channel.
    content: the bytes of its file; None where it has none, and its pixels are its content.
    """
    if content is None:
        known_by = f"{image.mode} {image.size} ".encode() + image.tobytes()
    else:
        known_by = content
    digest = hashlib.sha256(known_by).digest()[:DIGEST_BYTES]
    pixels = to_pixels(image, params.image_size, params.channels)
    return DecodedImage(number, digest, pixels, encode(image, content or b"", params))


def to_pixels(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """[channels, size, size] uint8: the shorter side resized to `size`, the middle cut out."""
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def decode_all(
    read: Callable[[Item], DecodedImage],
    items: Iterable[Item],
    name_of: Callable[[Item], str],
    where: str,
) -> Iterator[DecodedImage]:
    """The picture of each item, read by threads.

    Args:
        read: raises one of UNREADABLE for what is no image.
        name_of: an item's name, for messages.

    Raises:
        UserError: after the last: lists the items that cannot be read.
    """

    def attempt(item: Item) -> DecodedImage | str:
        try:
            return read(item)
        except UNREADABLE as error:
            return f"{name_of(item)}: {error}"

    broken, count = [], 0
    for picture in map_in_threads(attempt, items):
        if isinstance(picture, DecodedImage):
            yield picture
            continue
        count += 1
        if count <= LISTED:
            broken.append(picture)
    if count:
        more = f"\n  ... and {count - LISTED} more" if count > LISTED else ""
        raise UserError(
            f"{count} files of `{where}` (`dataset.root`) are not images that can be "
            "read; mend or remove them:\n  " + "\n  ".join(broken) + more
        )


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The function of each item, in their order, by as many threads as there are cores: Pillow
    lets go of Python's lock. Few are made before they are asked for, so that memory stays flat."""
    Image.init()  # threads that do so at the same time take a format for unknown
    threads, waiting = available_cores(), deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
