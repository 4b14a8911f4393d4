"""What the page says of classes and of single images follows from counting."""

import base64
import io
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from test_page import FOUR, invented

from pipeline.comparison.figures import class_table
from pipeline.comparison.report.classes import confusions, precision_and_recall
from pipeline.comparison.report.drawings import MOST_CLASSES
from pipeline.comparison.report.numbers import percent
from pipeline.comparison.report.page import picture
from pipeline.comparison.report.training_charts import number

FEW, MANY = invented(5, FOUR), invented(MOST_CLASSES + 10, ["solo"])


def counted(comparison, model) -> Counter:
    """The test images by the names of label and prediction."""
    names = comparison.class_names
    pairs = zip(comparison.labels, model.decisions, strict=True)
    return Counter((names[label], names[decision]) for label, decision in pairs)


def test_a_heat_map_has_the_images_of_each_label_and_prediction():
    shown = dict(confusions(FEW, MOST_CLASSES, 8))
    assert list(shown) == ["teacher", *FEW.gains]
    for model in (FEW.teacher, *(m for g in FEW.gains.values() for m in (g.first, g.second))):
        chart = shown[model.name][model.role]
        found = re.findall(r"<title>label (.*?), \w+ predicts (.*?): ([\d,]+)</title>", chart)
        unescaped = {(a, b): int(n) for a, b, n in found if "&" not in a + b}
        expected = {k: n for k, n in counted(FEW, model).items() if FEW.class_names[1] not in k}
        assert unescaped == expected
    assert set(shown["b"]) == {"distilled", "baseline"}


def test_of_many_classes_a_table_has_the_most_frequent_confusions_and_the_teachers_beside():
    (_, of_teacher), (_, shown) = confusions(MANY, MOST_CLASSES, 8)
    assert list(of_teacher["teacher"]) == ["label", "predicted", "images"]
    gain = MANY.gains["solo"]
    of_teacher = counted(MANY, MANY.teacher)
    for model in (gain.first, gain.second):
        counts = counted(MANY, model)
        rows = shown[model.role].to_dict("records")
        frequent = sorted((n for (a, b), n in counts.items() if a != b), reverse=True)
        assert [int(row["images"]) for row in rows] == frequent[:8]
        for row in rows:
            pair = row["label"], row["predicted"]
            assert int(row["images"]) == counts[pair]
            assert int(row["by the teacher"]) == of_teacher[pair]


def shares_of(comparison, model) -> tuple[dict, dict]:
    """Precision and recall by class, by counting; None for a class without any."""
    counts = counted(comparison, model)
    precision, recall = {}, {}
    for name in comparison.class_names:
        predicted = sum(n for (_, b), n in counts.items() if b == name)
        labelled = sum(n for (a, _), n in counts.items() if a == name)
        precision[name] = counts[name, name] / predicted if predicted else None
        recall[name] = counts[name, name] / labelled if labelled else None
    return precision, recall


@pytest.mark.parametrize("comparison", [FEW, MANY], ids=["few", "many"])
def test_precision_and_recall_are_those_of_counting_and_of_many_the_largest_differences(comparison):
    tables = precision_and_recall(comparison, MOST_CLASSES, 16)
    for student, gain in comparison.gains.items():
        table = tables[student].set_index("class")
        shares = {
            model.role: shares_of(comparison, model)
            for model in (gain.first, gain.second, comparison.teacher)
        }
        for role, (precision, recall) in shares.items():
            for name in table.index:
                assert table.loc[name, f"precision, {role}"] == percent(precision[name])
                assert table.loc[name, f"recall, {role}"] == percent(recall[name])
        if comparison is FEW:
            assert list(table.index) == list(FEW.class_names)
            continue
        differences = {
            name: max(
                abs(ours[name] - theirs[name])
                for ours, theirs in zip(shares["distilled"], shares["teacher"], strict=True)
                if None not in (ours[name], theirs[name])
            )
            for name in MANY.class_names
        }
        largest = sorted(differences.values(), reverse=True)[:16]
        assert [differences[name] for name in table.index] == pytest.approx(largest)


def test_the_table_of_classes_has_recall_and_precision_of_every_file():
    table = class_table(FEW).set_index("class")
    models = {"teacher": FEW.teacher, "baseline/b": FEW.gains["b"].second}
    for column, model in models.items():
        precision, recall = shares_of(FEW, model)
        assert table[column].to_dict() == pytest.approx(recall)
        assert table[f"{column}, precision"].to_dict() == pytest.approx(precision)


def decoded(markup: str) -> tuple[int, str, Image.Image]:
    """The width in CSS pixels, the kind and the image of an <img>."""
    width, kind, data = re.search(
        r'width="(\d+)".*?data:image/(\w+);base64,([^"]+)', markup
    ).groups()
    return int(width), kind, Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize(("size", "width"), [(8, 128), (28, 140), (32, 128), (48, 144)])
def test_a_small_image_is_shown_with_every_pixel_as_a_square_of_whole_pixels(size, width):
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size), np.uint8)
    shown, kind, image = decoded(picture(pixels, "an image"))
    assert (shown, kind) == (width, "png")
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1), pixels)


@pytest.mark.parametrize("size", [64, 144, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_image_is_shown_with_at_least_128_pixels_a_side_in_few_bytes(size, channels):
    pixels = np.full((channels, size, size), 99, np.uint8)
    shown, kind, image = decoded(picture(pixels, "an image"))
    assert (128 <= shown <= 144, kind) == (True, "jpeg")
    assert image.size == (min(size, 144),) * 2
    assert np.abs(np.asarray(image).astype(int) - 99).max() <= 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.05, "0.05"),
        (0.00015, "1.5e-4"),
        (0.00125, "1.25e-3"),
        (12.5, "12.5"),
        (2.0, "2"),
    ],
)
def test_numbers_beside_an_axis_are_short(value, text):
    assert number(value) == text
