"""`views`: the augmented views that the teacher labels and students train on."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from pipeline.runtime.params import Section
from pipeline.runtime.validation import none_or_mapping, shown
from pipeline.views.policy import POLICIES, PairedPolicy, ViewPolicy

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


RandAugment = Annotated[RandAugmentParams | None, BeforeValidator(none_or_mapping)]


class Pair(Section):
    """A value for the weak view of a pair, and one for its strong view."""


class PairedGeometry(Pair):
    weak: Geometry
    strong: Geometry


class PairedRandAugment(Pair):
    weak: RandAugment
    strong: RandAugment

    @model_validator(mode="before")
    @classmethod
    def _parameters_are_of_each_view(cls, content: Any) -> Any:
        beside = [key for key in RandAugmentParams.model_fields if key in content]
        if beside:
            raise ValueError(
                f"{' and '.join(beside)} beside weak or strong; expected within them, such as "
                "`{weak: none, strong: {operations: 2, magnitude: 9}}`"
            )
        return content


def _name_or_pair(value: Any) -> Any:
    if isinstance(value, Mapping):
        raise ValueError(
            f"it is {shown(value)}; expected {', '.join(POLICIES)}, or "
            "`{weak: ..., strong: ...}` with two of these"
        )
    return value


def _one_or_pair(value: Any) -> str:
    """The form of a value; a value that is neither is refused as that of one view."""
    keys = value.keys() if isinstance(value, Mapping) else ()
    return "pair" if isinstance(value, Pair) or {"weak", "strong"} & set(keys) else "one"


class ViewsParams(Section):
    """How views are made, and how many of them the store has.

    `policy` and `rand_augment` have one value, or one for each view of a pair; if either has two,
    the views are pairs, and one value of the other is of both.
    """

    policy: Annotated[
        Annotated[Geometry, BeforeValidator(_name_or_pair), Tag("one")]
        | Annotated[PairedGeometry, Tag("pair")],
        Discriminator(_one_or_pair),
    ]
    # Both are required: DVC refuses a stage whose parameter is absent.
    rand_augment: Annotated[
        Annotated[RandAugment, Tag("one")] | Annotated[PairedRandAugment, Tag("pair")],
        Discriminator(_one_or_pair),
    ]
    mix: Annotated[MixParams | None, BeforeValidator(none_or_mapping)]
    count: int | Literal["all"]  # cached views, or pairs of views, of every training sample
    seed: int = Field(ge=0, lt=2**63)
    image_size: int = Field(ge=8, le=4096)  # pixels, the side of a view

    @model_validator(mode="after")
    def _pairs_are_not_mixed(self) -> "ViewsParams":
        if self.paired and self.mix is not None:
            raise ValueError(
                f"mix is {self.mix.method}, but the views are pairs, a weak and a strong one, and "
                "pairs are not mixed: set mix: none, or give policy and rand_augment one value each"
            )
        return self

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
                f"count is {self.count}, but policy `{self.view_policy}` has {distinct} distinct "
                f"views: set count to 1 ... {distinct}, or to `all`"
            )
        return self

    @property
    def paired(self) -> bool:
        """Whether views are pairs."""
        return isinstance(self.policy, Pair) or isinstance(self.rand_augment, Pair)

    @property
    def view_policy(self) -> ViewPolicy | PairedPolicy:
        """The view policy: geometry, RandAugment and mix; or one for each view of a pair."""
        if self.paired:
            return PairedPolicy(self._policy_of("weak"), self._policy_of("strong"))
        return self._policy_of("")

    def _policy_of(self, name: str) -> ViewPolicy:
        """Of one view of a pair, or of each."""
        geometry, augment = (
            getattr(value, name) if isinstance(value, Pair) else value
            for value in (self.policy, self.rand_augment)
        )
        mix = self.mix
        return ViewPolicy(
            geometry,
            (augment.operations, augment.magnitude) if augment else None,
            (mix.method, mix.alpha) if mix else None,
        )

    @property
    def num_views(self) -> int:
        """Number of cached views of every training sample, those of a pair counted singly."""
        return (1 + self.paired) * self.views_or_pairs

    @property
    def views_or_pairs(self) -> int:
        """Number of cached views of every training sample, or of pairs of views."""
        return self.view_policy.distinct if self.count == "all" else self.count
