"""The classification datasets of torchvision that `dataset.name` can name.

All yield (image, integer label), have their own splits and a list of labels, as checked in
torchvision's source. The numbers of images are those that their authors publish.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageSet:
    splits: Mapping[str, Mapping[str, Any]]  # our split, or `unlabeled` -> torchvision's arguments
    sizes: Sequence[int]  # images of each split
    files: str  # what to put below the root if there is no network


_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
_TRAIN, _TEST = {"train": {"split": "train"}}, {"test": {"split": "test"}}
_VALIDATION = {"validation": {"split": "val"}}
_ALL_THREE = _TRAIN | _VALIDATION | _TEST

_MNIST_FILES = (
    "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, "
    "t10k-labels-idx1-ubyte.gz"
)
_MNIST_SIZES = (60_000, 10_000)
_GTSRB_FILES = "GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip"

SETS: Mapping[str, ImageSet] = {
    "CIFAR10": ImageSet(_BY_FLAG, (50_000, 10_000), "cifar-10-python.tar.gz"),
    "CIFAR100": ImageSet(_BY_FLAG, (50_000, 10_000), "cifar-100-python.tar.gz"),
    "MNIST": ImageSet(_BY_FLAG, _MNIST_SIZES, f"MNIST/raw/ with {_MNIST_FILES}"),
    "FashionMNIST": ImageSet(_BY_FLAG, _MNIST_SIZES, f"FashionMNIST/raw/ with {_MNIST_FILES}"),
    "KMNIST": ImageSet(_BY_FLAG, _MNIST_SIZES, f"KMNIST/raw/ with {_MNIST_FILES}"),
    "USPS": ImageSet(_BY_FLAG, (7_291, 2_007), "usps.bz2, usps.t.bz2"),
    "SVHN": ImageSet(_TRAIN | _TEST, (73_257, 26_032), "train_32x32.mat, test_32x32.mat"),
    "STL10": ImageSet(
        _TRAIN | _TEST | {"unlabeled": {"split": "unlabeled"}},
        (5_000, 8_000, 100_000),
        "stl10_binary.tar.gz",
    ),
    "GTSRB": ImageSet(_TRAIN | _TEST, (26_640, 12_630), f"gtsrb/ with {_GTSRB_FILES}"),
    "Food101": ImageSet(_TRAIN | _TEST, (75_750, 25_250), "food-101.tar.gz"),
    "OxfordIIITPet": ImageSet(
        {"train": {"split": "trainval"}} | _TEST,
        (3_680, 3_669),
        "oxford-iiit-pet/ with images.tar.gz, annotations.tar.gz",
    ),
    "Country211": ImageSet(
        _TRAIN | {"validation": {"split": "valid"}} | _TEST,
        (31_650, 10_550, 21_100),
        "country211.tgz",
    ),
    "DTD": ImageSet(_ALL_THREE, (1_880, 1_880, 1_880), "dtd/dtd-r1.0.1.tar.gz"),
    "Flowers102": ImageSet(
        _ALL_THREE,
        (1_020, 1_020, 6_149),
        "flowers-102/ with 102flowers.tgz, imagelabels.mat, setid.mat",
    ),
    "FGVCAircraft": ImageSet(_ALL_THREE, (3_334, 3_333, 3_333), "fgvc-aircraft-2013b.tar.gz"),
    "RenderedSST2": ImageSet(_ALL_THREE, (6_920, 872, 1_821), "rendered-sst2.tgz"),
    "Imagenette": ImageSet(_TRAIN | _VALIDATION, (9_469, 3_925), "imagenette2.tgz"),
}
