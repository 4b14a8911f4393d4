"""Test images for the report: clean and corrupted.

Encoded images are shown in the standard clean view; a network with its own `resize_ratio` sees
some pixels more or fewer at the edges.
"""

from dataclasses import replace

import numpy as np

from pipeline.comparison.measurement.corruptions import CORRUPTIONS, corrupt
from pipeline.data.prepared.dataset import AGAIN, AnySplit, EncodedSplit
from pipeline.data.prepared.image_decoding import UNREADABLE, clean_boxes, decode_view
from pipeline.runtime.errors import UserError

THUMBNAIL = 144  # pixels a side at most


def clean_pixels(split: AnySplit, sample: int, side: int) -> np.ndarray:
    """Read [C, H, W] uint8 of a test image.

    Args:
        side: of an encoded image's view, in pixels; prepared pixels keep their size.

    Raises:
        UserError: an encoded image cannot be decoded.
    """
    if not isinstance(split, EncodedSplit):
        return split.images[sample]
    size = split.sizes[sample]
    (box,) = clean_boxes(size[None], split.image_size)
    try:
        return decode_view(split.content(sample), size, box, side, split.channels)
    except UNREADABLE as error:
        raise UserError(
            f"`{split.sample_ids[sample]}` of test cannot be read ({error}). Run `{AGAIN}`."
        ) from None


def corrupted_examples(split: AnySplit, side: int, severity: int) -> dict[str, np.ndarray]:
    """Corrupt the first test image at a student's size: [C, H, W] uint8 by corruption.

    Args:
        side: pixels, of a student's view.
    """
    if isinstance(split, EncodedSplit):
        pixels = clean_pixels(split, 0, side)
    else:
        (pixels,) = replace(split, images=split.images[:1]).resized(side).images
    return {name: corrupt(pixels, 0, corruption=name, severity=severity) for name in CORRUPTIONS}
