"""The report: one self-contained HTML page, complete without network and scripts."""

import base64
import hashlib
import io
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline.comparison.compare import Comparison
from pipeline.comparison.example_images import THUMBNAIL
from pipeline.comparison.figures import Figures, models_table
from pipeline.comparison.measurement.corruptions import SEVERITIES, to_pillow
from pipeline.comparison.report import charts, drawings, tables
from pipeline.comparison.report.classes import confusions, precision_and_recall
from pipeline.comparison.report.costs import Costs, measured_sentence, speed_note
from pipeline.comparison.report.decision_card import TITLE, decision_card
from pipeline.comparison.report.int8_table import LARGEST_LOSS, LEAST_REDUCTION, int8_table
from pipeline.comparison.report.network_texts import network_texts
from pipeline.comparison.report.numbers import fewer_or_more, join_and, points_of_one, si3, whole
from pipeline.comparison.report.summary import sentences
from pipeline.comparison.report.training_charts import training_charts
from pipeline.runtime.errors import counted

HERE = Path(__file__).parent
VERSIONS = ("torch", "torchvision", "numpy", "h5py", "pillow")
SHOWN_SEVERITY = 5  # of the example images
SHOWN_IMAGES = 7  # of those on which the networks disagree, by student
SMALL = 64  # pixels a side of an image whose pixels are shown as squares
LEAST_WIDTH = 128  # CSS pixels of an image, on which its subject can be seen


def html_report(
    figures: Figures,
    comparison: Comparison,
    curves: pd.DataFrame,
    pixels_of: Callable[[int], np.ndarray],
    sample_ids: Sequence[str],
    corrupted: Mapping[str, np.ndarray],
    costs: Costs,
    params: Mapping[str, Any],
    fingerprints: Mapping[str, str],
) -> str:
    """Render the page.

    Args:
        curves: a row per epoch and training, as `results.read_training_curves` returns them.
        pixels_of: the pixels [C, H, W] uint8 of a test image, by its number.
        sample_ids: [N], of the test images: their paths, or their numbers in a packed source.
        corrupted: the pixels of one test image, by corruption.
        params: all of params.yaml.
        fingerprints: of the inputs, by their names.
    """
    num_classes = len(comparison.class_names)
    class_images = np.bincount(comparison.labels, minlength=num_classes)
    students = tables.students_table(figures).drop(columns="p")
    for column, cost in (("compression", "parameters"), ("fewer MACs", "macs")):
        teachers = getattr(figures.teacher, cost)
        students[column] = [
            fewer_or_more(teachers, getattr(student, cost)) for student in figures.students.values()
        ]
    differing = disagreements(comparison)
    shown = {sample for samples in differing.values() for sample in samples[:SHOWN_IMAGES]}
    script = (HERE / "sort_tables.js").read_text("utf-8")
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["with_code"] = with_code
    return environment.get_template("page.html").render(
        comparison=comparison,
        networks=network_texts(params, comparison),
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        card=decision_card(figures, costs.speed),
        card_title=TITLE,
        sentences=sentences(figures, comparison, costs),
        students=students,
        gain_and_cost=drawings.gain_and_cost(comparison, costs.speed),
        measured=measured_sentence(costs),
        speed=[
            (speed_note(speed, costs), tables.speed_table(speed)) for speed in costs.speed.values()
        ],
        int8=int8_table(comparison, costs.speed),
        int8_aims=f"at most {LARGEST_LOSS} points lost, at least {LEAST_REDUCTION} x smaller",
        cache=tables.cache_table(costs),
        training_charts=training_charts(curves),
        calibration=drawings.calibration(comparison),
        severities=join_and(map(str, SEVERITIES)),
        shown_severity=SHOWN_SEVERITY,
        under_corruption=drawings.under_corruption(comparison.robustness),
        robustness=tables.robustness_table(comparison),
        corrupted={tables.CORRUPTION_NAMES[name]: pixels for name, pixels in corrupted.items()},
        class_images=class_images,
        class_gains=drawings.class_gains(comparison),
        many_classes=num_classes > drawings.MOST_CLASSES,
        only_extremes=np.count_nonzero(class_images) > drawings.MOST_CLASSES,
        points_of_one=points_of_one,
        extremes=drawings.EXTREMES,
        confusions=confusions(comparison, drawings.MOST_CLASSES, drawings.EXTREMES),
        precision_and_recall=precision_and_recall(
            comparison, drawings.MOST_CLASSES, 2 * drawings.EXTREMES
        ),
        agreement=agreement(comparison),
        heat_map=charts.heat_map,
        disagreements_table=tables.disagreements_table,
        disagreements=differing,
        shown_images=SHOWN_IMAGES,
        # Copies: jinja2 keeps what it renders until the next garbage collection, files included.
        pixels={sample: np.array(pixels_of(sample)) for sample in shown},
        picture=picture,
        sample_ids=sample_ids,
        pairs=tables.pairs_table(comparison),
        metrics=tables.metrics_table(models_table(comparison), si3).drop(columns="robust"),
        facts={
            **{f"{name} fingerprint": value for name, value in fingerprints.items()},
            "Python": platform.python_version(),
            **{name: version(name) for name in VERSIONS},
        },
        params=yaml.safe_dump(dict(params), sort_keys=False, allow_unicode=True),
        whole=whole,
        counted=counted,
    )


def agreement(comparison: Comparison) -> list[tuple[str, np.ndarray, str]]:
    """By student, [C, C] counts of the predictions of the teacher and its own, and a caption."""
    from sklearn.metrics import confusion_matrix  # noqa: PLC0415  (see `compare.py`)

    teacher, classes = comparison.teacher, range(len(comparison.class_names))
    rows = []
    for name, gain in comparison.gains.items():
        student = gain.first
        counts = confusion_matrix(teacher.decisions, student.decisions, labels=classes)
        (neither, only_student), (only_teacher, both) = confusion_matrix(
            teacher.correct, student.correct, labels=(False, True)
        )
        caption = (
            f"Both correct {both:,}, only the teacher {only_teacher:,}, only the student "
            f"{only_student:,}, neither {neither:,}."
        )
        rows.append((name, counts, caption))
    return rows


def disagreements(comparison: Comparison) -> dict[str, list[int]]:
    """By student, the test images on which not all of teacher, student and baseline agree.

    Those with the student's largest divergence from the teacher first.
    """
    images = {}
    for name, gain in comparison.gains.items():
        models = (comparison.teacher, gain.first, gain.second)
        decisions = np.stack([model.decisions for model in models])  # [3, N]
        (differing,) = np.nonzero((decisions != decisions[0]).any(0))
        order = np.argsort(-gain.first.divergences[differing], kind="stable")
        images[name] = differing[order].tolist()
    return images


def with_code(text: str) -> Markup:
    """Escape a text, and show what it has in backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def picture(pixels: np.ndarray, title: str) -> Markup:
    """An inline image from pixels [C, H, W] uint8: a small one enlarged by a whole number, with
    sharp edges, a large one as a JPEG."""
    image = to_pillow(np.asarray(pixels))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    is_small = max(image.size) < SMALL
    kind, options = ("png", {}) if is_small else ("jpeg", {"quality": 88})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    width = image.width * (ceil(LEAST_WIDTH / max(image.size)) if is_small else 1)
    return Markup('<img class="{}" width="{}" alt="{}" src="data:image/{};base64,{}">').format(
        "" if is_small else "smooth",
        max(width, LEAST_WIDTH),
        title,
        kind,
        base64.b64encode(buffer.getvalue()).decode(),
    )
