"""The charts of the report: inline SVG with text as text and colours from the page's CSS.

Pure: numbers and labels in, SVG out; imports nothing of ours. Each chart is 340 pixels wide, so a
phone shows its text at full size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, log10

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
    steps: tuple[float, ...] = (1, 1.5, 2, 3, 4, 5, 7)
    for least, fewer in ((0.7, (1, 2, 5)), (1.2, (1, 3)), (2.2, (1,))):
        steps = fewer if decades > least else steps
    axis = Axis(low, high, start, end, [], text, log=True)
    ticks = [m * 10.0**p for p in powers for m in steps]
    room = 14  # pixels, of half a mark's text
    inside = [tick for tick in ticks if start + room <= axis(tick) <= end - room]
    return replace(axis, ticks=inside)


def si(value: float) -> str:
    """1200000 -> 1.2 M"""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def si3(value: float) -> str:
    """As `si`, always with three digits: 17000000 -> 17.0 M"""
    number, space, letter = si(value).partition(" ")
    size = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[letter]
    return f"{value / size:#.3g}".rstrip(".") + space + letter if letter else number


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


def left_axis(axis: Axis, x: float, right: float) -> Markup:
    return Markup().join(
        line(x, axis(v), right, axis(v), "rule") + text(x - 6, axis(v) + 4, axis.text(v), "", "end")
        for v in axis.ticks
    )


def framed(
    x: Axis, y: Axis, title: str, axis_title: str, parts: Sequence[Markup], right: float = RIGHT
) -> Markup:
    """A chart with an axis at the bottom and one at the left."""
    axes = bottom_axis(x, y.start, TOP, axis_title), left_axis(y, LEFT, right)
    return svg(y.start + 42, title, *axes, *parts, width=right + 8)


def interval_plot(
    rows: Sequence[tuple[str, float, float, float, str]], title: str, axis_title: str
) -> Markup:
    """One interval per row, around a vertical zero: (label, gain, low, high, text beside it)."""
    left, right, top, step = 12, WIDTH - 12, 6, 44
    bottom = top + step * len(rows)
    values = [0, *(bound for _, _, low, high, _ in rows for bound in (low, high))]
    axis = linear_axis(values, left + 12, right - 12, in_points, 4)
    parts = [
        bottom_axis(axis, bottom, top, axis_title),
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
    name: str  # shown beside it, where `named`
    role: str  # its CSS class
    x: float
    y: float
    low: float
    high: float
    named: bool


def scatter(
    points: Sequence[Point], front: Sequence[tuple[float, float]], title: str, axis_title: str
) -> Markup:
    """Scatter plot of shares against a logarithmic cost, with `front` as a staircase."""
    bottom = 220
    x = log_axis([p.x for p in points], LEFT, RIGHT, si)
    y = linear_axis([v for p in points for v in (p.low, p.high)], bottom, TOP, in_percent)
    stairs: list[tuple[float, float]] = []
    for cost, share in front:
        stairs += [(x(cost), stairs[-1][1])] if stairs else []
        stairs.append((x(cost), y(share)))
    parts, labels = [path([*stairs, (RIGHT, stairs[-1][1])], "front")], []
    for p in points:  # a network's two trainings have one cost: side by side
        at = x(p.x) + {"distilled": 3.5, "baseline": -3.5}.get(p.role, 0)
        tooltip = f"{p.name}, {p.role}: {in_percent(p.y)}, {si(p.x)}"
        parts.append(line(at, y(p.low), at, y(p.high), f"whisker {p.role}"))
        parts.append(dot(at, y(p.y), p.role, tooltip))
        if p.named:
            anchor = "start" if at + LETTER * len(p.name) + 12 < RIGHT else "end"
            labels.append((at + (9 if anchor == "start" else -12), y(p.y) + 4, p.name, anchor))
    for at, height, name, anchor in spread_labels(labels, bottom):
        parts.append(text(at, height, name, "label halo", anchor))
    return framed(x, y, title, axis_title, parts)


def spread_labels(labels: Sequence[tuple], bottom: float) -> list[tuple]:
    """Move labels (x, y, name, anchor) down until none overlaps another."""

    def extent(x: float, name: str, anchor: str) -> tuple[float, float]:
        length = LETTER * len(name)
        return (x, x + length) if anchor == "start" else (x - length, x)

    placed: list[tuple] = []
    for x, start, name, anchor in sorted(labels, key=lambda label: label[1]):
        y, (left, right) = start, extent(x, name, anchor)
        for other_x, other_y, *other in placed:
            other_left, other_right = extent(other_x, *other)
            if left < other_right and other_left < right and abs(y - other_y) < LINE:
                y = other_y + LINE
        placed.append((x, min(y, bottom - 4), name, anchor))
    return placed


def curves(series: Sequence[tuple[str, Sequence[int], Sequence[float]]], title: str) -> Markup:
    """Curves of shares by epoch: (role, epochs, shares). A dot marks the best epoch."""
    epochs = [epoch for _, xs, _ in series for epoch in xs]
    last = max(epochs)
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100) if last / s <= 7), 200)
    ticks = [1, *range(step, last + 1, step)] if step > 1 else list(range(1, last + 1))
    x = Axis(min(epochs), max(last, 2), LEFT + 4, RIGHT - 6, ticks, "{:g}".format)
    y = linear_axis([share for _, _, ys in series for share in ys], 180, TOP, in_percent)
    parts = []
    for role, xs, ys in series:
        at, best = max(zip(xs, ys, strict=True), key=lambda point: point[1])
        parts.append(path(zip(map(x, xs), map(y, ys), strict=True), f"curve {role}"))
        tooltip = f"{role}: best {in_percent(best)} at epoch {at}"
        parts.append(dot(x(at), y(best), role, tooltip, 4))
    return framed(x, y, title, "epoch", parts)


def levels(
    series: Sequence[tuple[str, Sequence[float]]],
    names: Sequence[str],
    limits: tuple[float, float],
    title: str,
    axis_title: str,
) -> Markup:
    """Shares at named levels, in equal steps: (role, a share for each name).

    Args:
        limits: of the axis, so that several charts have one scale.
    """
    x = Axis(0, len(names) - 1, LEFT + 16, RIGHT - 12, range(len(names)), names.__getitem__)
    y = linear_axis(limits, 180, TOP, in_percent)
    parts = []
    for role, shares in series:
        points = [(x(i), y(share)) for i, share in enumerate(shares)]
        parts.append(path(points, f"curve {role}"))
        for point, name, share in zip(points, names, shares, strict=True):
            parts.append(dot(*point, role, f"{role}, {name}: {in_percent(share)}", 4))
    return framed(x, y, title, axis_title, parts)


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
                f"{role}: {count:,.0f} images at {in_percent(confidence)} confidence, "
                f"{in_percent(accuracy)} correct"
            )
            at, height = x(confidence), y(accuracy)
            radius = max(3.0, 11 * (count / bins[:, 0].sum()) ** 0.5)
            parts.append(line(at, y(confidence), at, height, f"gap {role}"))
            parts.append(dot(at, height, f"{role} see-through", tooltip, radius))
    return framed(x, y, title, "confidence", parts, right)


def diverging_bars(
    rows: Sequence[tuple[str, float, str]], largest: float, title: str, axis_title: str
) -> Markup:
    """Horizontal bars left and right of zero, from (label, value, note).

    Args:
        largest: limit of the axis on both sides, so that several charts have one scale.
    """
    step, top = 19, 6
    names = [shortened(name, 14) for name, _, _ in rows]
    left = 12 + LETTER * max(len(name) for name in names)
    bottom = top + step * len(rows) + 2
    axis = linear_axis([-largest, largest], left + 22, WIDTH - 24, in_points, 4)
    parts = [bottom_axis(axis, bottom, top, axis_title)]
    for i, ((label, value, note), name) in enumerate(zip(rows, names, strict=True)):
        y, start, end = top + step * i, *sorted((axis(0), axis(value)))
        role = "distilled" if value > 0 else "baseline"
        parts.append(text(left, y + 14, name, "", "end"))
        tooltip = f"{label}: {note}"
        parts.append(rectangle(start, y + 3, end - start, step - 6, tooltip, css=role))
    parts.append(line(axis(0), top, axis(0), bottom, "zero"))
    return svg(bottom + 42, title, *parts)


def heat_map(
    table: np.ndarray, names: Sequence[str], title: str, row_title: str, column_title: str
) -> Markup:
    """Heat map of [C, C] counts: the diagonal grey, the rest in colour, by share of the largest."""
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
        text(0, 0, row_title, "title", "middle", transform=upright),
        text(left + (WIDTH - left) / 2, bottom + below + 16, column_title, "title", "middle"),
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
            tooltip = f"{row_title} {names[r]}, {column_title} {names[c]}: {count:,} images"
            parts.append(rectangle(x + 0.5, y + 0.5, cell - 1, cell - 1, tooltip, **style))
            if count and cell >= 8 * len(f"{count}"):
                parts.append(text(x + cell / 2, middle, f"{count}", "cell", "middle"))
    for c, label in enumerate(labels):
        x, y = left + cell * (c + 0.5), bottom + 14
        turn = {"transform": f"rotate(-45 {x:.1f} {y:.1f})"} if slanted else {}
        parts.append(text(x, y, label, "", "end" if slanted else "middle", **turn))
    return svg(bottom + below + 24, title, *parts)
