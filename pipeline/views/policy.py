"""The view policy: how a view, or a pair of views, is made of its image, as a value and as a text.

Imports no torch, so that parameters are checked at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

PADDING = 4  # black pixels on every side
SHIFTS = 2 * PADDING + 1  # positions of a crop along one axis

#: Number of distinct views of each geometry; None: unlimited.
POLICIES: dict[str, int | None] = {
    "none": 1,
    "crop": SHIFTS**2,
    "crop_flip": 2 * SHIFTS**2,
    "random_resized_crop": None,
}


@dataclass(frozen=True)
class ViewPolicy:
    """The steps of a view: geometry, then RandAugment, then a mix with another sample's view."""

    geometry: str  # one of POLICIES
    rand_augment: tuple[int, int] | None = None  # (operations, magnitude 0 ... 30)
    mix: tuple[str, float] | None = None  # (mixup | cutmix, alpha of Beta(alpha, alpha))

    def __str__(self) -> str:
        """The text in a store: `crop_flip`, `crop+rand_augment(2,9)+mixup(0.2)`."""
        text = self.geometry
        if self.rand_augment is not None:
            text += "+rand_augment({},{})".format(*self.rand_augment)
        if self.mix is not None:
            text += f"+{self.mix[0]}({self.mix[1]!r})"
        return text

    @classmethod
    def parse(cls, text: str) -> ViewPolicy:
        """Read the text of a policy, or raise ValueError."""
        geometry, augmented = f"({'|'.join(POLICIES)})", r"(?:\+rand_augment\((\d+),(\d+)\))?"
        mixed = r"(?:\+(mixup|cutmix)\((\d+(?:\.\d+)?(?:e[+-]\d+)?)\))?"
        if match := re.fullmatch(geometry + augmented + mixed, text):
            name, operations, magnitude, method, alpha = match.groups()
            rand_augment = (int(operations), int(magnitude)) if operations else None
            policy = cls(name, rand_augment, (method, float(alpha)) if method else None)
            if str(policy) == text:
                return policy
        raise ValueError(f"{text!r} is no view policy")

    @property
    def distinct(self) -> int | None:
        """Number of distinct views of a sample; None: unlimited."""
        return None if self.rand_augment or self.mix else POLICIES[self.geometry]


@dataclass(frozen=True)
class PairedPolicy:
    """Two views of each image at a time, each with random numbers of its own."""

    mix: ClassVar[None] = None  # pairs are not mixed

    weak: ViewPolicy
    strong: ViewPolicy

    def __str__(self) -> str:
        """The text in a store: `weak=crop_flip;strong=crop_flip+rand_augment(2,10)`."""
        return f"weak={self.weak};strong={self.strong}"

    @property
    def distinct(self) -> int | None:
        """Number of pairs that show every distinct view of a sample; None: unlimited."""
        both = self.weak.distinct, self.strong.distinct
        return None if None in both else max(both)


def views_at_once(text: str) -> tuple[str, ...]:
    """The texts of the policies whose views are seen together: of a pair weak and strong, else the
    policy itself."""
    pair = re.fullmatch("weak=(.*);strong=(.*)", text)
    return pair.groups() if pair else (text,)


def parse_policy(text: str) -> ViewPolicy | PairedPolicy:
    """Read the text of a policy, or of a pair; ValueError if it is neither."""
    first, *second = map(ViewPolicy.parse, views_at_once(text))
    return PairedPolicy(first, *second) if second else first
