"""`soft_targets`: how the teacher's logits are computed and stored."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.runtime.errors import UserError
from pipeline.runtime.params import PARAMS_FILE, Section


class SoftTargetsParams(Section):
    encoding: Literal["dense", "top_k"]  # float16 logits of every class, or of the k largest
    k: int | None = Field(None, ge=1)  # for `top_k`: the k largest; the label's is kept, too
    precision: Literal["float32", "bfloat16", "float16"]  # of the teacher's forward pass
    batch_size: int = Field(ge=1)  # images per forward pass; can change the last bits of a logit

    def check_classes(self, num_classes: int) -> None:
        """Refuse a `k` of more classes than the dataset has."""
        if self.k is not None and self.k > num_classes:
            raise UserError(
                f"`{PARAMS_FILE}: soft_targets.k` is {self.k}, but the dataset has {num_classes} "
                "classes; expected at most as many. Lower k, or set encoding: dense."
            )

    @model_validator(mode="after")
    def _check_k(self) -> "SoftTargetsParams":
        if self.encoding == "top_k" and self.k is None:
            raise ValueError("encoding `top_k` needs `k`, the number of classes to keep: set k: 10")
        if self.encoding == "dense" and self.k is not None:
            raise ValueError(
                f"k is {self.k}, but encoding `dense` keeps every class: remove k, or set "
                "encoding: top_k"
            )
        return self
