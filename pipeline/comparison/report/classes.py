"""The sections on classes and images: where students gain, and where they leave the teacher."""

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from pipeline.comparison.compare import Comparison, ModelMetrics, PairedDifference
from pipeline.comparison.metrics import confusion
from pipeline.comparison.report import charts
from pipeline.comparison.report.html import drawing, grid, picture, section, table
from pipeline.comparison.report.numbers import percent

MOST_CLASSES = 20  # that a heat map or bars show one by one
EXTREMES = 8  # with more classes: the largest gains and losses, and pairs of classes
EXAMPLES = 9  # images per student


def class_accuracy(comparison: Comparison) -> str:
    counts = np.bincount(comparison.labels, minlength=len(comparison.class_names))
    note = (
        "Accuracy of the distilled student minus that of its baseline, in points. To the right the "
        f"distilled student is better, to the left its baseline. A class has {counts.min():,} to "
        f"{counts.max():,} test images; one image is {100 / max(1, counts.max()):.2g} points or "
        "more."
    )
    if len(comparison.class_names) > MOST_CLASSES:
        note += (
            f" Shown are the {EXTREMES} classes with the largest gains and the {EXTREMES} with the "
            "smallest; class_accuracy.csv beside this page has all."
        )
    bars = {name: class_gains(gain, comparison) for name, gain in comparison.gains.items()}
    largest = max(0.01, *(abs(value) for rows in bars.values() for _, value, _ in rows))
    figures = [
        drawing(name, charts.diverging_bars(rows, largest, f"Gain of {name} by class", "points"))
        for name, rows in bars.items()
    ]
    return section("Accuracy by class", note, grid(figures))


def class_gains(gain: PairedDifference, comparison: Comparison) -> list[tuple[str, float, str]]:
    """Class, gain and both accuracies: of all classes, or of the extremes of many."""
    accuracies = zip(
        comparison.class_names,
        gain.first.class_accuracy,
        gain.second.class_accuracy,
        strict=True,
    )
    rows = [
        (name, float(distilled - baseline), f"{percent(distilled)} and {percent(baseline)}")
        for name, distilled, baseline in accuracies
        if not np.isnan(distilled)
    ]
    if len(rows) <= MOST_CLASSES:
        return rows
    rows.sort(key=lambda row: -row[1])
    return [*rows[:EXTREMES], *rows[-EXTREMES:]]


def agreement(comparison: Comparison) -> str:
    names, teacher = comparison.class_names, comparison.teacher
    figures = []
    for name, gain in comparison.gains.items():
        student = gain.first
        counts = confusion(teacher.decisions, student.decisions, len(names))
        both = (teacher.correct & student.correct).sum()
        note = (
            f"Both correct {both:,}, only the teacher {teacher.correct.sum() - both:,}, only the "
            f"student {student.correct.sum() - both:,}, neither "
            f"{(~teacher.correct & ~student.correct).sum():,}."
        )
        if len(names) <= MOST_CLASSES:
            content = charts.heat_map(counts, names, f"Teacher and {name}", "teacher", "distilled")
        else:
            content = frequent_disagreements(counts, names)
        figures.append(drawing(name, content, note))
    note = "Test images by the predictions of teacher and distilled student. On the diagonal they "
    return section("Agreement with the teacher by class", note + "agree.", grid(figures))


def frequent_disagreements(counts: np.ndarray, names: Sequence[str]) -> str:
    """A table of the most frequent pairs of classes, from [C, C] counts."""
    counts = counts - np.diag(counts.diagonal())
    largest = np.argsort(-counts, axis=None, kind="stable")[:EXTREMES]
    rows = [
        {"teacher": escape(names[r]), "distilled": escape(names[c]), "images": f"{counts[r, c]:,}"}
        for r, c in zip(*np.unravel_index(largest, counts.shape), strict=True)
        if counts[r, c]
    ]
    return table(rows, "dense") if rows else "<p>They agree on every test image.</p>"


def disagreements(comparison: Comparison, pixels_of: Callable[[int], np.ndarray]) -> str:
    cards = []
    for name, gain in comparison.gains.items():
        models = (comparison.teacher, gain.first, gain.second)
        decisions = np.stack([model.decisions for model in models])  # [3, N]
        (differing,) = np.nonzero((decisions != decisions[0]).any(0))
        order = differing[np.argsort(-gain.first.divergences[differing], kind="stable")]
        examples = [example(i, models, comparison, pixels_of) for i in order[:EXAMPLES]]
        count = f"{len(differing):,} of {len(comparison.labels):,} images"
        strip = f'<div class="strip">{"".join(examples)}</div>'
        cards.append(
            f'<div class="card"><h3>{escape(name)} <span class="muted">{count}</span></h3>'
            f"{strip if examples else '<p>They agree on every image.</p>'}</div>"
        )
    return section(
        "Test images on which they disagree",
        "Images for which teacher, distilled student and baseline do not all predict the same "
        "class, those with the student's largest KL divergence from the teacher first.",
        f'<div class="stack">{"".join(cards)}</div>',
    )


def example(
    i: int,
    models: Sequence[ModelMetrics],
    comparison: Comparison,
    pixels_of: Callable[[int], np.ndarray],
) -> str:
    """One test image with its label and the predictions."""

    def class_name(label: int) -> str:
        return escape(charts.shortened(comparison.class_names[label], 20))

    label = comparison.labels[i]
    predictions = "".join(
        f'{model.role} <span class="{"correct" if model.correct[i] else "wrong"}">'
        f"{class_name(model.decisions[i])} {'✓' if model.correct[i] else '✗'}</span><br>"
        for model in models
    )
    return (
        f"<figure>{picture(pixels_of(i), f'test image {i}, {comparison.class_names[label]}')}"
        f"<figcaption><b>{class_name(label)}</b><br>{predictions}</figcaption></figure>"
    )
