"""`views`: the augmented views that the teacher labels and that students train on."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.augment import POLICIES
from pipeline.params.loading import Section


class ViewsParams(Section):
    """The view plan's inputs."""

    policy: Literal["none", "crop", "crop_flip", "random_resized_crop"]
    count: int | Literal["all"]  # cached views of every training sample
    seed: int = Field(ge=0, lt=2**63)
    image_size: int = Field(ge=8, le=4096)  # pixels, the side of a view

    @model_validator(mode="after")
    def _no_more_views_than_the_policy_has(self) -> "ViewsParams":
        distinct = POLICIES[self.policy]
        if distinct is None and self.count == "all":
            raise ValueError(f"count is `all`, but policy `{self.policy}` has no end of views")
        if distinct is None and self.count >= 1:
            return self
        if isinstance(self.count, int) and not 1 <= self.count <= distinct:
            raise ValueError(
                f"count is {self.count}, but policy `{self.policy}` has "
                f"{distinct} distinct view{'s' if distinct > 1 else ''}: "
                f"set count to {'1 ... ' if distinct > 1 else ''}{distinct}, or to `all`"
            )
        return self

    @property
    def num_views(self) -> int:
        return POLICIES[self.policy] if self.count == "all" else int(self.count)
