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


_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
_TRAIN, _TEST = {"train": {"split": "train"}}, {"test": {"split": "test"}}
_VALIDATION = {"validation": {"split": "val"}}
_ALL_THREE = _TRAIN | _VALIDATION | _TEST

_MNIST_FILES = (
    "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, "
    "t10k-labels-idx1-ubyte.gz"
)
_GTSRB_FILES = "GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip"

SETS: Mapping[str, ImageSet] = {
    "CIFAR10": ImageSet(_BY_FLAG, "cifar-10-python.tar.gz"),
    "CIFAR100": ImageSet(_BY_FLAG, "cifar-100-python.tar.gz"),
    "MNIST": ImageSet(_BY_FLAG, f"MNIST/raw/ with {_MNIST_FILES}"),
    "FashionMNIST": ImageSet(_BY_FLAG, f"FashionMNIST/raw/ with {_MNIST_FILES}"),
    "KMNIST": ImageSet(_BY_FLAG, f"KMNIST/raw/ with {_MNIST_FILES}"),
    "USPS": ImageSet(_BY_FLAG, "usps.bz2, usps.t.bz2"),
    "SVHN": ImageSet(_TRAIN | _TEST, "train_32x32.mat, test_32x32.mat"),
    "STL10": ImageSet(
        _TRAIN | _TEST | {"unlabeled": {"split": "unlabeled"}}, "stl10_binary.tar.gz"
    ),
    "GTSRB": ImageSet(_TRAIN | _TEST, f"gtsrb/ with {_GTSRB_FILES}"),
    "Food101": ImageSet(_TRAIN | _TEST, "food-101.tar.gz"),
    "OxfordIIITPet": ImageSet(
        {"train": {"split": "trainval"}} | _TEST,
        "oxford-iiit-pet/ with images.tar.gz, annotations.tar.gz",
    ),
    "Country211": ImageSet(_TRAIN | {"validation": {"split": "valid"}} | _TEST, "country211.tgz"),
    "DTD": ImageSet(_ALL_THREE, "dtd/dtd-r1.0.1.tar.gz"),
    "Flowers102": ImageSet(
        _ALL_THREE, "flowers-102/ with 102flowers.tgz, imagelabels.mat, setid.mat"
    ),
    "FGVCAircraft": ImageSet(_ALL_THREE, "fgvc-aircraft-2013b.tar.gz"),
    "RenderedSST2": ImageSet(_ALL_THREE, "rendered-sst2.tgz"),
    "Imagenette": ImageSet(_TRAIN | _VALIDATION, "imagenette2.tgz"),
}
