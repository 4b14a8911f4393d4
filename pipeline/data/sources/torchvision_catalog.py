"""The classification datasets of torchvision that `dataset.name` can name.

All yield (image, integer label) and have their own splits, as checked in torchvision's source.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageSet:
    splits: Mapping[str, Mapping[str, Any]]  # our split, or `unlabeled` -> torchvision's arguments
    files: str  # what to put below the root if there is no network


def _by_flag(files: str) -> ImageSet:
    return ImageSet({"train": {"train": True}, "test": {"train": False}}, files)


def _by_name(files: str, **splits: str) -> ImageSet:
    return ImageSet({ours: {"split": theirs} for ours, theirs in splits.items()}, files)


def _idx(name: str) -> str:
    ours = [f"{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")]
    return f"{name}/raw/ with " + ", ".join(
        f"{s}-{part}" for s in ("train", "t10k") for part in ours
    )


SETS: Mapping[str, ImageSet] = {
    "CIFAR10": _by_flag("cifar-10-python.tar.gz"),
    "CIFAR100": _by_flag("cifar-100-python.tar.gz"),
    "MNIST": _by_flag(_idx("MNIST")),
    "FashionMNIST": _by_flag(_idx("FashionMNIST")),
    "KMNIST": _by_flag(_idx("KMNIST")),
    "USPS": _by_flag("usps.bz2, usps.t.bz2"),
    "SVHN": _by_name("train_32x32.mat, test_32x32.mat", train="train", test="test"),
    "STL10": _by_name("stl10_binary.tar.gz", train="train", test="test", unlabeled="unlabeled"),
    "GTSRB": _by_name(
        "gtsrb/ with GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and "
        "GTSRB_Final_Test_GT.zip",
        train="train",
        test="test",
    ),
    "Food101": _by_name("food-101.tar.gz", train="train", test="test"),
    "OxfordIIITPet": _by_name(
        "oxford-iiit-pet/ with images.tar.gz, annotations.tar.gz", train="trainval", test="test"
    ),
    "Country211": _by_name("country211.tgz", train="train", validation="valid", test="test"),
    "DTD": _by_name("dtd/dtd-r1.0.1.tar.gz", train="train", validation="val", test="test"),
    "Flowers102": _by_name(
        "flowers-102/ with 102flowers.tgz, imagelabels.mat, setid.mat",
        train="train",
        validation="val",
        test="test",
    ),
    "FGVCAircraft": _by_name(
        "fgvc-aircraft-2013b.tar.gz", train="train", validation="val", test="test"
    ),
    "RenderedSST2": _by_name("rendered-sst2.tgz", train="train", validation="val", test="test"),
    "Imagenette": _by_name("imagenette2.tgz", train="train", validation="val"),
}
