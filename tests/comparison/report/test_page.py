"""The report needs no network, draws its figures, and fits a phone."""

import re
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, Page, browser

from pipeline.comparison.cache_economics import Economics
from pipeline.comparison.compare import Comparison, Predictions, compare
from pipeline.comparison.figures import Figures, headline_figures
from pipeline.comparison.measurement.corruptions import CORRUPTIONS, SEVERITIES
from pipeline.comparison.measurement.latency import DeviceSpeed, NetworkSpeed, Speeds
from pipeline.comparison.report import charts
from pipeline.comparison.report.costs import Costs
from pipeline.comparison.report.drawings import MOST_CLASSES
from pipeline.comparison.report.markdown import markdown
from pipeline.comparison.report.numbers import fewer_or_more
from pipeline.comparison.report.page import html_report
from pipeline.comparison.robustness import CorruptionPredictions, compare_robustness
from pipeline.stages.speed import devices

HOSTILE = "</style><script src='https://example.org/x.js'></script>&"


def invented(num_classes: int, students: list[str], count: int = 300) -> Comparison:
    """Compare networks of different size and accuracy, with long and hostile class names."""
    rng = np.random.default_rng(0)
    labels = {name: rng.integers(0, num_classes, count) for name in ("validation", "test")}
    names = [f"a class of a long name {i}" for i in range(num_classes)]
    names[1] = HOSTILE

    def predictions(name: str, role: str, skill: float, parameters: int) -> Predictions:
        logits = {}
        for split, classes in labels.items():
            logits[split] = rng.normal(0, 1, (count, num_classes)).astype(np.float32)
            logits[split][np.arange(count), classes] += skill
        costs = {"parameters": parameters, "macs": 9 * parameters, "size_bytes": 4 * parameters}
        return Predictions(name, role, **logits, **costs)

    def corrupted(seed: int) -> CorruptionPredictions:
        shape = (len(CORRUPTIONS), len(SEVERITIES), count)
        chosen = np.random.default_rng(seed).integers(0, num_classes, shape)
        return CorruptionPredictions(
            labels["test"], np.where(chosen > 1, chosen, labels["test"]), 16
        )

    robustness = compare_robustness(
        None if len(students) == 1 else corrupted(0),  # a teacher without a network
        {name: (corrupted(1), corrupted(2 + i)) for i, name in enumerate(students)},
        labels["test"],
    )
    teacher = predictions("teacher", "teacher", 4, 20_000_000)
    pairs = {
        name: (
            predictions(name, "distilled", 2 + i % 3, 50_000 * 3**i),
            predictions(name, "baseline", 1.5 + i % 4, 50_000 * 3**i),
        )
        for i, name in enumerate(students)
    }
    return compare(teacher, pairs, labels, names, robustness)


def costs_of(comparison: Comparison, *devices: str) -> Costs:
    """Times in proportion to the networks' sizes."""

    def speed(model) -> NetworkSpeed:
        latency = model.parameters / 1e6
        figures = {"latency_ms": latency, "latency_p95_ms": 1.5 * latency}
        if model.role == "distilled":
            ratio = comparison.teacher.parameters / model.parameters
            figures |= {"speedup": ratio, "speedup_low": 0.9 * ratio, "speedup_high": 1.1 * ratio}
        return NetworkSpeed(images_per_second=1000 / latency, **figures)

    measured = DeviceSpeed(
        name="A processor of a long name, 8275CL at 3.00 GHz",
        cores=4,
        threads=2,
        system="Linux x86_64",
        torch="2.15.0",
        batch_size=64,
        teacher=speed(comparison.teacher),
        students={name: speed(gain.first) for name, gain in comparison.gains.items()},
    )
    images = {"views": 8, "training_images": 45_000, "held_out_images": 15_000}
    epochs = dict.fromkeys(comparison.gains, 240)
    economics = Economics(**images, epochs=epochs, bytes_per_row=200.3)
    machine = Speeds(cpu=measured).machine
    return Costs(dict.fromkeys(devices, measured), machine, machine, economics)


def figures_of(comparison: Comparison, costs: Costs) -> Figures:
    return headline_figures(comparison, costs.economics, dict.fromkeys(comparison.gains, (9, 9)))


def page_of(comparison: Comparison, costs: Costs, size: int, channels: int = 3) -> str:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(comparison.labels), channels, size, size), np.uint8)
    trainings = [
        ("teacher", "teacher"),
        *product(comparison.gains, ("distilled", "baseline")),
    ]
    curves = pd.DataFrame(
        [
            {
                "student": name,
                "role": role,
                "epoch": epoch,
                "train_loss": 10.0 ** (2 - epoch / 10),
                "learning_rate": 0.00025 * (1 - epoch / 40),
                "validation_accuracy": 1 - 0.9**epoch,
                "validation_nll": 2 * 0.95**epoch,
                "kept": epoch == 40,
            }
            for name, role in trainings
            for epoch in range(1, 41)
        ]
    )
    corrupted = dict.fromkeys(CORRUPTIONS, images[0])
    figures = figures_of(comparison, costs)
    of_run = {"students": {name: {} for name in comparison.gains}}, {"dataset": "ab" * 32}
    return html_report(figures, comparison, curves, images.__getitem__, corrupted, costs, *of_run)


FOUR = ["mobilenet-v2-half", "resnet8", "b", "a_student_of_a_long_name"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, finished_project: Path) -> dict[str, Path]:
    """Reports of a real run, of few classes and four students, of many classes and one student."""
    paths = {name: tmp_path_factory.mktemp("pages") / "index.html" for name in ("few", "many")}
    few, many = invented(5, FOUR), invented(MOST_CLASSES + 10, ["solo"])
    few_page = page_of(few, costs_of(few, "cpu", "cuda"), size=16, channels=1)
    paths["few"].write_text(few_page, "utf-8")
    paths["many"].write_text(page_of(many, costs_of(many, "cpu"), size=200), "utf-8")
    return paths | {"real": finished_project / "reports/index.html"}


NAMES = ("real", "few", "many")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_self_contained_and_has_no_script(pages, name):
    page = pages[name].read_text("utf-8")
    assert not re.search(r"<(script|link|iframe|object)\b", page)
    assert set(re.findall(r'\b(?:src|href)="([^"]{,11})', page)) <= {"data:image/"}
    assert "url(" not in page
    assert "@import" not in page


@pytest.mark.parametrize(
    ("name", "students", "devices"), [("real", 1, len(devices())), ("few", 4, 2), ("many", 1, 1)]
)
def test_every_chart_is_drawn_well_formed_and_named(pages, name, students, devices):
    page = pages[name].read_text("utf-8")
    charts_of_students = 8 - (name == "many")  # which has tables instead of heat maps

    drawings = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    charts_of_the_teacher = 6
    assert len(drawings) == 3 + devices + charts_of_the_teacher + charts_of_students * students
    for drawing in drawings:
        assert ElementTree.fromstring(drawing).attrib["aria-label"]
        assert "nan" not in drawing


@pytest.mark.parametrize(
    ("name", "lines", "rows"), [("few", 4 * 3, 1 + 2 * 4), ("many", 2, 2), ("real", 3, 1 + 2)]
)
def test_accuracy_under_corruption_is_shown_for_each_network_that_was_measured(
    pages, name, lines, rows
):
    page = pages[name].read_text("utf-8")
    text = page.partition("<h2>Under corruption</h2>")[2].partition("</section>")[0]
    assert text.count("<polyline") == lines
    assert text.count("<img") == len(CORRUPTIONS)
    assert text.count("<tr>") == 1 + rows


def test_of_many_classes_only_the_extremes_are_drawn(pages):
    page = pages["many"].read_text("utf-8")
    assert "class_accuracy.csv" in page
    bars = re.search(r'aria-label="Gain of solo by class".*?</svg>', page, re.DOTALL)[0]
    assert bars.count("<rect") == 16


def test_all_disagreements_are_counted_and_the_largest_are_shown(pages):
    comparison = invented(5, FOUR)
    page = pages["few"].read_text("utf-8")
    teacher = comparison.teacher
    for name, gain in comparison.gains.items():
        decisions = [model.decisions.tolist() for model in (teacher, gain.first, gain.second)]
        differ = sum(len(set(of_image)) > 1 for of_image in zip(*decisions, strict=True))
        assert f'{name} <span class="muted">{differ:,} of 300 images' in page
    strips = page.partition("on which they disagree</h2>")[2]
    assert strips.count("<img") == 4 * 9


def words_of(page: str) -> str:
    """The text of a page, without its markup."""
    text = re.sub(r"<(style|pre|svg)\b.*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)
    return " ".join(text.replace("&#39;", "'").split())


ONE = "student|pair|image|class|thread|core|step|epoch|pass|parameter"


@pytest.mark.parametrize("name", NAMES)
def test_one_is_followed_by_a_singular_and_every_other_number_by_a_plural(pages, name):
    text = words_of(pages[name].read_text("utf-8"))
    number = r"(?<![\d.,])(\d[\d,]*) (?:test |teacher |optimiser )?"
    singular = set(re.findall(rf"{number}(?:{ONE})\b", text))
    plural = set(re.findall(rf"{number}(?:{ONE})(?:e?s)\b", text))
    assert singular <= {"1"}
    assert plural
    assert "1" not in plural


def test_the_recommendation_names_its_set_and_compares_with_the_teacher_on_every_page(pages):
    for name in NAMES:
        text = words_of(pages[name].read_text("utf-8"))
        sentence = text.partition("To ship: ")[2].partition("The teacher has")[0]
        assert "Of the students and baselines it is the " in sentence
        assert re.search(r"(?:accurate than|difference from) the teacher \(\d+\.\d\d%\)", sentence)
        assert "chosen by these images" in text


@pytest.mark.parametrize(
    ("teachers", "students", "text"),
    [(100, 10, "10.0 x fewer"), (10, 100, "10.0 x more"), (100, 99, "as many"), (None, 9, "-")],
)
def test_a_student_larger_than_its_teacher_is_not_said_to_have_fewer(teachers, students, text):
    assert fewer_or_more(teachers, students) == text


def test_the_markdown_has_the_sentences_and_one_row_per_student_and_model():
    comparison = invented(5, FOUR)
    costs = costs_of(comparison, "cpu")
    text = markdown(figures_of(comparison, costs), comparison, costs)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert [len(table.splitlines()) - 2 for table in tables] == [4, 5, 3, 9]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "- On 300 test images" in text
    assert "- The cache took 375,000 teacher passes" in text


def test_accuracy_is_drawn_against_the_latency_of_each_device_with_its_pareto_front(pages):
    page = pages["few"].read_text("utf-8")
    for device in ("CPU", "GPU"):
        name = f"Accuracy against latency on the {device}"
        (chart,) = re.findall(rf'aria-label="{name}".*?</svg>', page, re.DOTALL)
        assert chart.count("<circle") == 1 + 2 * len(FOUR)
        assert chart.count('class="front"') == 1
        assert "teacher, teacher: " in chart
        assert ", 20</title>" in chart  # 20 ms for 20 M parameters


def test_an_axis_has_round_ticks_around_all_values():
    for values, ticks in (
        ([0.1, 0.99], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([-0.03, 0.02], [-0.03, -0.02, -0.01, 0, 0.01, 0.02]),
        ([0.5, 0.5], [0.49, 0.495, 0.5, 0.505, 0.51]),
    ):
        axis = charts.linear_axis(values, 0, 100, str)
        assert axis.ticks == pytest.approx(ticks)
        assert (axis(axis.ticks[0]), axis(axis.ticks[-1])) == (0, 100)


def test_a_logarithmic_axis_has_two_to_seven_ticks_for_any_costs():
    axis = charts.log_axis([1e3, 1e6], 0, 300, charts.si)
    assert axis(1e4) - axis(1e3) == pytest.approx(axis(1e6) - axis(1e5))
    assert [charts.si(tick) for tick in axis.ticks] == ["1 k", "10 k", "100 k", "1 M"]
    for ratio, low in product([1, 3, 20, 100, 5000], np.geomspace(1e4, 1e7, 40)):
        axis = charts.log_axis([low, low * ratio], 44, 332, charts.si)
        assert 2 <= len(axis.ticks) <= 7
        assert all(axis(b) - axis(a) > 30 for a, b in pairwise(axis.ticks))


def test_overlapping_labels_are_moved_apart():
    labels = [(10, 50, "first", "start"), (12, 52, "second", "start"), (200, 51, "far", "start")]
    heights = {name: y for _, y, name, _ in charts.spread_labels(labels, 300)}
    assert heights == {"first": 50, "second": 50 + charts.LINE, "far": 51}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with browser() as page:
        yield page


OUTSIDE = """
[...document.querySelectorAll('body *')].filter(element => {
  const box = element.getBoundingClientRect();
  return box.width && (box.left < -0.5 || box.right > innerWidth + 0.5);
}).map(element => element.outerHTML.slice(0, 120))
"""
CUT_TEXT = """
[...document.querySelectorAll('svg text')].filter(text => {
  const box = text.getBoundingClientRect();
  const frame = text.closest('svg').getBoundingClientRect();
  return box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
}).map(text => text.closest('svg').getAttribute('aria-label') + ': ' + text.textContent)
"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('svg text')].map(text =>
  parseFloat(getComputedStyle(text).fontSize)
    * text.closest('svg').getBoundingClientRect().width
    / text.closest('svg').viewBox.baseVal.width))
"""
EMPTY = """
[...document.querySelectorAll('svg, img')].filter(shown => {
  const box = shown.getBoundingClientRect();
  return box.width < 50 || box.height < 50 || shown.naturalWidth === 0;
}).length
"""
PAINT = "getComputedStyle(document.body).backgroundColor"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_errors_requests_or_sideways_scrolling(
    pages, chromium, name, width
):
    chromium.requests.clear()
    chromium.errors.clear()
    chromium.show(pages[name], width=width)
    assert chromium.evaluate("innerWidth") == width
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate(OUTSIDE) == []
    assert chromium.evaluate(CUT_TEXT) == []
    assert chromium.evaluate(SMALLEST_TEXT) >= 9
    assert chromium.evaluate("document.querySelectorAll('svg').length") >= 7
    assert chromium.evaluate(EMPTY) == 0
    requests = {url for url in chromium.requests if not url.startswith("data:image/png;")}
    assert requests == {pages[name].absolute().as_uri()}
    assert chromium.errors == []


def test_the_page_is_dark_if_the_reader_prefers_dark(pages, chromium):
    chromium.show(pages["real"], width=390)
    light = chromium.evaluate(PAINT)
    chromium.show(pages["real"], width=390, dark=True)
    assert light != chromium.evaluate(PAINT)


def test_the_browser_reports_a_request_an_error_and_an_overflow(tmp_path, chromium):
    """The checks above can fail."""
    chromium.requests.clear()
    chromium.errors.clear()
    page = tmp_path / "bad.html"
    page.write_text(
        "<body><p style='width: 3000px'>wide</p><img src='http://example.org/a.png'>"
        "<script>console.error('oh')</script>"
    )
    chromium.show(page, width=1280)
    assert "http://example.org/a.png" in chromium.requests
    assert len(chromium.errors) >= 2
    assert len(chromium.evaluate(OUTSIDE)) == 1
    assert chromium.evaluate(EMPTY) == 1
