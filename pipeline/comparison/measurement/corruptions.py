"""Common corruptions of test images: noise, blur, contrast, brightness, pixelation, JPEG.

Defined as in Hendrycks and Dietterich 2019 (arXiv:1903.12261). They published strengths for images
of 224 pixels (ImageNet-C) and of 32 (CIFAR-10-C). Between the two, a strength is interpolated over
the logarithm of the image's side; smaller and larger images have those of the nearer size.

Pure: pixels in, pixels out, with NumPy and Pillow; imports nothing of ours. Only noise is random.
It is a function of (severity, sample): batch, order and other images do not change it.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil, log

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

#: Two of the five published: each costs a forward pass of every network for every image, and the
#: variants of an image are much alike: with 3 in between, an interval would be 2 % narrower.
SEVERITIES = (1, 5)
#: Each test image costs a forward pass of every network per corruption and severity, 12 in all, so
#: a fifth of them is corrupted. An accuracy's 95 % interval is within 4.4 points each way for 500
#: images, and within 2.2 for 2,000.
SHARE = 5
FEWEST, MOST = 500, 2_000
SEED = 0

#: By corruption: the strengths at severities 1 to 5, for 32 pixels and for 224.
PUBLISHED: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # standard deviation, of pixels in [0, 1]
    "noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    # standard deviation of the Gaussian, in pixels
    "blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    # remaining share of each pixel's distance from its channel's mean
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    # added to the value (of hue, saturation, value), in [0, 1]
    "brightness": ((0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5)),
    # remaining share of each side's pixels
    "pixelation": ((0.95, 0.90, 0.85, 0.75, 0.65), (0.60, 0.50, 0.40, 0.30, 0.25)),
    # quality
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
CORRUPTIONS = tuple(PUBLISHED)

_SIDES = (32, 224)  # pixels
_TRUNCATE = 4  # standard deviations


def samples_to_corrupt(count: int) -> np.ndarray:
    """Choose which of `count` test images are corrupted: [N] int64 sample numbers.

    A fifth, but at least 500 if there are so many and at most 2,000; evenly spread, so that sorted
    classes keep their proportions.
    """
    number = min(count, max(FEWEST, min(count // SHARE, MOST)))
    return np.arange(number) * count // max(1, number)


def all_variants(pixels: np.ndarray, samples: np.ndarray, threads: int) -> Iterator[np.ndarray]:
    """Yield [B, C, H, W] uint8: the images under each corruption at each severity.

    Args:
        pixels: [B, C, H, W] uint8.
        samples: [B] sample numbers.
    """
    with ThreadPoolExecutor(threads) as pool:  # NumPy and Pillow release the GIL
        for corruption in CORRUPTIONS:
            for severity in SEVERITIES:
                variant = partial(corrupt, corruption=corruption, severity=severity)
                yield np.stack(list(pool.map(variant, pixels, samples.tolist())))


def corrupt(image: np.ndarray, sample: int, *, corruption: str, severity: int) -> np.ndarray:
    """Corrupt one image.

    Args:
        image: [C, H, W] uint8, of 1 or 3 channels.
        sample: the image's number, which seeds its noise.
        corruption: one of CORRUPTIONS.
        severity: 1 to 5.

    Returns:
        [C, H, W] uint8.
    """
    amount = strength(corruption, severity, min(image.shape[1:]))
    if corruption == "noise":
        return _noise(image, amount, severity, sample)
    return _DETERMINISTIC[corruption](image, amount)


def strength(corruption: str, severity: int, side: int) -> float:
    """Interpolate the published strength for an image's shorter side in pixels."""
    small, large = (values[severity - 1] for values in PUBLISHED[corruption])
    share = log(side / _SIDES[0]) / log(_SIDES[1] / _SIDES[0])
    return small + min(1, max(0, share)) * (large - small)


def _levels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _noise(image: np.ndarray, deviation: float, severity: int, sample: int) -> np.ndarray:
    # Philox counts in the lower words of its counter: the streams of two samples never meet.
    bits = np.random.Philox(key=SEED, counter=[0, 0, severity, sample])
    noise = np.random.Generator(bits).standard_normal(image.shape, np.float32)
    return _levels(image + noise * np.float32(255 * deviation))


def _blur(image: np.ndarray, deviation: float) -> np.ndarray:
    # Not scipy.ndimage's: sums in another order differ by a level in 1 of 100,000 pixels.
    radius = ceil(_TRUNCATE * deviation - 0.5)  # pixels
    offsets = np.arange(radius + 1)
    weights = np.exp(-0.5 * (offsets / deviation) ** 2)
    weights = (weights / (2 * weights.sum() - weights[0])).astype(np.float32)
    pixels = image.astype(np.float32)
    for axis in (1, 2):
        padding = [(radius, radius) if i == axis else (0, 0) for i in range(3)]
        shifted = sliding_window_view(np.pad(pixels, padding, "edge"), 2 * radius + 1, axis)
        pixels = weights[0] * shifted[..., radius]
        for i in range(1, radius + 1):
            pixels += weights[i] * (shifted[..., radius - i] + shifted[..., radius + i])
    return _levels(pixels)


def _contrast(image: np.ndarray, remaining: float) -> np.ndarray:
    means = image.mean((1, 2), keepdims=True)
    return _levels((image - means) * remaining + means)


def _brightness(image: np.ndarray, added: float) -> np.ndarray:
    """Scale all channels of a pixel alike: hue and saturation stay, and black becomes grey."""
    value = image.max(0, keepdims=True).astype(np.float64)
    brighter = np.minimum(value + 255 * added, 255)
    return _levels(np.where(value == 0, brighter, image * (brighter / np.maximum(value, 1))))


def _pixelation(image: np.ndarray, remaining: float) -> np.ndarray:
    height, width = image.shape[1:]
    small = (int(width * remaining), int(height * remaining))
    coarse = to_pillow(image).resize(small, Image.Resampling.BOX)
    return _from_pillow(coarse.resize((width, height), Image.Resampling.BOX))


def _jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    file = io.BytesIO()
    to_pillow(image).save(file, "JPEG", quality=round(quality))
    return _from_pillow(Image.open(file))


_DETERMINISTIC: Mapping[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelation": _pixelation,
    "jpeg": _jpeg,
}


def to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(
        image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    )


def _from_pillow(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
