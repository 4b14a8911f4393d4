"""`soft_targets`: how the teacher's logits are computed and stored."""

from typing import Literal

from pydantic import Field

from pipeline.params.loading import Section


class SoftTargetsParams(Section):
    encoding: Literal["dense"]  # float16 logits of every class
    precision: Literal["float32", "bfloat16", "float16"]  # of the teacher's forward pass
    batch_size: int = Field(ge=1)  # images per forward pass; may move the last bits of a logit
