"""The HTML parts of the report: sections, cards, tables, figures and pictures."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

THUMBNAIL = 144  # pixels a side at most


def legend(*roles: str) -> str:
    marks = (f'<span class="{role}"><i></i><b>{role}</b></span>' for role in roles)
    return f'<div class="legend">{"".join(marks)}</div>'


LEGEND = legend("distilled", "baseline", "teacher")
LEGEND_OF_TWO = legend("distilled", "baseline")


def section(title: str, note: str, *content: str) -> str:
    paragraph = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{''.join(content)}</section>"


def paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def card(content: str, css_class: str = "") -> str:
    return f'<div class="card {css_class}">{content}</div>'


def drawing(title: str, content: str, note: str = "") -> str:
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<figure class="card"><h3>{escape(title)}</h3>{content}{caption}</figure>'


def grid(figures: Iterable[str], css_class: str = "") -> str:
    return f'<div class="grid {css_class}">{"".join(figures)}</div>'


def table(rows: Sequence[Mapping[str, str]], css_class: str = "") -> str:
    """An HTML table of rows by column title; cells are HTML. On a phone each row is a list."""
    head = "".join(f"<th>{escape(title)}</th>" for title in rows[0])
    lines = (
        "".join(
            f'<td data-label="{escape(title)}"><span>{cell}</span></td>'
            for title, cell in row.items()
        )
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="{css_class}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def plain_table(rows: Sequence[Mapping[str, str]]) -> str:
    """An HTML table whose cells are text."""
    return table([{title: escape(cell) for title, cell in row.items()} for row in rows])


def interval(low: str, high: str) -> str:
    return f"<small>{low} to {high}</small>"


def picture(pixels: np.ndarray, title: str) -> str:
    """An inline image from pixels [C, H, W] uint8."""
    planes = np.asarray(pixels).transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(planes[..., 0] if len(pixels) == 1 else planes))
    if max(image.size) > THUMBNAIL:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return (
        f'<img class="{"" if max(image.size) < 64 else "smooth"}" alt="{escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )
