"""Read the images of a source by threads, a few at a time, and make them ready to be packed."""

import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.prepared.deep_images import BitDepthError
from pipeline.data.prepared.image_decoding import (
    LARGEST,
    MORE_PAGES,
    UNREADABLE,
    available_cores,
)
from pipeline.data.sources.params import DatasetParams
from pipeline.runtime.errors import UserError, counted

DIGEST_BYTES = 16  # of a SHA-256: enough to tell any two contents of a dataset apart
LISTED = 20  # names in a message, at most
_LONGEST_SIDE = 65_500  # pixels, of a JPEG

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class EncodedImage:
    content: bytes
    height: int  # pixels, upright
    width: int


@dataclass(frozen=True)
class DecodedImage:
    """One image of a source, ready to be packed."""

    number: int  # of the sample
    digest: bytes  # of the content: equal for duplicates
    pixels: np.ndarray  # [channels, image_size, image_size] uint8: stored, or for statistics
    encoded: EncodedImage | None  # stored with `storage: encoded`
    side: int  # pixels: the shorter one of the image in the source
    largest: int | None = None  # value of an image deeper than 8 bits: see LARGEST
    more_pages: bool = False  # in its file, which are not read


@dataclass(frozen=True)
class UnreadableImage:
    """A file of a source that is left out."""

    number: int  # of the sample
    problem: str


def decode_all(
    items: Iterable[tuple[int, Item]],
    open_item: Callable[[int, Item], tuple[Image.Image, bytes | None]],
    ids: Sequence[str],
    params: DatasetParams,
) -> Iterator[DecodedImage | UnreadableImage]:
    """Yield the image of each item, in order, read by threads.

    With `unreadable: skip`, an item that is not an image is yielded as unreadable. One that does
    not fit `bit_depth` is not: the parameter is wrong.

    Args:
        items: a sample's number, and what `open_item` opens.
        open_item: returns the image, upright and 8 bits a channel, and the bytes of its file; None
            if it has no file: duplicates then have equal pixels. Raises one of UNREADABLE if the
            item is not an image.
        ids: of all samples.

    Raises:
        UserError: after the last item: lists those that cannot be read.
        MemoryError: there is too little for an image, which it names.
    """

    def read(item: tuple[int, Item]) -> DecodedImage | UnreadableImage | tuple[str, bool]:
        number = item[0]
        try:
            image, content = open_item(*item)
            hashed = content
            if hashed is None:
                hashed = f"{image.mode} {image.size} ".encode() + image.tobytes()
            digest = hashlib.sha256(hashed).digest()[:DIGEST_BYTES]
            pixels = to_pixels(image, params.image_size, params.channels)
            encoded = encode(image, content or b"", params, params.channels)
            facts = image.info.get(LARGEST), MORE_PAGES in image.info
            return DecodedImage(number, digest, pixels, encoded, min(image.size), *facts)
        except MemoryError:
            raise MemoryError(f"for `{ids[number]}`") from None
        except UNREADABLE as error:
            may_skip = not isinstance(error, BitDepthError)
            if params.unreadable == "skip" and may_skip:
                return UnreadableImage(number, str(error))
            return f"{ids[number]}: {error}", may_skip

    broken: list[tuple[str, bool]] = []
    for result in map_in_threads(read, items):
        if isinstance(result, tuple):
            broken.append(result)
        else:
            yield result
    if broken:
        lines, skippable = zip(*broken, strict=True)
        advice = []
        if any(skippable):
            advice.append("fix or remove (`dataset.unreadable: skip` leaves such files out)")
        if not all(skippable):
            advice.append("correct `dataset.bit_depth`")
        raise UserError(
            f"{counted(len(broken), 'file')} of `{params.root}` (`dataset.root`) cannot be read as "
            f"images; {' and '.join(advice)}:\n  " + "\n  ".join(lines[:LISTED])
        )


def to_pixels(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """[channels, size, size] uint8: resize the shorter side to `size`, cut out the middle."""
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.atleast_3d(image).transpose(2, 0, 1)


class Storing(Protocol):
    """How an image is stored, by keys of `dataset`."""

    storage: str
    image_size: int
    quality: int | str | None
    bit_depth: int | None


def encode(
    image: Image.Image, source: bytes, storing: Storing, channels: int
) -> EncodedImage | None:
    """Encode an image for `storage: encoded`; None for `pixels`.

    With a quality, a shorter side above `image_size` is reduced to it (bicubic, antialiased, aspect
    ratio kept), and the image becomes a JPEG (baseline, chroma at half the resolution each way, no
    metadata).

    Args:
        image: upright, 8 bits a channel.
        source: the bytes of its file, which `quality: original` keeps; an image that `bit_depth`
            scales becomes a PNG of 8 bits.

    Raises:
        ValueError: a side is longer than JPEG allows.
    """
    if storing.storage == "pixels":
        return None
    if storing.quality == "original":
        if storing.bit_depth not in (None, 16) and LARGEST in image.info:
            source = _as_png(image)  # whoever decodes the source later does not know the depth
        return EncodedImage(source, image.height, image.width)
    image = image.convert("RGB" if channels == 3 else "L")
    ratio = storing.image_size / min(image.size)
    if ratio < 1:
        size = [max(storing.image_size, round(side * ratio)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    if max(image.size) > _LONGEST_SIDE:
        raise ValueError(f"it is {max(image.size):,} pixels long; JPEG takes {_LONGEST_SIDE:,}")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=storing.quality, subsampling="4:2:0", comment=b"")
    return EncodedImage(file.getvalue(), image.height, image.width)


def _as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    (image.convert("RGB") if image.mode == "CMYK" else image).save(file, "PNG")
    return file.getvalue()


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
