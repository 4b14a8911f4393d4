"""The charts of the report: inline SVG with text as text and colours from the page's CSS.

Pure: numbers and labels in, SVG out. Each chart is 340 pixels wide, so a phone shows its text at
full size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf, log10

import numpy as np
from markupsafe import Markup

from pipeline.comparison.report.label_layout import Box, Label, fitted, place_labels, text_width

WIDTH = 340
LEFT, RIGHT, TOP = 52, WIDTH - 8, 8  # of a chart with two axes


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
    value = float(f"{value:.3g}")  # before the unit is chosen: 999900 -> 1 M
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return number(value / size) + letter
    return f"{value:.3g}"


def in_percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def in_points(value: float) -> str:
    return "0" if abs(value) < 1e-9 else f"{100 * value:+.4g}".replace("-", "\N{MINUS SIGN}")


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
    below: Sequence[str] = (),
) -> Markup:
    """A chart with an axis at the bottom and one at the left, and lines of text below it."""
    left_axis = [
        line(LEFT, y(v), right, y(v), "rule") + text(LEFT - 6, y(v) + 4, y.text(v), "", "end")
        for v in y.ticks
    ]
    bottom = bottom_axis(x, y.start, TOP, axis_title)
    lines = [
        text(12, y.start + 60 + 16 * i, fitted(content, right - 12), "label")
        for i, content in enumerate(below)
    ]
    height = y.start + (42 if not below else 52 + 16 * len(below))
    return svg(height, title, bottom, *left_axis, *parts, *lines, width=right + 8)


def interval_plot(
    rows: Sequence[tuple[str, float, float, float, str]],
    title: str,
    seeds: Mapping[str, Mapping[int, float]] | None = None,
) -> Markup:
    """One interval per row, around a vertical zero: (label, gain, low, high, text beside it).

    Args:
        seeds: by label, the gain of each seed, as a dot below the interval.
    """
    seeds = seeds or {}
    left, right, top = 12, WIDTH - 12, 6
    beside = all(text_width(label + note) + 16 < right - left for label, *_, note in rows)
    step = 44 if beside else 60  # with the label above the text if one is long
    bottom = top + step * len(rows)
    values = [0, *(bound for _, _, low, high, _ in rows for bound in (low, high))]
    values += [gain for of_seeds in seeds.values() for gain in of_seeds.values()]
    axis = linear_axis(values, left + 12, right - 12, in_points, 4)
    parts = [
        bottom_axis(axis, bottom, top, "points"),
        line(axis(0), top, axis(0), bottom, "zero"),
    ]
    for i, (label, gain, low, high, note) in enumerate(rows):
        y = top + step * (i + 1) - 14
        name = fitted(label, right - left)
        parts += [
            text(left, y - (13 if beside else 29), name, "label halo"),
            text(right, y - 13, note, "halo", "end"),
            line(axis(low), y, axis(high), y, "whisker distilled"),
            dot(axis(gain), y, "distilled", f"{label}: {note}"),
            *(
                dot(
                    axis(of_seed),
                    y + 9,
                    "distilled",
                    f"{label}, seed {seed}: {in_points(of_seed)}",
                    2,
                )
                for seed, of_seed in seeds.get(label, {}).items()
            ),
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


RADIUS = {"distilled": 4, "baseline": 6, "teacher": 4.5}  # pixels of a dot, by role


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Select the (cost, share) that no other matches in both, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, share in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or share > front[-1][1]:
            front.append((cost, share))
    return front


def scatter(points: Sequence[Point], title: str, axis_title: str) -> Markup:
    """Scatter plot of shares against a logarithmic cost, with the front as a staircase; empty
    without points."""
    if not points:
        return Markup()
    bottom = 220
    x = log_axis([p.x for p in points], LEFT, RIGHT, si)
    y = linear_axis([v for p in points for v in (p.low, p.high)], bottom, TOP, in_percent)
    stairs: list[tuple[float, float]] = []
    for cost, share in pareto_front((p.x, p.y) for p in points):
        stairs += [(x(cost), stairs[-1][1])] if stairs else []
        stairs.append((x(cost), y(share)))
    parts = [path([*stairs, (RIGHT, stairs[-1][1])], "front")]
    # A network's two trainings have one cost: the ring of a baseline is around or behind the dot.
    for p in sorted(points, key=lambda p: p.role != "baseline"):
        at, height = x(p.x), y(p.y)
        tooltip = f"{p.name}, {p.role}: {in_percent(p.y)}, {si(p.x)}"
        parts.append(line(at, y(p.low), at, y(p.high), f"whisker {p.role}"))
        parts.append(dot(at, height, p.role, tooltip, RADIUS.get(p.role, 4)))
    names, key = point_labels(points, x, y, bottom)
    return framed(x, y, title, axis_title, [*parts, *names], below=key)


def point_labels(
    points: Sequence[Point], x: Axis, y: Axis, bottom: float
) -> tuple[list[Markup], list[str]]:
    """Write each network's name beside its dot or, where that cannot be read, a number.

    Returns:
        The labels, and the key of the numbers by line.
    """
    named = [p for p in points if p.role != "baseline"]
    dots, lines = [], []
    for p in points:
        at, height, radius = x(p.x), y(p.y), RADIUS.get(p.role, 4)
        dots.append(Box(at - radius, height - radius, at + radius, height + radius))
        lines.append(Box(at - 1, y(p.high), at + 1, y(p.low)))
    frame = Box(LEFT + 2, TOP - 6, RIGHT + 6, bottom)

    def placed(texts: Sequence[str], steps: int):
        labels = [Label(x(p.x), y(p.y), text) for p, text in zip(named, texts, strict=True)]
        return place_labels(labels, dots, lines, frame, steps)

    key: list[str] = []
    labels = placed([p.name for p in named], 2)
    if labels is None:
        students = [p.name for p in named if p.role != "teacher"]
        numbers = {name: f"{i}" for i, name in enumerate(students, 1)}
        key = [f"{number}  {name}" for name, number in numbers.items()]
        labels = placed([numbers.get(p.name, p.name) for p in named], len(named) + 4) or []
    marks = []
    for p, label in zip(named, labels, strict=False):
        if label.leader is not None:
            marks.append(line(x(p.x), y(p.y), *label.leader, "leader"))
        marks.append(text(label.left, label.baseline, label.text, "label halo"))
    return marks, key


def curves(
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    x: Axis,
    y: Axis,
    title: str,
    axis_title: str,
    marked: Mapping[str, float] | None = None,
) -> Markup:
    """Curves: (role, values on the x-axis, values on the y-axis). Dots mark all points, or one of
    each curve.

    Args:
        marked: by role, the value on the x-axis of its one dot.
    """
    parts = []
    for role, across, heights in series:
        points = list(zip(across, heights, strict=True))
        parts.append(path([(x(value), y(height)) for value, height in points], f"curve {role}"))
        for value, height in points:
            if marked is not None and value != marked[role]:
                continue
            tooltip = f"{role}, {axis_title} {x.text(value)}: {y.text(height)}"
            parts.append(dot(x(value), y(height), role, tooltip, RADIUS[role]))
    return framed(x, y, title, axis_title, parts)


def epoch_axis(last: int) -> Axis:
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100) if last / s <= 7), 200)
    ticks = sorted({1, *range(step, last + 1, step)})
    return Axis(1, max(last, 2), LEFT + 4, RIGHT - 6, ticks, "{:g}".format)


def named_axis(names: Sequence[str]) -> Axis:
    """Equal steps from 0 with a name each."""
    count = len(names)
    return Axis(0, count - 1, LEFT + 16, RIGHT - 12, range(count), names.__getitem__)


def reliability_plot(models: Sequence[tuple[str, np.ndarray]], title: str) -> Markup:
    """Accuracy by confidence: (role, [bins, 3] count, confidence, accuracy).

    A dot's area is its bin's share of the samples; on the diagonal, accuracy equals confidence.
    """
    right, ticks = 272, [0, 0.25, 0.5, 0.75, 1]
    x = Axis(0, 1, LEFT + 10, right - 10, ticks, in_percent)  # apart from the other axis's 0 %
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
    names = [fitted(name, 150) for name, _, _ in rows]
    left = 12 + max(map(text_width, names))
    bottom = top + step * len(rows) + 2
    start, end = left + 22, WIDTH - 24
    axis = linear_axis([-largest, largest], start, end, in_points, 4 if end - start > 180 else 2)
    parts = [bottom_axis(axis, bottom, top, "points")]
    for i, ((label, value, note), name) in enumerate(zip(rows, names, strict=True)):
        y, start, end = top + step * i, *sorted((axis(0), axis(value)))
        role = "distilled" if value > 0 else "baseline"
        parts.append(text(left, y + 14, name, "", "end"))
        tooltip = f"{label}: {note}"
        parts.append(rectangle(start, y + 3, end - start, step - 6, tooltip, css=role))
    parts.append(line(axis(0), top, axis(0), bottom, "zero"))
    return svg(bottom + 42, title, *parts)


def heat_map(
    table: np.ndarray,
    names: Sequence[str],
    title: str,
    axes: tuple[str, str] = ("teacher", "distilled"),
) -> Markup:
    """Heat map of [C, C] counts, by the classes that two networks predict.

    The diagonal is grey, the rest in colour, by share of the largest.

    Args:
        axes: whose class a row is, and whose a column is.
    """
    size, small = (12, 11) if len(names) <= 12 else (10, 10)  # pixels of names and of numbers
    room = WIDTH - 30  # for the names at the left and the cells
    numbers = text_width(f"{table.max()}", small) + 3
    at_left = [fitted(name, min(150, max(70, room - numbers * len(names))), size) for name in names]
    left = 26 + max(text_width(name, size) for name in at_left)
    cell = (WIDTH - left - 4) / len(names)
    bottom = 4 + cell * len(names)
    # Below the cells: level, slanted, or upright where slanted lines of text would overlap.
    if max(text_width(name, size) for name in names) < cell - 4:
        angle, at_bottom = 0, list(names)
    else:
        angle = 45 if cell * 0.7 > size + 2 else 90
        longest = min(150, (left + cell / 2 - 4) / 0.71 if angle == 45 else 150)
        at_bottom = [fitted(name, longest, size) for name in names]
    long = max(text_width(name, size) for name in at_bottom)
    below = {0: 20, 45: 22 + 0.71 * long, 90: 14 + long}[angle]
    off = table - np.diag(table.diagonal())
    largest_off = max(4, off.max())  # so that one image is not in full colour
    upright = f"translate(12 {bottom / 2:.1f}) rotate(-90)"
    side = cell * len(names)
    parts = [
        rectangle(left, 4, side, side, title, css="same", fill_opacity="0.06"),
        text(0, 0, axes[0], "title", "middle", transform=upright),
        text(left + (WIDTH - left) / 2, bottom + below + 16, axes[1], "title", "middle"),
    ]
    for r, row in enumerate(table):
        y = 4 + cell * r
        middle = y + cell / 2 + size / 3
        parts.append(text(left - 6, middle, at_left[r], "", "end", style=f"font-size: {size}px"))
        for c, count in enumerate(row):
            if count == 0:
                continue
            largest = max(1, table.diagonal().max()) if r == c else largest_off
            style = {
                "css": "same" if r == c else "other",
                "fill_opacity": f"{0.12 + 0.38 * count / largest:.2f}",
            }
            x = left + cell * c
            tooltip = f"{axes[0]} {names[r]}, {axes[1]} {names[c]}: {count:,}"
            parts.append(rectangle(x + 0.5, y + 0.5, cell - 1, cell - 1, tooltip, **style))
            if cell >= text_width(f"{count}", small):
                style = f"font-size: {small}px"
                parts.append(text(x + cell / 2, middle, f"{count}", "cell", "middle", style=style))
    for c, label in enumerate(at_bottom):
        x, y = left + cell * (c + 0.5), bottom + 14
        if angle == 90:
            x, y = x + size / 3, bottom + 6
        turn = {"transform": f"rotate({-angle} {x:.1f} {y:.1f})"} if angle else {}
        anchor = "end" if angle else "middle"
        parts.append(text(x, y, label, "", anchor, style=f"font-size: {size}px", **turn))
    return svg(bottom + below + 24, title, *parts)
