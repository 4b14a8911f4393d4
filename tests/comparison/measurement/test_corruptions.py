"""Each corruption equals an independent computation of it."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from pipeline.comparison.measurement.corruptions import (
    CORRUPTIONS,
    PUBLISHED,
    SEVERITIES,
    corrupt,
    samples_to_corrupt,
    strength,
)


def photograph(side: int, channels: int = 3, width: int | None = None) -> np.ndarray:
    """Draw soft shapes with edges and some texture, from black to white: [C, H, W] uint8."""
    rng = np.random.default_rng(side)
    shape = (channels, side, width or side)
    soft = gaussian_filter(rng.normal(size=shape), (0, side / 10, side / 10))
    soft = (soft - soft.min()) / (soft.max() - soft.min())
    edged = np.where(soft > 0.6, soft, 0.7 * soft)
    textured = 255 * edged + rng.normal(0, 6, shape)
    return np.clip(textured, 0, 255).astype(np.uint8)


def apply(name: str, image: np.ndarray, severity: int, sample: int = 0) -> np.ndarray:
    return corrupt(image, sample, corruption=name, severity=severity)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("channels", "side"), [(3, 16), (1, 96), (3, 224)])
def test_a_higher_severity_changes_the_image_more(name, channels, side):
    """For SEVERITIES. (Not for all five: pixelation that divides a side evenly, such as 96 pixels
    to 64, shifts an image more than the next severity does.)"""
    image = photograph(side, channels, width=side + 3)
    before = image.copy()
    distances = []
    for severity in SEVERITIES:
        changed = apply(name, image, severity)
        assert changed.shape == image.shape
        assert changed.dtype == np.uint8
        distances.append(((changed.astype(float) - image) ** 2).mean())
    assert distances[0] > 0
    assert (np.diff(distances) > 0).all()
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_strengths_are_the_published_ones_at_their_sizes_and_interpolated_between(name):
    small, large = PUBLISHED[name]
    for severity in range(1, 6):
        at = severity - 1
        assert strength(name, severity, 32) == strength(name, severity, 16) == small[at]
        assert strength(name, severity, 224) == strength(name, severity, 512) == large[at]
        # 84 and 85 are the integers around the middle of the logarithms.
        around = sorted(strength(name, severity, side) for side in (84, 85))
        assert around[0] <= (small[at] + large[at]) / 2 <= around[1]


@pytest.mark.parametrize("severity", [1, 5])
def test_noise_has_mean_0_and_its_standard_deviation(severity):
    image = np.full((3, 32, 32), 128, np.uint8)  # 5 standard deviations from black and white
    drawn = np.stack([apply("noise", image, severity, sample) for sample in range(100)])
    difference = drawn.astype(float) - 128
    deviation = 255 * PUBLISHED["noise"][0][severity - 1]
    count = difference.size
    assert abs(difference.mean()) < 4 * deviation / count**0.5
    assert difference.std() == pytest.approx(deviation, rel=4 / (2 * count) ** 0.5 + 0.002)


def test_noise_is_independent_between_channels_samples_and_severities():
    image = np.full((3, 64, 64), 128, np.uint8)
    draws = [
        apply("noise", image, severity, sample).astype(float) - 128
        for severity in (1, 3)
        for sample in (0, 1, 2**31)
    ]
    planes = np.stack([plane.ravel() for draw in draws for plane in draw])
    correlations = np.corrcoef(planes) - np.eye(len(planes))
    assert np.abs(correlations).max() < 5 / 64


@pytest.mark.parametrize("side", [16, 100, 224])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_equals_scipys_gaussian_within_a_level(side, severity):
    image = photograph(side, width=side + 3)
    deviation = strength("blur", severity, side)
    expected = gaussian_filter(image.astype(float), (0, deviation, deviation), mode="nearest")
    assert np.abs(apply("blur", image, severity) - expected).max() <= 0.51


@pytest.mark.parametrize("severity", [1, 5])
def test_contrast_moves_each_channel_towards_its_own_mean(severity):
    image = photograph(32)
    remaining = PUBLISHED["contrast"][0][severity - 1]
    for channel, changed in zip(image, apply("contrast", image, severity), strict=True):
        mean = channel.sum() / channel.size
        expected = [remaining * level + (1 - remaining) * mean for level in channel.ravel()]
        np.testing.assert_allclose(changed.ravel(), expected, atol=0.5001)


@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_adds_to_the_value_and_keeps_hue_and_saturation(severity):
    image = photograph(16)
    image[:, 0, :3] = 0  # black has no hue
    added = PUBLISHED["brightness"][0][severity - 1]
    changed = apply("brightness", image, severity)
    for pixel, got in zip(image.reshape(3, -1).T, changed.reshape(3, -1).T, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + added))
        np.testing.assert_allclose(got, 255 * np.array(expected), atol=0.5001)
    grey = np.minimum(image[:1] + 255 * added, 255)
    np.testing.assert_allclose(apply("brightness", image[:1], severity), grey, atol=0.5001)


@pytest.mark.parametrize(("severity", "block"), [(2, 2), (5, 4)])
def test_pixelation_shows_the_means_of_blocks(severity, block):
    image = photograph(224)
    blocks = image.reshape(3, 224 // block, block, 224 // block, block)
    means = blocks.mean((2, 4)).repeat(block, 1).repeat(block, 2)
    assert np.abs(apply("pixelation", image, severity) - means).max() <= 1


@pytest.mark.parametrize(("channels", "severity"), [(1, 1), (3, 5)])
def test_jpeg_equals_pillows_at_the_published_quality(channels, severity):
    image = photograph(32, channels)
    pixels = image[0] if channels == 1 else image.transpose(1, 2, 0).copy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
    decoded = np.asarray(Image.open(file)).reshape(32, 32, channels).transpose(2, 0, 1)
    assert np.array_equal(apply("jpeg", image, severity), decoded)


def test_few_test_images_are_all_corrupted_and_of_many_an_even_sample():
    for count in (0, 359, 500):
        assert samples_to_corrupt(count).tolist() == list(range(count))
    for count, expected in ((501, 500), (2_500, 500), (5_000, 1_000), (50_000, 2_000)):
        samples = samples_to_corrupt(count)
        assert len(samples) == expected
        classes = np.bincount(samples * 10 // count)  # ten classes, one after the other
        np.testing.assert_allclose(classes, expected / 10, atol=1)
        gaps = np.diff(samples)
        assert 1 <= gaps.min() <= gaps.max() <= gaps.min() + 1
