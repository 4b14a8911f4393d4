"""Source `digits`: scikit-learn's handwritten digits, 1,797 greyscale images of 8 x 8 pixels."""

import numpy as np
from PIL import Image

from pipeline.data.sources.image_reading import decode_all
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import TRAIN, ImageSource, SampleTable, split_off


def digits(params: DatasetParams) -> ImageSource:
    """Open the digits, with validation and test split off."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (takes seconds; other sources need none)

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], 17 levels
    count = len(pixels)
    samples = SampleTable(
        [f"{index:04d}" for index in range(count)],
        bunch.target.astype(np.int64),
        np.full(count, TRAIN, np.int8),
    )
    images = decode_all(
        enumerate(pixels), lambda _, image: (Image.fromarray(image), None), samples.ids, params
    )
    class_names = [str(digit) for digit in range(10)]
    return ImageSource(class_names, split_off(samples, params), images)
