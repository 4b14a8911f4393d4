"""Decode image files: upright, 8 bits a channel, and at a fraction of their size if that suffices.

All commands read image files here. Imports NumPy and Pillow alone.
"""

import io
import os
import struct
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.data.prepared.deep_images import (
    is_scaled_grey,
    open_low_bytes,
    open_whole_colours,
    raw_modes_of,
    scale_colours,
    scale_grey,
)
from pipeline.data.prepared.image_metadata import ANIMATED, find_orientation, strip

#: Formats that are read. Pillow knows more; for EPS it runs another program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

#: What Pillow raises for a file that is not an image, or damaged: its decoders share no class.
#: A MemoryError is not among them: it says nothing about the file.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, struct.error),
    *(LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
)

#: Most pixels of an image, 13,377 x 13,377. Pillow refuses more by the header, before it decodes,
#: and would warn from half of it.
LARGEST_IMAGE = 2 * Image.MAX_IMAGE_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

#: For a clean view: the image's shorter side after resizing over the side of the middle square.
#: ImageNet's standard: resize to 256, cut out 224.
CLEAN_RATIO = 256 / 224

#: Key in the `info` of an 8-bit image: the largest value before, of an image of more than 8 bits a
#: channel whose file does not say how many of them are used.
LARGEST = "largest"
#: Key in the `info` of an image whose file has other pages that are not reduced copies.
MORE_PAGES = "more_pages"
_FACTS = "facts"  # key in the `info` of an opened image

_MULTI_PAGE = ("MPO", "TIFF")  # cameras write the picture as the first page
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# EXIF orientations whose upright image has the end of the stored image at its left, at its top.
_MIRRORED_SIDEWAYS = (2, 3, 6, 7)
_MIRRORED_UPSIDE_DOWN = (3, 4, 7, 8)


def available_cores() -> int:
    """The cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has none
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


class _Facts(NamedTuple):
    """What is known of an opened image beside its pixels."""

    orientation: int  # EXIF's, 1 to 8
    white_is_zero: bool = False  # whether its values are still to be inverted
    is_signed: bool = False  # whether bytes above 127 are negative
    more_pages: bool = False
    bits: int | None = None  # a channel, where its file says that fewer than 16 are used
    low_bytes: Image.Image | None = None  # of 16-bit colours; Pillow's image has the high bytes


#: Pillow scales PNG's grey of 2 and 4 bits to 8, but not the value that is transparent.
_SCALED_GREYS = {"L;2": 85, "L;4": 17}


def read_image(content: bytes, bit_depth: int | None = None) -> Image.Image:
    """Read the image of a file's bytes: upright, opaque, 8 bits a channel. See `eight_bits`.

    Raises:
        one of UNREADABLE: the bytes are not an image that is read.
    """
    return eight_bits(open_image(content), bit_depth)


def read_nothing_else() -> None:
    """Make Pillow refuse other formats in this process, whoever opens a file."""
    Image.init()
    Image.ID[:] = [name for name in Image.ID if name in FORMATS]


def open_image(content: bytes) -> Image.Image:
    """Open the image of a file's bytes, without its metadata, and without decoding it.

    Raises:
        one of UNREADABLE: the bytes are not an image of FORMATS, have more than LARGEST_IMAGE
            pixels, or are animated.
    """
    Image.init()
    stripped = strip(content)
    content = stripped.content
    image = _open(content)
    if image.format not in _MULTI_PAGE and getattr(image, "is_animated", False):
        raise ValueError(ANIMATED)
    raw_modes = raw_modes_of(image)
    for raw_mode, factor in _SCALED_GREYS.items():
        if raw_mode in raw_modes and isinstance(image.info.get("transparency"), int):
            image.info["transparency"] *= factor
    image.info[_FACTS] = _Facts(
        orientation=stripped.orientation or _orientation_in(image.info),
        white_is_zero=stripped.white_is_zero,
        bits=12 if "I;12" in raw_modes else 16 if is_scaled_grey(image) else None,
        is_signed=stripped.is_signed,
        more_pages=stripped.more_pages,
        low_bytes=open_low_bytes(image, lambda: _open(content)),
    )
    return image


def _open(content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=[f for f in FORMATS if f in Image.OPEN])
        return open_whole_colours(image)
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than the {LARGEST_IMAGE:,} pixels that are read") from None
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(FORMATS)}, or is damaged") from None


def _orientation_in(info: Mapping[Any, Any]) -> int:
    """The orientation that Pillow's `info` of an image has, 1 to 8."""
    exif, xmp = info.get("exif"), info.get("xmp")
    return find_orientation(
        [exif] if isinstance(exif, bytes) else [], xmp if isinstance(xmp, bytes) else None
    )


def eight_bits(image: Image.Image, bit_depth: int | None = None) -> Image.Image:
    """Make the image upright, opaque (on white) and 8 bits a channel, in its own colour mode.

    Args:
        image: of `open_image`, or made by other code.
        bit_depth: how many bits of a deeper image are used, if its file does not say so: white is
            2 ** bit_depth - 1. None: 16.

    Returns:
        The image. `info[LARGEST]` is there if the image was deeper, and its file does not say how
        many bits are used; `info[MORE_PAGES]` if its file has other pages.

    Raises:
        ValueError: floating-point or negative pixels, or more than 16 bits a channel: their range
            is unknown.
        BitDepthError: a value needs more bits than `bit_depth`.
    """
    image.load()
    facts = image.info.get(_FACTS)
    if not isinstance(facts, _Facts):
        facts = _Facts(_orientation_in(image.info))
    largest = None
    if image.mode == "F":
        raise ValueError("it has floating-point pixels")
    if facts.is_signed and np.asarray(image).max() > 127:
        raise ValueError("it has negative pixels")
    if image.mode.startswith("I"):  # Pillow's `I` is 16 bits in most files
        bits = facts.bits or bit_depth
        image, largest = scale_grey(image, bits, white_is_zero=facts.white_is_zero)
        largest = None if facts.bits else largest
    elif facts.low_bytes is not None:
        image, largest = scale_colours(image, facts.low_bytes, bit_depth)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if facts.orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[facts.orientation])
    if largest is not None:
        image.info[LARGEST] = largest
    if facts.more_pages:
        image.info[MORE_PAGES] = True
    return image


def clean_boxes(sizes: np.ndarray, side: int, ratio: float = CLEAN_RATIO) -> np.ndarray:
    """Choose the box of each image that its clean view, the view of evaluation, shows.

    It is the middle square of `side` pixels after the shorter side is resized to
    round(`side` * `ratio`).

    Args:
        sizes: [B, 2] height and width of the upright images.
        side: of the view, in pixels.

    Returns:
        [B, 4] float64: top, left, height, width in the upright image's pixels, not rounded.
    """
    square = sizes.min(1) * (side / round(side * ratio))
    top, left = ((sizes[:, axis] - square) / 2 for axis in (0, 1))
    return np.stack([top, left, square, square], 1)


def decode_view(
    content: bytes,
    size: Sequence[int],
    box: Sequence[float],
    side: int,
    channels: int,
    *,
    bicubic: bool = False,
) -> np.ndarray:
    """Decode a box of an image and resize it to a square: bilinear or bicubic, antialiased if it
    shrinks.

    JPEG is decoded at 1/8, 1/4 or 1/2 of its size if the box keeps at least `side` pixels each way:
    several times as fast, with small changes of the view's pixels.

    Args:
        content: a file's bytes.
        size: height and width of the upright image.
        box: top, left, height, width in the upright image's pixels, within it.
        side: of the view, in pixels.
        channels: 3 for RGB, 1 for greyscale.

    Returns:
        [channels, side, side] uint8.

    Raises:
        one of UNREADABLE: the bytes are not an image, or are one of another size.
    """
    image = open_image(content)
    orientation = image.info[_FACTS].orientation
    top, left, height, width = box
    whole_width, whole_height = image.size
    limit = int(min(height, width)) // side
    divisor = next((divisor for divisor in (8, 4, 2) if divisor <= limit), 1)
    reduced = image.draft(None, (whole_width // divisor, whole_height // divisor))
    reduction = round(whole_width / reduced[1][2]) if reduced else 1  # None: not a JPEG
    image = eight_bits(image)
    mode = "RGB" if channels == 3 else "L"
    if image.mode != mode:
        image = image.convert(mode)
    # The last pixel of a reduced image is partly outside; in a mirrored image it is the first.
    if orientation in _MIRRORED_SIDEWAYS:
        left += image.width * reduction - size[1]
    if orientation in _MIRRORED_UPSIDE_DOWN:
        top += image.height * reduction - size[0]
    corners = (left, top, left + width, top + height)
    box = [corner / reduction for corner in corners]
    resampling = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    view = image.resize((side, side), resampling, box)
    return np.atleast_3d(view).transpose(2, 0, 1)
