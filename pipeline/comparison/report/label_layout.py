"""Text in charts: how wide it is, where to cut it, and where it covers nothing.

Pure: pixels and names in, pixels and names out; imports nothing of ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

LINE = 15  # pixels between lines of 12-pixel text
ABOVE, BELOW = 11.5, 3.5  # pixels of a line above and below its baseline
#: Advances in DejaVu Sans, the widest of the page's fonts, as shares of the size.
ADVANCES = {
    letter: advance
    for letters, advance in (
        (" ijlfI!'|.,:;/-", 0.36),
        ('tr()[]"', 0.42),
        ("cszJ_?*", 0.55),
        ("+<=>\N{MINUS SIGN}wCGNOQUHD#~", 0.84),
        ("mMW%@&…", 1.0),
    )
    for letter in letters
}


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def contains(self, other: "Box") -> bool:
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom


@dataclass(frozen=True)
class Label:
    """A text beside its dot at (x, y), in pixels."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class PlacedLabel:
    """`left` and `baseline` of the text. `leader` is where a line from its dot meets it, if any."""

    text: str
    left: float
    baseline: float
    leader: tuple[float, float] | None


def text_width(text: str, size: float = 12) -> float:
    """Estimate the width in pixels: rather too large, by a few per cent."""

    def advance(letter: str) -> float:
        other = 1.0 if ord(letter) > 0x2E80 else 0.7 if letter.isupper() else 0.64  # CJK; Latin
        return ADVANCES.get(letter, other)

    return size * sum(map(advance, text))


def fitted(text: str, width: float, size: float = 12) -> str:
    """Cut the text to a width in pixels, with `…` at its end."""
    if text_width(text, size) <= width or len(text) == 1:
        return text
    while len(text) > 1 and text_width(f"{text}…", size) > width:
        text = text[:-1].rstrip()
    return f"{text}…"


def place_labels(
    labels: Sequence[Label], dots: Sequence[Box], lines: Sequence[Box], frame: Box, steps: int
) -> list[PlacedLabel] | None:
    """Place each label near its dot so that it overlaps no other label and no dot.

    It is beside the dot if there is room, and as few steps above or below as possible; of equal
    places it takes the one that crosses fewer lines.

    Args:
        frame: which no label leaves.
        steps: lines of text by which a label may be moved up or down.

    Returns:
        The labels in their order, or None if one has no place.
    """
    taken: list[Box] = []
    placed = []
    for label in labels:
        places = []
        width = text_width(label.text)
        for step, right in product(range(-steps, steps + 1), (True, False)):
            baseline = label.y + 4 + step * LINE
            left = label.x + 9 if right else label.x - 9 - width
            box = Box(left, baseline - ABOVE, left + width, baseline + BELOW)
            if frame.contains(box) and not any(map(box.overlaps, (*taken, *dots))):
                crossed = sum(map(box.overlaps, lines))
                places.append((abs(step) + crossed, step < 0, not right, box))
        if not places:
            return None
        *_, box = min(places, key=lambda place: place[:3])
        taken.append(box)
        baseline = box.bottom - BELOW
        moved = abs(baseline - 4 - label.y) > 0.5
        near = box.left - 2 if box.left > label.x else box.right + 2
        leader = (near, baseline - 4) if moved else None
        placed.append(PlacedLabel(label.text, box.left, baseline, leader))
    return placed
