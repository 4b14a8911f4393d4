"""Common corruptions of test images: noise, blur, contrast, brightness, pixelation, JPEG.

Defined as in Hendrycks and Dietterich 2019 (arXiv:1903.12261), whose published strengths are for
images of 224 pixels (ImageNet-C) and of 32 (CIFAR-10-C): between the two a strength is interpolated
over the logarithm of the image's side; smaller and larger images have those of the nearer.

Pure: pixels in, pixels out, with NumPy and Pillow; imports nothing of ours. Only noise is random,
and it is a function of (severity, sample): no batch, order or other image changes it.
"""

import io
from collections.abc import Callable, Mapping
from math import ceil, log

import numpy as np
from PIL import Image

#: Of the five published: each more costs a forward pass of every network for every image.
SEVERITIES = (1, 3, 5)
#: Test images that are corrupted, at most, for each is shown to every network once for each
#: corruption and severity. With 2,000, an accuracy's 95 % interval is within 2.2 points each way.
MOST_IMAGES = 2_000
SEED = 0

#: By corruption, the strengths at severities 1 to 5: at 32 pixels, and at 224.
PUBLISHED: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # standard deviation, of pixels in [0, 1]
    "noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    # standard deviation of the Gaussian, in pixels
    "blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    # what remains of each pixel's distance from its channel's mean
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    # what is added to the value (of hue, saturation, value), in [0, 1]
    "brightness": ((0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5)),
    # pixels that remain of each side's, as a share
    "pixelation": ((0.95, 0.90, 0.85, 0.75, 0.65), (0.60, 0.50, 0.40, 0.30, 0.25)),
    # quality
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
CORRUPTIONS = tuple(PUBLISHED)

_SIDES = (32, 224)  # pixels
_TRUNCATE = 4  # standard deviations


def chosen_samples(count: int) -> np.ndarray:
    """[N] int64: which of so many test images are corrupted: all, or MOST_IMAGES evenly spread, so
    that classes that stand one after the other have their shares."""
    number = min(count, MOST_IMAGES)
    return np.arange(number) * count // max(1, number)


def corrupted(image: np.ndarray, sample: int, *, corruption: str, severity: int) -> np.ndarray:
    """One image, corrupted.

    Args:
        image: [C, H, W] uint8, of 1 or 3 channels.
        sample: the image's number, from which its noise follows.
        corruption: one of CORRUPTIONS.
        severity: 1 to 5.

    Returns:
        [C, H, W] uint8.
    """
    amount = strength(corruption, severity, min(image.shape[1:]))
    if corruption == "noise":
        return _noise(image, amount, severity, sample)
    return _BY_NAME[corruption](image, amount)


def strength(corruption: str, severity: int, side: int) -> float:
    """What is published for the severity, at an image's shorter side in pixels."""
    small, large = (values[severity - 1] for values in PUBLISHED[corruption])
    share = log(side / _SIDES[0]) / log(_SIDES[1] / _SIDES[0])
    return small + min(1, max(0, share)) * (large - small)


def _levels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _noise(image: np.ndarray, deviation: float, severity: int, sample: int) -> np.ndarray:
    # Philox counts in the lower words of its counter: the streams of two samples never meet.
    source = np.random.Philox(key=SEED, counter=[0, 0, severity, sample])
    drawn = np.random.Generator(source).standard_normal(image.shape, np.float32)
    return _levels(image + drawn * np.float32(255 * deviation))


def _blur(image: np.ndarray, deviation: float) -> np.ndarray:
    reach = ceil(_TRUNCATE * deviation - 0.5)  # pixels
    offsets = np.arange(reach + 1)
    weights = np.exp(-0.5 * (offsets / deviation) ** 2)
    weights = (weights / (2 * weights.sum() - weights[0])).astype(np.float32)
    pixels = image.astype(np.float32)
    for axis in (1, 2):
        padding = [(reach, reach) if i == axis else (0, 0) for i in range(3)]
        padded = np.moveaxis(np.pad(pixels, padding, "edge"), axis, 0)
        length = image.shape[axis]
        total = weights[0] * padded[reach : reach + length]
        for offset in range(1, reach + 1):
            before = padded[reach - offset : reach - offset + length]
            total += weights[offset] * (before + padded[reach + offset : reach + offset + length])
        pixels = np.moveaxis(total, 0, axis)
    return _levels(pixels)


def _contrast(image: np.ndarray, remaining: float) -> np.ndarray:
    means = image.mean((1, 2), keepdims=True)
    return _levels((image - means) * remaining + means)


def _brightness(image: np.ndarray, added: float) -> np.ndarray:
    """Hue and saturation stay: all channels of a pixel are multiplied alike; black becomes grey."""
    value = image.max(0, keepdims=True).astype(np.float64)
    brighter = np.minimum(value + 255 * added, 255)
    return _levels(np.where(value == 0, brighter, image * (brighter / np.maximum(value, 1))))


def _pixelation(image: np.ndarray, remaining: float) -> np.ndarray:
    height, width = image.shape[1:]
    small = (int(width * remaining), int(height * remaining))
    coarse = _to_pillow(image).resize(small, Image.Resampling.BOX)
    return _from_pillow(coarse.resize((width, height), Image.Resampling.BOX))


def _jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    file = io.BytesIO()
    _to_pillow(image).save(file, "JPEG", quality=round(quality))
    return _from_pillow(Image.open(file))


_BY_NAME: Mapping[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelation": _pixelation,
    "jpeg": _jpeg,
}


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(
        image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    )


def _from_pillow(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
