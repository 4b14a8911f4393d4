"""`views`: the augmented views that the teacher labels and students train on."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.runtime.params import Section
from pipeline.runtime.validation import none_or_mapping
from pipeline.views.policy import POLICIES, ViewPolicy

#: The box of an image that a view shows.
Geometry = Literal[tuple(POLICIES)]


class RandAugmentParams(Section):
    """RandAugment (Cubuk et al. 2020)."""

    operations: int = Field(default=2, ge=1, le=14)  # applied in turn, each one of 14
    magnitude: int = Field(default=9, ge=0, le=30)  # the strength of each


class MixParams(Section):
    """A mix of each view with the same view of another sample, its partner."""

    method: Literal["mixup", "cutmix"]  # a weighted mean, or a box of the partner's pixels
    alpha: float = Field(default=1.0, gt=0)  # the sample's share follows Beta(alpha, alpha)


class ViewsParams(Section):
    """How views are made, and how many of them the store has."""

    policy: Geometry
    # Both are required: DVC refuses a stage whose parameter is absent.
    rand_augment: Annotated[RandAugmentParams | None, BeforeValidator(none_or_mapping)]
    mix: Annotated[MixParams | None, BeforeValidator(none_or_mapping)]
    count: int | Literal["all"]  # cached views of every training sample
    seed: int = Field(ge=0, lt=2**63)
    image_size: int = Field(ge=8, le=4096)  # pixels, the side of a view

    @model_validator(mode="after")
    def _count_is_at_most_the_distinct_views(self) -> "ViewsParams":
        distinct = self.view_policy.distinct
        if distinct is None and (self.count == "all" or self.count < 1):
            raise ValueError(
                f"count is {self.count}, but the views of `{self.view_policy}` have no end: "
                "set count to a number, 1 or more"
            )
        if distinct is not None and self.count != "all" and not 1 <= self.count <= distinct:
            raise ValueError(
                f"count is {self.count}, but policy `{self.policy}` has {distinct} distinct "
                f"views: set count to 1 ... {distinct}, or to `all`"
            )
        return self

    @property
    def view_policy(self) -> ViewPolicy:
        """The view policy: geometry, RandAugment and mix."""
        augment, mix = self.rand_augment, self.mix
        return ViewPolicy(
            self.policy,
            (augment.operations, augment.magnitude) if augment else None,
            (mix.method, mix.alpha) if mix else None,
        )

    @property
    def num_views(self) -> int:
        """Number of cached views of every training sample."""
        return self.view_policy.distinct if self.count == "all" else self.count
