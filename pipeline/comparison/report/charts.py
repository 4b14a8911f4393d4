"""The charts of the report: inline SVG with text as text and colours from the page's CSS.

Pure: numbers and labels in, SVG out; imports nothing of ours. Each chart is 340 pixels wide, so a
phone shows its text at full size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf, log10
from operator import itemgetter

import numpy as np
from markupsafe import Markup

WIDTH = 340
LETTER = 6.6  # pixels, about, of 12-pixel text
LINE = 14  # pixels between labels
LEFT, RIGHT, TOP = 44, WIDTH - 8, 8  # of a chart with two axes


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels, with its ticks."""

    low: float
    high: float
    start: float  # pixels
    end: float
    ticks: Sequence[float]
    text: Callable[[float], str]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def linear_axis(
    values: Sequence[float], start: float, end: float, text: Callable[[float], str], count: int = 5
) -> Axis:
    """A linear axis over all values, with about `count` round ticks."""
    low, high = float(min(values)), float(max(values))
    if high - low < 1e-9:
        low, high = low - 0.01, high + 0.01
    rough = (high - low) / count
    power = 10 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough - 1e-12)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    ticks = [round(i * step, 10) for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], start, end, ticks, text)


def log_axis(values: Sequence[float], start: float, end: float, text: Callable) -> Axis:
    """A logarithmic axis over all values; with more powers of ten, fewer ticks in each."""
    low, high = min(values) / 1.6, max(values) * 1.6
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    decades = log10(high / low)
    steps = ((0.7, (1, 1.5, 2, 3, 4, 5, 7)), (1.2, (1, 2, 5)), (2.2, (1, 3)), (inf, (1,)))
    multiples = next(multiples for most, multiples in steps if decades <= most)
    axis = Axis(low, high, start, end, [], text, log=True)
    ticks = [m * 10.0**p for p in powers for m in multiples]
    room = 14  # pixels, of half a mark's text
    return replace(axis, ticks=[tick for tick in ticks if start + room <= axis(tick) <= end - room])


def si(value: float, number: Callable[[float], str] = "{:.3g}".format) -> str:
    """1200000 -> 1.2 M"""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return number(value / size) + letter
    return f"{value:.3g}"


def in_percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def in_points(value: float) -> str:
    return "0" if abs(value) < 1e-9 else f"{100 * value:+.4g}".replace("-", "\N{MINUS SIGN}")


def shortened(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def element(tag: str, content: str | Markup = "", **attributes: object) -> Markup:
    """An element of SVG; text is escaped.

    Args:
        attributes: `css` is the class, `_` in a name stands for `-`. Numbers are in pixels, with
            one decimal.
    """
    pairs = [
        Markup(' {}="{}"').format(
            "class" if name == "css" else name.replace("_", "-"),
            f"{value:.1f}" if isinstance(value, int | float) else value,
        )
        for name, value in attributes.items()
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(tag, Markup().join(pairs), content)


def svg(height: float, title: str, *parts: Markup, width: float = WIDTH) -> Markup:
    """An SVG with a name for screen readers."""
    box = f"0 0 {width:g} {height:g}"
    return element("svg", Markup().join(parts), viewBox=box, role="img", aria_label=title)


def text(x: float, y: float, content: str, css: str = "", anchor: str = "start", **more) -> Markup:
    return element("text", content, x=x, y=y, css=css, text_anchor=anchor, **more)


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, css=css)


def path(points: Iterable[tuple[float, float]], css: str) -> Markup:
    return element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), css=css)


def dot(x: float, y: float, css: str, title: str, radius: float = 4.5) -> Markup:
    return element("circle", element("title", title), cx=x, cy=y, r=radius, css=css)


def rectangle(x: float, y: float, width: float, height: float, title: str, **more) -> Markup:
    title = element("title", title)
    return element("rect", title, x=x, y=y, width=width, height=height, **more)


def bottom_axis(axis: Axis, y: float, top: float, title: str) -> Markup:
    marks = [
        line(axis(v), top, axis(v), y, "rule") + text(axis(v), y + 16, axis.text(v), "", "middle")
        for v in axis.ticks
    ]
    name = text((axis.start + axis.end) / 2, y + 34, title, "title", "middle")
    return Markup().join([*marks, name])


def framed(
    x: Axis,
    y: Axis,
    title: str,
    axis_title: str,
    parts: Sequence[Markup],
    right: float = RIGHT,
    left: float = LEFT,
) -> Markup:
    """A chart with an axis at the bottom and one at the left."""
    left_axis = [
        line(left, y(v), right, y(v), "rule") + text(left - 6, y(v) + 4, y.text(v), "", "end")
        for v in y.ticks
    ]
    bottom = bottom_axis(x, y.start, TOP, axis_title)
    return svg(y.start + 42, title, bottom, *left_axis, *parts, width=right + 8)


def interval_plot(rows: Sequence[tuple[str, float, float, float, str]], title: str) -> Markup:
    """One interval per row, around a vertical zero: (label, gain, low, high, text beside it)."""
    left, right, top, step = 12, WIDTH - 12, 6, 44
    bottom = top + step * len(rows)
    values = [0, *(bound for _, _, low, high, _ in rows for bound in (low, high))]
    axis = linear_axis(values, left + 12, right - 12, in_points, 4)
    parts = [
        bottom_axis(axis, bottom, top, "points"),
        line(axis(0), top, axis(0), bottom, "zero"),
    ]
    for i, (label, gain, low, high, note) in enumerate(rows):
        y = top + step * i + 30
        parts += [
            text(left, y - 13, label, "label halo"),
            text(right, y - 13, note, "halo", "end"),
            line(axis(low), y, axis(high), y, "whisker distilled"),
            dot(axis(gain), y, "distilled", f"{label}: {note}"),
        ]
    return svg(bottom + 42, title, *parts)


@dataclass(frozen=True)
class Point:
    name: str  # shown beside it; a baseline's is its student's
    role: str  # its CSS class
    x: float
    y: float
    low: float
    high: float


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Select the (cost, share) that no other matches in both, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, share in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or share > front[-1][1]:
            front.append((cost, share))
    return front


def scatter(points: Sequence[Point], title: str, axis_title: str) -> Markup:
    """Scatter plot of shares against a logarithmic cost, with the front as a staircase."""
    bottom = 220
    x = log_axis([p.x for p in points], LEFT, RIGHT, si)
    y = linear_axis([v for p in points for v in (p.low, p.high)], bottom, TOP, in_percent)
    stairs: list[tuple[float, float]] = []
    for cost, share in pareto_front((p.x, p.y) for p in points):
        stairs += [(x(cost), stairs[-1][1])] if stairs else []
        stairs.append((x(cost), y(share)))
    parts, labels = [path([*stairs, (RIGHT, stairs[-1][1])], "front")], []
    for p in points:  # a network's two trainings have one cost: side by side
        at = x(p.x) + {"distilled": 3.5, "baseline": -3.5}.get(p.role, 0)
        tooltip = f"{p.name}, {p.role}: {in_percent(p.y)}, {si(p.x)}"
        parts.append(line(at, y(p.low), at, y(p.high), f"whisker {p.role}"))
        parts.append(dot(at, y(p.y), p.role, tooltip))
        if p.role != "baseline":
            anchor = "start" if at + LETTER * len(p.name) + 12 < RIGHT else "end"
            labels.append((at + (9 if anchor == "start" else -12), y(p.y) + 4, p.name, anchor))
    for at, height, name, anchor in spread_labels(labels, bottom):
        parts.append(text(at, height, name, "label halo", anchor))
    return framed(x, y, title, axis_title, parts)


def spread_labels(labels: Sequence[tuple], bottom: float) -> list[tuple]:
    """Move labels (x, y, name, anchor) down until none overlaps another."""
    placed: list[tuple] = []
    extents: list[tuple[float, float, float]] = []  # left, right, y
    for x, start, name, anchor in sorted(labels, key=itemgetter(1)):
        y, length = start, LETTER * len(name)
        left = x if anchor == "start" else x - length
        for other_left, other_right, other_y in extents:
            if left < other_right and other_left < left + length and abs(y - other_y) < LINE:
                y = other_y + LINE
        placed.append((x, min(y, bottom - 4), name, anchor))
        extents.append((left, left + length, placed[-1][1]))
    return placed


def curves(
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    x: Axis,
    y: Axis,
    title: str,
    axis_title: str,
    marked: Mapping[str, float] | None = None,
    left: float = LEFT,
) -> Markup:
    """Curves: (role, values on the x-axis, values on the y-axis). Dots mark all points, or one of
    each curve.

    Args:
        marked: by role, the value on the x-axis of its one dot.
        left: pixels, where the x-axis begins; to its left are the y-axis's numbers.
    """
    parts = []
    for role, across, heights in series:
        points = list(zip(across, heights, strict=True))
        parts.append(path([(x(value), y(height)) for value, height in points], f"curve {role}"))
        for value, height in points:
            if marked is not None and value != marked[role]:
                continue
            tooltip = f"{role}, {axis_title} {x.text(value)}: {y.text(height)}"
            parts.append(dot(x(value), y(height), role, tooltip, 4))
    return framed(x, y, title, axis_title, parts, left=left)


def epoch_axis(last: int, left: float = LEFT) -> Axis:
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100) if last / s <= 7), 200)
    ticks = sorted({1, *range(step, last + 1, step)})
    return Axis(1, max(last, 2), left + 4, RIGHT - 6, ticks, "{:g}".format)


def named_axis(names: Sequence[str]) -> Axis:
    """Equal steps from 0 with a name each."""
    count = len(names)
    return Axis(0, count - 1, LEFT + 16, RIGHT - 12, range(count), names.__getitem__)


def reliability_plot(models: Sequence[tuple[str, np.ndarray]], title: str) -> Markup:
    """Accuracy by confidence: (role, [bins, 3] count, confidence, accuracy).

    A dot's area is its bin's share of the samples; on the diagonal, accuracy equals confidence.
    """
    right, ticks = 272, [0, 0.25, 0.5, 0.75, 1]
    x = Axis(0, 1, LEFT, right - 10, ticks, in_percent)
    y = Axis(0, 1, 236, TOP + 10, ticks, in_percent)
    parts = [line(x(0), y(0), x(1), y(1), "diagonal")]
    for role, bins in models:
        for count, confidence, accuracy in bins[bins[:, 0] > 0]:
            tooltip = (
                f"{role}: confidence {in_percent(confidence)}, correct {in_percent(accuracy)}, "
                f"images: {count:,.0f}"
            )
            at, height = x(confidence), y(accuracy)
            radius = max(3.0, 11 * (count / bins[:, 0].sum()) ** 0.5)
            parts.append(line(at, y(confidence), at, height, f"gap {role}"))
            parts.append(dot(at, height, f"{role} see-through", tooltip, radius))
    return framed(x, y, title, "confidence", parts, right)


def diverging_bars(rows: Sequence[tuple[str, float, str]], largest: float, title: str) -> Markup:
    """Horizontal bars left and right of zero, from (label, value, note).

    Args:
        largest: limit of the axis on both sides, so that several charts have one scale.
    """
    step, top = 19, 6
    names = [shortened(name, 14) for name, _, _ in rows]
    left = 12 + LETTER * max(len(name) for name in names)
    bottom = top + step * len(rows) + 2
    axis = linear_axis([-largest, largest], left + 22, WIDTH - 24, in_points, 4)
    parts = [bottom_axis(axis, bottom, top, "points")]
    for i, ((label, value, note), name) in enumerate(zip(rows, names, strict=True)):
        y, start, end = top + step * i, *sorted((axis(0), axis(value)))
        role = "distilled" if value > 0 else "baseline"
        parts.append(text(left, y + 14, name, "", "end"))
        tooltip = f"{label}: {note}"
        parts.append(rectangle(start, y + 3, end - start, step - 6, tooltip, css=role))
    parts.append(line(axis(0), top, axis(0), bottom, "zero"))
    return svg(bottom + 42, title, *parts)


def heat_map(table: np.ndarray, names: Sequence[str], title: str) -> Markup:
    """Heat map of [C, C] counts by the teacher's and the distilled student's class.

    The diagonal is grey, the rest in colour, by share of the largest.
    """
    labels = [shortened(name, 10) for name in names]
    long = max(len(label) for label in labels)
    left = 26 + LETTER * long
    slanted = long > 2
    below = 20 + (0.75 * LETTER * long if slanted else 0)
    cell = (WIDTH - left - 4) / len(names)
    bottom = 4 + cell * len(names)
    off = table - np.diag(table.diagonal())
    largest_off = max(4, off.max())  # so that one image is not in full colour
    upright = f"translate(12 {bottom / 2:.1f}) rotate(-90)"
    parts = [
        text(0, 0, "teacher", "title", "middle", transform=upright),
        text(left + (WIDTH - left) / 2, bottom + below + 16, "distilled", "title", "middle"),
    ]
    for r, row in enumerate(table):
        y = 4 + cell * r
        middle = y + cell / 2 + 4
        parts.append(text(left - 6, middle, labels[r], "", "end"))
        for c, count in enumerate(row):
            largest = max(1, table.diagonal().max()) if r == c else largest_off
            style = {
                "css": "other" if r != c and count else "same",
                "fill_opacity": f"{0.06 if count == 0 else 0.12 + 0.48 * count / largest:.2f}",
            }
            x = left + cell * c
            tooltip = f"teacher {names[r]}, distilled {names[c]}: {count:,}"
            parts.append(rectangle(x + 0.5, y + 0.5, cell - 1, cell - 1, tooltip, **style))
            if count and cell >= 8 * len(f"{count}"):
                parts.append(text(x + cell / 2, middle, f"{count}", "cell", "middle"))
    for c, label in enumerate(labels):
        x, y = left + cell * (c + 0.5), bottom + 14
        turn = {"transform": f"rotate(-45 {x:.1f} {y:.1f})"} if slanted else {}
        parts.append(text(x, y, label, "", "end" if slanted else "middle", **turn))
    return svg(bottom + below + 24, title, *parts)
