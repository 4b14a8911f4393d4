"""`dataset`: which images, and how they are packed."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.data.sources.torchvision_catalog import SETS
from pipeline.runtime.errors import did_you_mean
from pipeline.runtime.params import Section

Quality = Annotated[int, Field(ge=1, le=100)]


class DatasetParams(Section):
    """Which dataset `prepare` reads, and how it is packed and split."""

    source: Literal["mnist_5k", "image_folder", "torchvision"]
    # image_folder: a folder or an archive (.tar, .tar.gz, .zip); torchvision: the folder that holds
    # the dataset or receives the download; mnist_5k: unused
    root: str = Field(description="Add `root: data/raw/none` if `source` reads no folder")
    name: str | None = None  # torchvision: required, the dataset's class in torchvision.datasets
    # pixels: images become arrays, squares of `image_size`. encoded: they stay image files, keep
    # their aspect ratio, and are decoded each time they are read.
    storage: Literal["pixels", "encoded"]
    image_size: int = Field(ge=8, le=4096)  # pixels; encoded: the bound of the shorter side
    # encoded: JPEG quality of each image, 1 to 100; `original`: keep the source's bytes
    quality: Quality | Literal["original"] = 90
    channels: Literal[1, 3] = 3  # 3: RGB, 1: greyscale
    # How many bits are used of images that have more than 8 a channel: white is 2**bit_depth - 1.
    # None: all 16.
    bit_depth: int | None = Field(default=None, ge=8, le=16)
    # Files that are not images that can be read: refuse the dataset, or leave them out.
    unreadable: Literal["refuse", "skip"] = "refuse"
    # The share of each class's training samples that a split takes, needed if the source lacks it.
    validation_fraction: float | None = Field(default=None, gt=0, lt=1)
    test_fraction: float | None = Field(default=None, gt=0, lt=1)
    # How many training images of each class keep their label, at most. The others lose it.
    labels_per_class: int | None = Field(default=None, ge=1)
    split_seed: int = Field(ge=0, lt=2**63)

    @model_validator(mode="after")
    def _keys_fit_together(self) -> "DatasetParams":
        if self.source != "torchvision" and self.name is not None:
            raise ValueError(
                f"name is `{self.name}`, which belongs to source `torchvision`, but source is "
                f"`{self.source}`: remove it"
            )
        if self.source == "torchvision" and self.name not in SETS:
            problem = "missing" if self.name is None else f"`{self.name}`, which is not known"
            raise ValueError(
                f"name is {problem}{did_you_mean(self.name or '', list(SETS)) or '.'} Known: "
                f"{', '.join(SETS)}. Make any other dataset an image_folder"
            )
        splits = SETS[self.name].splits if self.name else () if self.source == "mnist_5k" else None
        for split in ("validation", "test"):
            if (
                splits is not None
                and split not in splits
                and getattr(self, f"{split}_fraction") is None
            ):
                raise ValueError(
                    f"{split}_fraction is missing, but {self.name or self.source} has no {split} "
                    f"split: add `{split}_fraction: 0.1`, for example"
                )
        stored = (self.storage, self.quality)
        if self.source != "image_folder" and stored == ("encoded", "original"):
            raise ValueError(
                f"quality is `original`, but source `{self.source}` has no image files: set it to "
                "1 ... 100, or storage to `pixels`"
            )
        if (self.validation_fraction or 0) + (self.test_fraction or 0) >= 1:
            raise ValueError(
                "validation_fraction + test_fraction leave nothing to train on: "
                "their sum must be less than 1"
            )
        return self
