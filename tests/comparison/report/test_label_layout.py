"""A label covers no other and no dot, and a text is cut where it must be."""

from itertools import combinations

import pytest

from pipeline.comparison.report.label_layout import (
    ABOVE,
    BELOW,
    LINE,
    Box,
    Label,
    fitted,
    place_labels,
    text_width,
)

FRAME = Box(0, 0, 300, 200)


def dot(label: Label) -> Box:
    return Box(label.x - 4, label.y - 4, label.x + 4, label.y + 4)


def boxes(labels: list[Label], lines: list[Box], steps: int = 8) -> list[Box]:
    placed = place_labels(labels, [dot(label) for label in labels], lines, FRAME, steps)
    return [
        Box(p.left, p.baseline - ABOVE, p.left + text_width(p.text), p.baseline + BELOW)
        for p in placed
    ]


def test_a_label_with_room_stands_to_the_right_of_its_dot_without_a_leader():
    (placed,) = place_labels([Label(50, 100, "a")], [Box(46, 96, 54, 104)], [], FRAME, 2)
    assert (placed.left, placed.baseline, placed.leader) == (59, 104, None)


def test_a_label_without_room_at_the_right_stands_to_the_left():
    (box,) = boxes([Label(280, 100, "mobilenet")], [])
    assert box.right == pytest.approx(271)


@pytest.mark.parametrize("count", [2, 5, 12])
def test_labels_of_dots_in_one_place_or_column_cover_no_other_and_no_dot(count):
    for spread in (0, 3, 9):
        labels = [Label(100, 100 + spread * i, f"name{i}") for i in range(count)]
        placed = boxes(labels, [])
        assert not any(a.overlaps(b) for a, b in combinations(placed, 2))
        assert not any(box.overlaps(dot(label)) for box in placed for label in labels)
        assert all(FRAME.contains(box) for box in placed)


def test_a_moved_label_has_a_leader():
    labels = [Label(100, 100, "first"), Label(108, 100, "second")]
    first, second = place_labels(labels, [dot(label) for label in labels], [], FRAME, 3)
    assert first.leader is None  # to the left
    assert first.left < 100 < second.left
    third = place_labels([*labels, Label(104, 100, "third")], [], [], FRAME, 3)[2]
    assert third.baseline - 4 == 100 + LINE
    assert third.leader == (third.left - 2, third.baseline - 4)


def test_a_label_avoids_an_interval_if_it_can():
    interval = Box(120, 90, 122, 160)
    (box,) = boxes([Label(100, 100, "mobilenet")], [interval])
    assert not box.overlaps(interval)


def test_no_place_is_said():
    labels = [Label(150, 100, "a name that is wider than half of its chart" * 2)]
    assert place_labels(labels, [dot(labels[0])], [], FRAME, 2) is None


def test_a_text_is_cut_only_if_it_is_too_wide():
    name = "a class of a long name"
    assert fitted(name, text_width(name)) == name
    cut = fitted(name, 80)
    assert cut.endswith("…")
    assert name.startswith(cut[:-1])
    assert 65 < text_width(cut) <= 80
    assert fitted("x", 1) == "x"
    assert text_width("図") >= text_width("W") > text_width("a") > text_width("i")
