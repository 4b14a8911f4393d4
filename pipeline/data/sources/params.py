"""`dataset`: which images, and how they are packed."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.data.sources.torchvision_catalog import SETS
from pipeline.runtime.errors import did_you_mean
from pipeline.runtime.params import Section

Quality = Annotated[int, Field(ge=1, le=100)]


class DatasetParams(Section):
    """What `prepare` reads. `validation_fraction` and `test_fraction` are shares of the samples
    that the split is taken from, class by class, where the source brings no such split."""

    source: Literal["digits", "image_folder", "torchvision"]
    # image_folder: a folder or an archive (.tar, .tar.gz, .zip); torchvision: the folder where the
    # dataset lies or is downloaded to; digits: unused
    root: str
    name: str | None = None  # torchvision: needed, the dataset's class in torchvision.datasets
    # pixels: images become arrays, squares of `image_size`. encoded: they stay files' bytes, of
    # their own aspect ratio, and are decoded whenever they are looked at.
    storage: Literal["pixels", "encoded"]
    image_size: int = Field(ge=8, le=4096)  # pixels; encoded: the bound of the shorter side
    # encoded: of the JPEG that each image becomes, 1 to 100; `original`: the source's own bytes
    quality: Quality | Literal["original"] = 90
    channels: Literal[1, 3] = 3  # 3: RGB, 1: greyscale
    validation_fraction: float = Field(gt=0, lt=1)
    test_fraction: float = Field(gt=0, lt=1)
    split_seed: int = Field(ge=0, lt=2**63)

    @model_validator(mode="after")
    def _a_known_set(self) -> "DatasetParams":
        if self.source != "torchvision" and self.name is not None:
            raise ValueError(
                f"name is `{self.name}`, which belongs to source `torchvision`, but source is "
                f"`{self.source}`: remove it"
            )
        if self.source == "torchvision" and self.name not in SETS:
            found = "missing" if self.name is None else f"`{self.name}`, which is not known"
            raise ValueError(
                f"name is {found}{did_you_mean(self.name or '', list(SETS)) or '.'} Known: "
                f"{', '.join(SETS)}. Others are brought as an image_folder"
            )
        return self

    @model_validator(mode="after")
    def _only_files_have_bytes_of_their_own(self) -> "DatasetParams":
        if self.source != "image_folder" and (self.storage, self.quality) == (
            "encoded",
            "original",
        ):
            what = {"digits": "the embedded digits are", "torchvision": "torchvision's images are"}
            raise ValueError(
                f"quality is `original`, but {what[self.source]} pixels and have no files: "
                "set it to 1 ... 100, or storage to `pixels`"
            )
        return self

    @model_validator(mode="after")
    def _something_to_train_on(self) -> "DatasetParams":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction + test_fraction leave nothing to train on: "
                "their sum must be less than 1"
            )
        return self
