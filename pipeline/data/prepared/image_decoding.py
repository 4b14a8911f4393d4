"""Decode image files: upright, 8 bits a channel, and at a fraction of their size if that suffices.

Imports NumPy and Pillow alone.
"""

import io
import os
import struct
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

#: Formats that are read. Pillow knows more; for EPS it runs another program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

#: What Pillow raises for a file that is not an image, or damaged: its decoders share no class.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, struct.error),
    *(LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError),
)

#: Most pixels of an image, 13,377 x 13,377. Pillow refuses more by the header, before it decodes,
#: and would warn from half of it.
LARGEST_IMAGE = 2 * Image.MAX_IMAGE_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

#: For a clean view: the image's shorter side after resizing over the side of the middle square.
#: ImageNet's standard: resize to 256, cut out 224.
CLEAN_RATIO = 256 / 224

_MULTI_PAGE = ("MPO", "TIFF")  # cameras write the picture as the first page
# EXIF orientations whose upright image has the end of the stored image at its left, at its top.
_MIRRORED_SIDEWAYS = (2, 3, 6, 7)
_MIRRORED_UPSIDE_DOWN = (3, 4, 7, 8)


def available_cores() -> int:
    """The cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has none
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def open_image(content: bytes) -> Image.Image:
    """Open the image of a file's bytes, without decoding it.

    Raises:
        one of UNREADABLE: the bytes are not an image of FORMATS, have more than LARGEST_IMAGE
            pixels, or are animated.
    """
    Image.init()
    try:
        image = Image.open(io.BytesIO(content), formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than the {LARGEST_IMAGE:,} pixels that are read") from None
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(FORMATS)}, or is damaged") from None
    if image.format not in _MULTI_PAGE and getattr(image, "is_animated", False):
        raise ValueError("it is animated; expected one image")
    return image


def eight_bits(image: Image.Image) -> Image.Image:
    """Make the image upright, opaque (on white) and 8 bits a channel, in its own colour mode.

    Raises:
        ValueError: floating-point pixels, or more than 16 bits a channel: their range is unknown.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's `I` is 16 bits in most files
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
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
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
