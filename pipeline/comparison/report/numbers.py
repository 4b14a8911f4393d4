"""Numbers as text."""

from collections.abc import Iterable

from pipeline.comparison.measurement.latency import three_digits
from pipeline.comparison.report.charts import si


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def points(share: float) -> str:
    """A difference of shares, with its sign, in percentage points."""
    text = f"{100 * share:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "\N{MINUS SIGN}")


def percent_range(shares: Iterable[float]) -> str:
    """Shares as `97.49% to 98.33%`, or as one if both ends are equal."""
    ordered = [percent(share) for share in sorted(shares)]
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def p_text(p_value: float) -> str:
    if p_value < 0.001:
        return "p < 0.001"
    return f"p = {p_value:.4f}" if f"{p_value:.3f}" == "0.050" else f"p = {p_value:.3f}"


def whole(number: int) -> str:
    return f"{number:,}"


def si3(number: float) -> str:
    """As `si`, always with three digits: 17000000 -> 17.0 M"""
    return si(number, three_digits)


def millions(number: int) -> str:
    """`1814.1 M`; less than a million with its own unit: `450 k`"""
    return f"{number / 1e6:.1f} M" if number >= 1e6 else si3(number)


def compression(teachers: int | None, students: int) -> str:
    """The teacher's cost over the student's; `-` if one of them is unknown or 0."""
    return f"{teachers / students:.1f} x" if teachers and students else "-"


def fewer_or_more(teachers: int | None, students: int) -> str:
    """`16.0 x fewer` or `2.5 x more` than the teacher's; `-` if one is unknown or 0."""
    if not (teachers and students):
        return "-"
    ratio = teachers / students
    if f"{ratio:.1f}" == "1.0":
        return "as many"
    return f"{ratio:.1f} x fewer" if ratio > 1 else f"{1 / ratio:.1f} x more"


def duration(seconds: float) -> str:
    """`8.4 s`, `36 s`, `12 min`, `5.1 h`"""
    unit, size = next(
        ((unit, size) for unit, size in (("s", 1), ("min", 60)) if abs(seconds) < 120 * size),
        ("h", 3600),
    )
    value = seconds / size
    return f"{value:.1f} {unit}" if abs(value) < 9.95 else f"{value:,.0f} {unit}"


def points_of_one(images: int) -> str:
    """The points of accuracy that one of so many images is: 0.28 of 359."""
    return f"{100 / images:.2g}" if images > 1 else "100"


def join_and(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last
