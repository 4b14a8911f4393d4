"""Encoded images: upright and with 8 bits a channel, and views cut out of them at little cost.

Contract code: an edit here runs the teacher again. Imports NumPy and Pillow alone.
"""

import io
import os
import struct
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

#: Formats that are read. Pillow knows more: EPS among them, for which it runs another program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

#: What Pillow raises for a file that is no image, or a damaged one: its decoders share no class.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, struct.error),
    *(LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError),
)

#: Pixels of an image that is decoded, which Pillow refuses by what the header says: a photograph of
#: 13,377 x 13,377. Beyond half of it Pillow would warn.
LARGEST_IMAGE = 2 * Image.MAX_IMAGE_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

#: Of a clean view: the image's shorter side, resized, over the side of the middle square that is
#: cut out. ImageNet's standard: resize to 256, cut out 224.
CLEAN_RATIO = 256 / 224

_OF_SEVERAL_PAGES = ("MPO", "TIFF")  # of which the first is the picture, as cameras write them
_REDUCTIONS = (8, 4, 2)  # in which JPEG can be decoded
_MIRRORED_SIDEWAYS = (2, 3, 6, 7)  # EXIF orientations whose upright image has the stored image's
_MIRRORED_UPSIDE_DOWN = (3, 4, 7, 8)  # end at its left; at its top


def available_cores() -> int:
    """The cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has none
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def open_image(content: bytes) -> Image.Image:
    """The image of a file's bytes, not yet decoded.

    Raises:
        one of UNREADABLE: the bytes are no image of FORMATS, one of more pixels than LARGEST_IMAGE,
            or several images one after another.
    """
    Image.init()
    try:
        image = Image.open(io.BytesIO(content), formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than the {LARGEST_IMAGE:,} pixels that are read") from None
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(FORMATS)}, or is damaged") from None
    if image.format not in _OF_SEVERAL_PAGES and getattr(image, "is_animated", False):
        raise ValueError("it is animated; expected one image")
    return image


def eight_bits(image: Image.Image) -> Image.Image:
    """The image upright, opaque (on white) and with 8 bits a channel, its colours as they are.

    Raises:
        ValueError: more than 16 bits a channel: their range is not known.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits in most files, whatever Pillow calls it
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65_535:
            raise ValueError("it has more than 16 bits a channel")
        image = Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("it has floating-point pixels")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image


def clean_boxes(sizes: np.ndarray, side: int) -> np.ndarray:
    """Which part of each image its clean view shows, the view of evaluation: the middle square
    that is cut out after the shorter side was resized to `side` * CLEAN_RATIO, rounded.

    Args:
        sizes: [B, 2] height and width of the upright images.
        side: of the view, in pixels.

    Returns:
        [B, 4] float64: top, left, height, width in the image's pixels, not rounded.
    """
    square = sizes.min(1) * (side / round(side * CLEAN_RATIO))
    top, left = ((sizes[:, axis] - square) / 2 for axis in (0, 1))
    return np.stack([top, left, square, square], 1)


def decode_view(
    content: bytes, size: Sequence[int], box: Sequence[float], side: int, channels: int
) -> np.ndarray:
    """A box of an encoded image, resized to a square: bilinear, antialiased where it shrinks.

    JPEG is decoded at 1/8, 1/4 or 1/2 of its size where the box keeps at least `side` pixels each
    way, which is several times as fast and moves the view's pixels by little.

    Args:
        content: a file's bytes.
        size: height and width of the upright image.
        box: top, left, height, width in the upright image's pixels, within it.
        side: of the view, in pixels.
        channels: 3 for RGB, 1 for greyscale.

    Returns:
        [channels, side, side] uint8.

    Raises:
        one of UNREADABLE: the bytes are no image, or one of another size.
    """
    image = open_image(content)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    top, left, height, width = box
    reduction = _reduce(image, int(min(height, width)) // side)
    image = eight_bits(image)
    mode = "RGB" if channels == 3 else "L"
    if image.mode != mode:
        image = image.convert(mode)
    # A reduced image ends with a pixel that is partly outside; a mirrored one begins with it.
    if orientation in _MIRRORED_SIDEWAYS:
        left += image.width * reduction - size[1]
    if orientation in _MIRRORED_UPSIDE_DOWN:
        top += image.height * reduction - size[0]
    corners = (left, top, left + width, top + height)
    view = image.resize(
        (side, side), Image.Resampling.BILINEAR, box=[corner / reduction for corner in corners]
    )
    pixels = np.asarray(view)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def _reduce(image: Image.Image, limit: int) -> int:
    """Have an image that is not yet decoded decoded at a part of its size, where its format can.

    Returns:
        The reduction, at most `limit` (or 1).
    """
    for reduction in _REDUCTIONS:
        if reduction <= limit:
            width, height = image.size
            reduced = image.draft(None, (width // reduction, height // reduction))
            return 1 if reduced is None else round(width / reduced[1][2])
    return 1
