"""A small project of photographs of many sizes, kept as encoded bytes."""

from pathlib import Path

import numpy as np
from conftest import PARAMS
from PIL import Image


def picture(label: int, index: int, size: tuple[int, int]) -> Image.Image:
    """Smooth, as photographs are, in a colour of its class's own; (height, width)."""
    rng = np.random.default_rng([label, index])
    small = rng.integers(0, 120, (4, 5, 3), dtype=np.uint8)
    small[..., label] += 120
    return Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)


def write_pictures(root: Path, per_class: int = 10) -> None:
    """JPEG and PNG of many sizes, from smaller than a view to eight times as large."""
    for label, name in enumerate(("ant", "bee", "cat")):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for index in range(per_class):
            height, width = 12 + 17 * index, 140 - 11 * index
            suffix, options = ((".jpg", {"quality": 95}), (".png", {}))[index % 2]
            picture(label, index, (height, width)).save(folder / f"{index}{suffix}", **options)


ENCODED = {"storage": "encoded", "image_size": 64, "quality": 90}
RESIZED = {
    "policy": "random_resized_crop",
    "rand_augment": "none",
    "mix": "none",
    "count": 2,
    "seed": 7,
    "image_size": 16,
}


def encoded_params(**dataset: object) -> dict:
    teacher = PARAMS["teacher"]
    return PARAMS | {
        "dataset": PARAMS["dataset"] | ENCODED | dataset,
        "views": RESIZED,
        "teacher": teacher
        | {
            "network": {"name": "resnet8", "input_size": 16},
            "training": teacher["training"] | {"policy": "random_resized_crop"},
        },
    }
