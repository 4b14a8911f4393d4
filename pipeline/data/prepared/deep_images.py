"""Scale images of more than 8 bits a channel to 8 bits.

Pillow reads deep grey images whole, but keeps only the high byte of 16-bit colours.
"""

import sys
from collections.abc import Callable

import numpy as np
from PIL import Image

#: Deep images that use no more bits become near black: white would be 16 of 255 or less.
FEW_BITS = 12

_RAW_MODE = "raw_mode"  # key in the `info` of an image of low bytes
_TWO_BYTES = (";16B", ";16L", ";16N")  # ends of Pillow's raw modes, of which it keeps the high byte
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


class BitDepthError(ValueError):
    """An image has larger values than `dataset.bit_depth` says: the parameter is wrong."""


def raw_modes_of(image: Image.Image) -> set[str]:
    """Name how the file stores its pixels, in Pillow's words: `RGB;16B` is 16 bits, the high byte
    first."""
    arguments = [tile.args for tile in getattr(image, "tile", ())]
    return {args if isinstance(args, str) else str(args[0]) for args in arguments if args}


def open_whole_colours(image: Image.Image) -> Image.Image:
    """Let Pillow read a binary PPM of 16-bit colours as other formats' 16 bits; it would scale it
    to 8."""
    for tile in image.tile if image.format == "PPM" and image.mode == "RGB" else ():
        if tile.args[-1] == 65_535:
            if tile.codec_name == "ppm_plain":
                raise ValueError("it is a PPM of 16 bits as text; expected a binary one (P6)")
            image.tile = [tile._replace(codec_name="raw", args=("RGB;16B", 0, 1))]
    return image


def is_scaled_grey(image: Image.Image) -> bool:
    """Whether Pillow scales a grey PPM to 16 bits, from the largest value that its file states."""
    return image.format == "PPM" and any(
        tile.codec_name.startswith("ppm") and tile.args[-1] != 65_535 for tile in image.tile
    )


def open_low_bytes(image: Image.Image, reopen: Callable[[], Image.Image]) -> Image.Image | None:
    """Open an image of 16-bit colours, of which Pillow decodes the high bytes, for its low bytes.

    Its pixels are read in the other byte order. None for other images, and for premultiplied ones.

    Args:
        image: opened, and not decoded.
        reopen: opens its file again.
    """
    raw_modes = raw_modes_of(image)
    (raw_mode,) = raw_modes if len(raw_modes) == 1 else [""]
    is_colour = image.mode in ("RGB", "RGBA", "CMYK") and not raw_mode.startswith("RGBa")
    if not (is_colour and raw_mode.endswith(_TWO_BYTES)):
        return None
    # Grey and alpha of 2 bytes each are read as four channels of one byte.
    other = "RGBA" if raw_mode == "LA;16B" else raw_mode[:-1] + _OTHER_ORDER[raw_mode[-1]]
    low = reopen()
    low.tile = [
        tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))
        for tile in low.tile
    ]
    low.info[_RAW_MODE] = raw_mode
    return low


def scale_grey(
    image: Image.Image, bit_depth: int | None, *, white_is_zero: bool
) -> tuple[Image.Image, int]:
    """Scale a grey image of whole numbers to 8 bits; with its largest value.

    Raises:
        ValueError: negative values, or values of more than 16 bits.
        BitDepthError: a value needs more bits than `bit_depth` (None: 16).
    """
    values = np.asarray(image)
    if values.min() < 0:
        raise ValueError("it has negative pixels")
    largest = int(values.max())
    if largest > 65_535:
        raise ValueError("it has more than 16 bits a channel")
    table = _table(bit_depth or 16, largest)
    pixels = (table[::-1] if white_is_zero else table)[values]
    transparent = image.info.get("transparency")
    if transparent is not None:
        pixels = np.dstack([pixels, np.where(values == transparent, 0, 255).astype(np.uint8)])
    return Image.fromarray(pixels), largest


def scale_colours(
    image: Image.Image, low_bytes: Image.Image, bit_depth: int | None
) -> tuple[Image.Image, int]:
    """Scale an image of 16-bit colours to 8 bits; with the largest value of its colours.

    Of 16 bits it keeps the high byte, as Pillow does. Alpha always has 16 bits.
    """
    high = np.asarray(image)  # [H, W, C]
    colours = 3 if image.mode == "RGBA" else high.shape[2]
    largest = int(high[..., :colours].max()) << 8
    transparent = image.info.get("transparency")
    if largest >= 2**15 and (bit_depth or 16) == 16 and transparent is None:
        return image, largest
    low = np.asarray(low_bytes)
    if low_bytes.info[_RAW_MODE] == "LA;16B":
        low = low[..., [1, 1, 1, 3]]
    values = (high.astype(np.uint16) << 8) | low
    largest = int(values[..., :colours].max())
    pixels = high.copy()
    if bit_depth not in (None, 16):
        pixels[..., :colours] = _table(bit_depth, largest)[values[..., :colours]]
    mode = image.mode
    if transparent is not None:
        is_opaque = (values != np.array(transparent, np.uint16)).any(2)
        pixels, mode = np.dstack([pixels, np.where(is_opaque, 255, 0).astype(np.uint8)]), "RGBA"
    return Image.frombytes(mode, image.size, pixels.tobytes()), largest


def _table(bits: int, largest: int) -> np.ndarray:
    """[2 ** bits] uint8: what each value becomes.

    Raises:
        BitDepthError: the largest value is not in the table.
    """
    white = 2**bits - 1
    if largest > white:
        raise BitDepthError(
            f"it has the value {largest:,}; `dataset.bit_depth: {bits}` allows {white:,}"
        )
    return np.rint(np.arange(white + 1) / (white / 255)).astype(np.uint8)
