"""The pixels of any view, image by image: a slow, independent implementation.

Written from docs/soft_targets_format.md alone; imports nothing of the pipeline.
"""

import math
import re

import numpy as np
from scipy.special import betaincinv

WORD = 2**64 - 1


def hash64(*words: int) -> int:
    s = 0
    for w in words:
        s = ((s ^ w) + 0x9E3779B97F4A7C15) & WORD
        s = ((s ^ (s >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        s = ((s ^ (s >> 27)) * 0x94D049BB133111EB) & WORD
        s = s ^ (s >> 31)
    return s


class Plan:
    """The random numbers of one sample in one view."""

    def __init__(self, seed: int, view: int, sample: int):
        self.words = (seed, view, sample)

    def number(self, purpose: int, n: int) -> int:
        return hash64(hash64(*self.words, purpose), n)

    def uniform(self, purpose: int, n: int) -> float:
        return (self.number(purpose, n) >> 11) * 2.0**-53


def of_pair(policy: str, seed: int, view: int) -> tuple[str, int, int]:
    """The policy, seed and number by which a view of a store is made: of a pair, or its own."""
    pair = re.fullmatch("weak=(.*);strong=(.*)", policy)
    if pair is None:
        return policy, seed, view
    return pair[1 + view % 2], hash64(seed, WORD) if view % 2 else seed, view // 2


def view_of(images: np.ndarray, policy: str, seed: int, view: int, sample: int) -> np.ndarray:
    """Make one view, [C, S, S] uint8.

    Args:
        images: [N, C, S, S] uint8, the whole split.
    """
    geometry, *more = policy.split("+")
    steps = {part.partition("(")[0]: part.partition("(")[2][:-1] for part in more}
    augmented = steps.pop("rand_augment", None)

    def unmixed(sample: int) -> np.ndarray:
        image = geometric(images[sample].astype(int), geometry, seed, view, sample)
        if augmented is not None:
            operations, magnitude = map(int, augmented.split(","))
            plan = Plan(seed, view, sample)
            for k in range(operations):
                sign = 1 - 2 * (plan.number(3, 2 * k + 1) % 2)
                image = operation(image, plan.number(3, 2 * k) % 14, sign, magnitude)
        return image

    pixels = unmixed(sample)
    if steps:
        ((method, alpha),) = steps.items()
        plan, total, side = Plan(seed, view, sample), len(images), images.shape[-1]
        partner = unmixed((sample + 1 + plan.number(4, 0) % max(1, total - 1)) % total)
        share = betaincinv(float(alpha), float(alpha), plan.uniform(5, 0))
        if method == "mixup":
            n = int(np.rint(256 * share))
            pixels = (n * pixels + (256 - n) * partner + 128) // 256
        else:
            half = int(side * math.sqrt(1 - share)) // 2
            y, x = (plan.number(6, n) % side for n in (0, 1))
            box = np.s_[:, max(0, y - half) : y + half, max(0, x - half) : x + half]
            pixels[box] = partner[box]
    return pixels.astype(np.uint8)


def label_share(policy: str, side: int, seed: int, view: int, sample: int) -> float:
    """The share of the sample's label in a mixed view."""
    method, alpha = re.search(r"(mixup|cutmix)\((.*)\)", policy).groups()
    plan = Plan(seed, view, sample)
    share = betaincinv(float(alpha), float(alpha), plan.uniform(5, 0))
    if method == "mixup":
        return float(np.rint(256 * share)) / 256
    half = int(side * math.sqrt(1 - share)) // 2
    area = 1
    for n in (0, 1):
        centre = plan.number(6, n) % side
        area *= min(side, centre + half) - max(0, centre - half)
    return 1 - area / side**2


def geometric(image: np.ndarray, geometry: str, seed: int, view: int, sample: int) -> np.ndarray:
    side = image.shape[1]
    if geometry == "none":
        return image
    if geometry == "random_resized_crop":
        plan = Plan(seed, view, sample)
        top, left, height, width = box_of(plan, side, side)
        across = resized(image, left, width, side)
        down = resized(across.transpose(0, 2, 1), top, height, side).transpose(0, 2, 1)
        return down[:, :, ::-1] if plan.number(2, 0) % 2 else down
    distinct = {"crop": 81, "crop_flip": 162}[geometry]
    cycle, entry = divmod(view, distinct)
    key = hash64(seed, cycle, sample)
    for r in range(24):
        partner = (hash64(key, r) % distinct - entry) % distinct
        if hash64(key, r, max(entry, partner)) % 2:
            entry = partner
    flip, top, left = entry // 81, entry % 81 // 9, entry % 9
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4)))
    window = padded[:, top : top + side, left : left + side]
    return window[:, :, ::-1] if flip else window


def box_of(plan: Plan, height: int, width: int) -> tuple[int, int, int, int]:
    for t in range(10):
        area = (0.08 + 0.92 * plan.uniform(1, 4 * t)) * (height * width)
        x = 0.28768207245178096 * (2 * plan.uniform(1, 4 * t + 1) - 1)
        ratio = 1.0
        for n in range(14, 0, -1):
            ratio = 1 + x * ratio / n
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            top = plan.number(1, 4 * t + 2) % (height - high + 1)
            left = plan.number(1, 4 * t + 3) % (width - wide + 1)
            return top, left, high, wide
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - high) // 2, (width - wide) // 2, high, wide


def resized(image: np.ndarray, start: int, length: int, size: int) -> np.ndarray:
    """Resize `length` pixels from `start` of the last axis to `size`."""
    limit = image.shape[-1]
    columns = []
    for i in range(size):
        centre = 2 * size * start + (2 * i + 1) * length
        reach = 2 * max(size, length)
        shares = [max(0, reach - abs(2 * size * x + size - centre)) for x in range(limit)]
        total = sum(shares)
        weights = [(2 * 2**14 * share + total) // (2 * total) for share in shares]
        weights[weights.index(max(weights))] += 2**14 - sum(weights)
        columns.append((image @ np.array(weights) + 2**13) // 2**14)
    return np.stack(columns, -1)


def operation(  # noqa: PLR0911, PLR0912, in the order of the page
    image: np.ndarray, number: int, sign: int, magnitude: int
) -> np.ndarray:
    """Apply one of the 14 operations to integers [C, H, W]."""
    channels, height, width = image.shape
    one, unit = 2**14, 2**16
    factor = (one * (100 + 3 * magnitude * sign) + 50) // 100
    levels = np.arange(256)

    def affine(column_map, row_map):
        moved = np.zeros_like(image)
        for i in range(height):
            for j in range(width):
                column, row = (
                    (a * (2 * j + 1) + b * (2 * i + 1) + c) >> 17
                    for a, b, c in (column_map, row_map)
                )
                if 0 <= column < width and 0 <= row < height:
                    moved[:, i, j] = image[:, row, column]
        return moved

    def grey():
        if channels == 1:
            return image[0]
        return (4899 * image[0] + 9617 * image[1] + 1868 * image[2]) >> 14

    def blend(pixels, other):
        return np.clip((factor * pixels + (one - factor) * other) >> 14, 0, 255)

    shear = sign * ((unit * magnitude + 50) // 100)
    straight_column, straight_row = (unit, 0, 0), (0, unit, 0)
    match number:
        case 0:
            return image
        case 1:
            return affine((unit, shear, 0), straight_row)
        case 2:
            return affine(straight_column, (shear, unit, 0))
        case 3:
            return affine(
                (unit, 0, -2 * unit * sign * (5 * width * magnitude // 331)), (0, unit, 0)
            )
        case 4:
            shift = -2 * unit * sign * (5 * height * magnitude // 331)
            return affine(straight_column, (0, unit, shift))
        case 5:
            angle = math.radians(magnitude)
            p, q = round(unit * math.cos(angle)), sign * round(unit * math.sin(angle))
            return affine(
                (p, -q, (unit - p) * width + q * height), (q, p, (unit - p) * height - q * width)
            )
        case 6:
            return np.clip((factor * image) >> 14, 0, 255)
        case 7:
            return image if channels == 1 else blend(image, grey())
        case 8:
            count = height * width
            levels = factor * count * image + (one - factor) * int(grey().sum())
            return np.clip(levels // (one * count), 0, 255)
        case 9:
            changed = image.copy()
            for i in range(1, height - 1):
                for j in range(1, width - 1):
                    around = image[:, i - 1 : i + 2, j - 1 : j + 2].sum((1, 2))
                    smooth = (2 * (around + 4 * image[:, i, j]) + 13) // 26
                    changed[:, i, j] = blend(image[:, i, j], smooth)
            return changed
        case 10:
            dropped = (4 * magnitude + 15) // 30
            return image >> dropped << dropped
        case 11:
            return np.where(30 * image >= 255 * (30 - magnitude), 255 - image, image)
    changed = image.copy()
    for channel, plane in enumerate(image):
        if number == 12:
            least, most = plane.min(), plane.max()
            if most > least:
                changed[channel] = 255 * (plane - least) // (most - least)
        else:
            histogram = np.bincount(plane.ravel(), minlength=256)
            step = (plane.size - histogram[plane.max()]) // 255
            if step:
                below = np.cumsum(histogram) - histogram
                changed[channel] = np.minimum(255, (below + step // 2) // step)[plane]
    return changed
