"""What networks started from, and where a comparison is of different starts."""

from collections.abc import Mapping
from typing import Literal

FROM_SCRATCH = "from scratch"

#: Of the weights that a network started from.
StartKind = Literal["scratch", "published", "file"]


def different_starts(starts: Mapping[str, str | None]) -> dict[StartKind, list[str]]:
    """Group students by the kind of their start; empty if all are of one kind.

    Not by its digest: two networks of one kind have other bytes.

    Args:
        starts: by student, the text of its `Start`; None where not recorded.
    """
    kinds: dict[StartKind, list[str]] = {}
    for name, text in starts.items():
        if text is not None:
            kinds.setdefault(_kind(text), []).append(name)
    return kinds if len(kinds) > 1 else {}


def _kind(text: str) -> StartKind:
    if text == FROM_SCRATCH:
        return "scratch"
    return "published" if text.startswith("published weights") else "file"
