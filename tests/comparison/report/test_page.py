"""The report needs no network, draws its figures, and can be read on every screen and in print."""

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from browser import CHROMIUM, Page, browser

from pipeline.comparison.cache_economics import Economics
from pipeline.comparison.compare import Comparison, Predictions, compare
from pipeline.comparison.figures import Figures, headline_figures, models_table
from pipeline.comparison.measurement.corruptions import CORRUPTIONS, SEVERITIES
from pipeline.comparison.measurement.latency import EngineSpeed, FileSpeed, Machine, Ratio
from pipeline.comparison.report import charts
from pipeline.comparison.report.costs import Costs
from pipeline.comparison.report.drawings import MOST_CLASSES
from pipeline.comparison.report.markdown import markdown
from pipeline.comparison.report.numbers import fewer_or_more
from pipeline.comparison.report.page import html_report, with_code
from pipeline.comparison.report.tables import metrics_table, robustness_table
from pipeline.comparison.robustness import CorruptionPredictions, compare_robustness
from pipeline.runtime.outputs import ExportedFile, Start

ONE_THREAD = "onnxruntime_1_thread"
#: Of the first student, the second, and so on: the last one's was not recorded.
STARTS = [
    Start(text="published weights, new last layer", sha256="1"),
    Start(text=f"models/imported/{'a_long_name_' * 5}.pth, 12 of 20 layers", sha256="2"),
    Start(text="from scratch", sha256="3"),
    None,
]
REFUSED = (
    "int8 loses 0.20 points of accuracy against the float32 file (90.60% to 90.40%; 95 % interval "
    "of the difference -0.60 to +0.20) on 2,500 test images, and `export.largest_loss` is 0.5"
)
HOSTILE = "</style><script src='https://example.org/x.js'></script>&"


def invented(
    num_classes: int, students: list[str], count: int = 300, growth: int = 3
) -> Comparison:
    """Compare networks, with long and hostile class names.

    Args:
        growth: by which factor each student is larger than the one before it.
    """
    rng = np.random.default_rng(0)
    labels = {name: rng.integers(0, num_classes, count) for name in ("validation", "test")}
    names = [f"a class of a long name {i}" for i in range(num_classes)]
    names[1] = HOSTILE
    precisions = 1 if len(students) == 1 else 2  # with int8 files

    def predictions(name: str, role: str, skill: float, parameters: int) -> Predictions:
        logits = {}
        for split, classes in labels.items():
            logits[split] = rng.normal(0, 1, (count, num_classes)).astype(np.float32)
            logits[split][np.arange(count), classes] += skill
        costs = {"parameters": parameters, "macs": 9 * parameters, "size_bytes": 4 * parameters}
        path = str(ExportedFile(role, name).path)
        start = STARTS[students.index(name) % 4] if role != "teacher" else None
        return Predictions(
            name=name, role=role, path=path, input_size=64, start=start, **logits, **costs
        )

    def corrupted(seed: int, side: int = 16) -> CorruptionPredictions:
        shape = (len(CORRUPTIONS), len(SEVERITIES), count)
        chosen = np.random.default_rng(seed).integers(0, num_classes, shape)
        predicted = np.where(chosen > 1, chosen, labels["test"])
        return CorruptionPredictions(labels["test"], predicted, side, "distilled", "float32")

    robustness = compare_robustness(
        None if len(students) == 1 else corrupted(0),  # a teacher without a network
        {
            name: [corrupted(seed, 20 if name == "b" else 16) for seed in (1, 2 + i) * precisions]
            for i, name in enumerate(students)
        },
        labels["test"],
    )
    teacher = predictions("teacher", "teacher", 4, 20_000_000)
    files = {
        name: [
            predictions(name, role, skill, 50_000 * growth**i)
            for role, skill in (("distilled", 2 + i % 3), ("baseline", 1.5 + i % 4))
        ]
        for i, name in enumerate(students)
    }
    if precisions == 2:
        for models in files.values():
            models += [
                replace(model, precision="int8", size_bytes=model.size_bytes // 4)
                for model in models
            ]
    return compare(teacher, files, labels, names, robustness)


def costs_of(comparison: Comparison, *settings: str) -> Costs:
    """Times in proportion to the networks' sizes; an int8 file takes half of them."""

    def speed(model, share: float = 1) -> FileSpeed:
        latency = share * model.parameters / 1e6
        figures = {"latency_ms": latency, "latency_p95_ms": 1.5 * latency}
        if model.role == "distilled":
            ratio = comparison.teacher.parameters / 1e6 / latency
            figures["speedup"] = Ratio(median=ratio, low=0.9 * ratio, high=1.1 * ratio)
            figures["batch_speedup"] = figures["speedup"]
        return FileSpeed(images_per_second=1000 / latency, **figures)

    measured = EngineSpeed(
        engine="onnxruntime 1.32.0",
        device="A processor of a long name, 8275CL at 3.00 GHz",
        threads=1,
        rounds=100,
        batch_size=64,
        teacher=speed(comparison.teacher),
        students={
            name: {"float32": speed(gain.first), "int8": speed(gain.first, 0.5)}
            for name, gain in comparison.gains.items()
        },
    )
    images = {"views": 8, "training_images": 45_000, "held_out_images": 15_000}
    epochs = dict.fromkeys(comparison.gains, 240)
    economics = Economics(**images, epochs=epochs, bytes_per_row=200.3)
    machine = Machine(cpu="a CPU", cores=4, system="Linux x86_64", onnxruntime="1.32.0")
    return Costs(dict.fromkeys(settings, measured), None, machine, machine, economics)


def figures_of(comparison: Comparison, costs: Costs) -> Figures:
    return headline_figures(comparison, costs.economics, dict.fromkeys(comparison.gains, (9, 9)))


def params_of(comparison: Comparison) -> dict:
    """Parts of params.yaml: each other student has a network with options."""
    wide = {"name": "mobilenet_v2", "options": {"width_mult": 0.5}}
    networks = ("resnet8", wide)
    return {
        "distillation": {"method": "kd", "temperature": 4.0},
        "students": {
            name: {"network": networks[i % 2], "distillation": {"method": "dkd"} if i > 1 else {}}
            for i, name in enumerate(comparison.gains)
        },
    }


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
    params, fingerprints = params_of(comparison), {"dataset": "ab" * 32}
    ids = [f"test/a folder of a long name/image_{i:08d}.jpeg" for i in range(len(images))]
    return html_report(
        *(figures, comparison, curves, images.__getitem__, ids, corrupted, costs),
        *(params, fingerprints),
    )


ONE_THREAD = "onnxruntime_1_thread"
ON_GPU = int(torch.cuda.is_available())  # where `speed` also times PyTorch
LONG = [f"student_{i:02}_with_a_name_of_forty_letters_x" for i in range(12)]
FOUR = ["mobilenet-v2-half", "resnet8", "b", "a_student_of_a_long_name"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, finished_project: Path) -> dict[str, Path]:
    """Reports of a real run, of few classes and four students, of many classes and one student."""
    paths = {name: tmp_path_factory.mktemp("pages") / "index.html" for name in ("few", "many")}
    few = replace(invented(5, FOUR), refused={(FOUR[0], "distilled"): REFUSED})
    many = invented(MOST_CLASSES + 10, ["solo"])
    few_page = page_of(few, costs_of(few, ONE_THREAD, "pytorch_cuda"), size=16, channels=1)
    paths["few"].write_text(few_page, "utf-8")
    paths["many"].write_text(page_of(many, costs_of(many, ONE_THREAD), size=200), "utf-8")
    return paths | {"real": finished_project / "reports/index.html"}


@pytest.fixture(scope="module")
def hostile_pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports with long names, and students of one cost."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (num_classes, students, growth) in HOSTILE_PAGES.items():
        comparison = invented(num_classes, students, growth=growth)
        page = page_of(comparison, costs_of(comparison, ONE_THREAD), size=16)
        (folder / f"{name}.html").write_text(page, "utf-8")
    return {name: folder / f"{name}.html" for name in HOSTILE_PAGES}


#: Classes, students, and the factor by which each student is larger than the one before.
HOSTILE_PAGES = {
    "two classes, students of one cost": (2, LONG[:3], 1),
    "as many classes as a heat map shows": (MOST_CLASSES, LONG[:3], 2),
    "many students of one cost, many classes": (100, LONG, 1),
}


NAMES = ("real", "few", "many")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_self_contained_and_its_policy_allows_its_one_script_alone(pages, name):
    page = pages[name].read_text("utf-8")
    assert not re.search(r"<(link|iframe|object)\b", page)
    (script,) = re.findall(r"<script\b[^>]*>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', page, re.DOTALL)
    assert policy.startswith("default-src 'none'; ")
    assert re.findall(r"script-src ([^;]*)", policy) == [f"'sha256-{digest}'"]
    assert set(re.findall(r'\bsrc="([^"]{,11})', page)) <= {"data:image/"}
    assert {link[0] for link in re.findall(r'\bhref="([^"]*)', page)} == {"#"}
    assert "url(" not in page
    assert "@import" not in page


@pytest.mark.parametrize("name", NAMES)
def test_the_contents_link_to_every_section_by_its_title(pages, name):
    page = pages[name].read_text("utf-8")
    contents = page.partition("<nav")[2].partition("</nav>")[0]
    linked = re.findall(r'<a href="#([a-z0-9-]+)">(.+?)</a>', contents)
    assert linked == re.findall(r'<section id="([a-z0-9-]+)"><h2>(.+?)</h2>', page)
    assert len(linked) == page.count("<h2") == len({anchor for anchor, _ in linked})


def test_a_students_network_start_and_method_stand_beside_its_name_in_each_section(pages):
    page = pages["few"].read_text("utf-8")
    anchors = ("students", "speed", "training", "calibration", "corruption", "classes", "agreement")
    for anchor in (*anchors, "disagreements"):
        section = page.partition(f'id="{anchor}"')[2].partition("</section>")[0]
        found = re.findall(r'([\w-]+)(?: <span.*?</span>)? <small class="network">(.+?)<', section)
        assert dict(found) == {
            "mobilenet-v2-half": "resnet8, 64 px; published weights, new last layer; kd",
            "resnet8": f"mobilenet_v2, width_mult 0.5, 64 px; {STARTS[1].text}; kd",
            "b": "resnet8, 64 px; from scratch; dkd",
            "a_student_of_a_long_name": "mobilenet_v2, width_mult 0.5, 64 px; dkd",
        }, anchor


def test_a_hostile_name_is_escaped_in_the_card():
    comparison = invented(3, [HOSTILE], count=60)
    page = page_of(comparison, costs_of(comparison, ONE_THREAD), size=8)
    card = page.partition('class="card decision"')[2].partition("</section>")[0]
    assert "&lt;/style&gt;&lt;script" in card
    assert "<script" not in card


@pytest.mark.parametrize(
    ("name", "students", "latencies"), [("real", 1, ON_GPU + 1), ("few", 4, 2), ("many", 1, 1)]
)
def test_every_chart_is_drawn_well_formed_and_named(pages, name, students, latencies):
    page = pages[name].read_text("utf-8")
    heat_maps = name != "many"  # which has tables instead
    charts_of_students = 7 + 3 * heat_maps
    drawings = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(drawings) == 4 + latencies + 6 + heat_maps + charts_of_students * students
    for drawing in drawings:
        assert ElementTree.fromstring(drawing).attrib["aria-label"]
        assert "nan" not in drawing


@pytest.mark.parametrize(
    ("name", "lines", "rows"), [("few", 4 * 3, 1 + 4 * 4), ("many", 2, 2), ("real", 3, 1 + 2)]
)
def test_accuracy_under_corruption_is_shown_for_each_network_that_was_measured(
    pages, name, lines, rows
):
    page = pages[name].read_text("utf-8")
    text = page.partition('id="corruption"')[2].partition("</section>")[0]
    assert text.count("<polyline") == lines
    assert text.count("<img") == len(CORRUPTIONS)
    assert text.count("<tr>") == 1 + rows
    assert re.findall(r"Those of (.+) have (\d+) pixels", text) == [("b", "20")] * (name == "few")


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
    strips = page.partition('id="disagreements"')[2]
    assert strips.count("<img") == 4 * 7


def test_an_image_of_a_disagreement_has_its_file_its_label_and_each_prediction_with_confidence(
    pages,
):
    comparison = invented(5, FOUR)
    gain = comparison.gains["b"]
    models = (comparison.teacher, gain.first, gain.second)
    differ = np.ptp([model.decisions for model in models], axis=0) > 0
    first = int(np.argmax(np.where(differ, gain.first.divergences, -1)))
    section = pages["few"].read_text("utf-8").partition('id="disagreements"')[2]
    page = section.partition("<h3>b ")[2]
    caption = words_of(page.partition(f"image_{first:08d}.jpeg</span>")[2].partition("</fig")[0])
    label, *predictions = re.split(" (?=teacher|distilled|baseline)", caption)
    assert label.startswith("label ")
    for text, model in zip(predictions, models, strict=True):
        mark = "✓" if model.decisions[first] == comparison.labels[first] else "✗"
        assert text.startswith(f"{model.role} ")
        assert text.endswith(f" {mark} {100 * model.confidences[first]:.1f}%")


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


@pytest.mark.parametrize(
    ("teachers", "students", "text"),
    [
        (100, 10, "10.0 x fewer"),
        (10, 100, "10.0 x more"),
        (100, 99, "as many"),
        (None, 9, "-"),
        (0, 9, "-"),
    ],
)
def test_a_student_larger_than_its_teacher_is_not_said_to_have_fewer(teachers, students, text):
    assert fewer_or_more(teachers, students) == text


def test_the_markdown_has_the_sentences_and_one_row_per_student_and_model():
    comparison = invented(5, FOUR)
    costs = costs_of(comparison, ONE_THREAD)
    text = markdown(figures_of(comparison, costs), comparison, costs)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert [len(table.splitlines()) - 2 for table in tables] == [4, 9, 8, 3, 17]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "- On 300 test images" in text
    assert "- The cache took 375,000 teacher passes" in text


def test_accuracy_is_drawn_against_latency_and_bytes_with_int8_files_and_its_pareto_front(pages):
    page = pages["few"].read_text("utf-8")
    float32, all_files = 1 + 2 * len(FOUR), 1 + 4 * len(FOUR)
    for cost, count in (
        ("parameters", float32),
        ("MACs", float32),
        ("bytes of the file", all_files),
        ("latency in one thread", all_files),
        ("latency in PyTorch on the GPU", float32),
    ):
        (chart,) = re.findall(rf'aria-label="Accuracy against {cost}".*?</svg>', page, re.DOTALL)
        assert chart.count("<circle") == count
        assert chart.count('class="front"') == 1
        assert "teacher, teacher: " in chart
        assert ("resnet8 int8" in chart) == (count == all_files)
        assert (", 20</title>" in chart) == ("latency" in cost)  # 20 ms for 20 M parameters


def test_a_row_of_metrics_or_of_robustness_says_which_file_it_is():
    comparison = invented(3, FOUR)
    for table in (robustness_table(comparison), metrics_table(models_table(comparison))):
        rows = table[["network", "role"]]
        assert not rows.duplicated().any()
        assert rows.iloc[0].tolist() == ["teacher", ""]
        assert rows.iloc[2].tolist() == [FOUR[0], "baseline"]
        assert rows.iloc[4].tolist() == [FOUR[0], "baseline, int8"]


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
PAGE_CHECKS = Path(__file__).with_name("page_checks.js").read_text("utf-8")
NARROWEST_EXAMPLE = """
Math.min(...[...document.querySelectorAll('#disagreements img')].map(image => image.width))
"""
PAINT = "getComputedStyle(document.body).backgroundColor"


#: Width in pixels, whether dark, and the medium. A4 has about 718 pixels between its margins.
VIEWS = [(w, dark, "") for w in (390, 800, 1280) for dark in (False, True)] + [
    (718, False, "print")
]


def check_views(chromium: Page, path: Path) -> None:
    """Check what a reader sees of a page at each width, light and dark, and in print."""
    chromium.requests.clear()
    chromium.errors.clear()
    chromium.show(path, width=1280)
    chromium.evaluate(PAGE_CHECKS)
    assert chromium.evaluate("pageChecks.lines()") > 300
    assert chromium.evaluate("document.querySelectorAll('svg').length") >= 7
    for width, dark, media in VIEWS:
        chromium.look(width=width, dark=dark, media=media)
        view = f"{width} {'dark' if dark else 'light'} {media}"
        assert chromium.evaluate("innerWidth") == width
        assert chromium.evaluate("document.documentElement.scrollWidth") <= width, view
        assert chromium.evaluate(OUTSIDE) == [], view
        assert chromium.evaluate(CUT_TEXT) == [], view
        assert chromium.evaluate(SMALLEST_TEXT) >= 9, view
        assert (chromium.evaluate(NARROWEST_EXAMPLE) or 128) >= 128, view
        assert chromium.evaluate(EMPTY) == 0, view
        assert (chromium.evaluate(NARROWEST_EXAMPLE) or 128) >= 128, view
        assert chromium.evaluate("pageChecks.overlaps()") == [], view
        assert chromium.evaluate("pageChecks.faint()") == [], view
    requests = {url for url in chromium.requests if not url.startswith("data:image/")}
    assert requests == {path.absolute().as_uri()}
    assert chromium.errors == []


@pytest.mark.parametrize("name", NAMES)
def test_a_browser_shows_the_page_without_requests_and_every_text_can_be_read_in_every_view(
    pages, chromium, name
):
    check_views(chromium, pages[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE_PAGES)
def test_long_names_and_many_students_of_one_cost_can_be_read(hostile_pages, chromium, name):
    check_views(chromium, hostile_pages[name])


def shown_column(chromium: Page, table: str, column: int) -> list[str]:
    """A table's texts of one column, from the top, without what is in small type."""
    cells = f"[...document.querySelectorAll('{table} tbody tr')].map(row => row.cells[{column}]"
    return chromium.evaluate(f"{cells}.firstElementChild.firstChild.textContent.trim())")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_table_is_sorted_by_click_and_by_key_and_says_so_to_a_screen_reader(
    pages, chromium, width
):
    chromium.show(pages["few"], width=width)
    chromium.errors.clear()
    title = "document.querySelectorAll('#students th')[{}]".format
    button = "document.querySelectorAll('#students th button')[{}]".format
    count = chromium.evaluate("document.querySelectorAll('#students th button').length")
    assert count == chromium.evaluate("document.querySelectorAll('#students th').length")
    parameters = ["50,000", "150,000", "450,000", "1,350,000"]
    assert shown_column(chromium, "#students", 7) == parameters
    chromium.click(button(7))
    chromium.click(button(7))
    assert shown_column(chromium, "#students", 7) == parameters[::-1]
    assert chromium.evaluate(f"{title(7)}.ariaSort") == "descending"
    chromium.evaluate(f"{button(0)}.focus()")
    chromium.press("Enter", text="\r")
    assert shown_column(chromium, "#students", 0) == sorted(FOUR)
    assert chromium.evaluate(f"[{title(0)}.ariaSort, {title(7)}.ariaSort]") == ["ascending", None]
    chromium.press("Tab")
    chromium.press(" ", text=" ")
    shown = shown_column(chromium, "#students", 1)
    assert shown == sorted(shown, key=lambda text: float(text.removesuffix("%")))
    assert chromium.evaluate("document.activeElement.textContent") == "distilled"
    assert chromium.errors == []


def test_numbers_are_sorted_as_numbers_with_their_units_and_absent_ones_last(
    pages, chromium, tmp_path
):
    """The script, on cells of every kind, in an order that is not theirs as texts."""
    script = re.search(r"<script>.*?</script>", pages["few"].read_text("utf-8"), re.DOTALL)[0]
    for ordered in (
        ["\N{MINUS SIGN}1.39", "0.00", "+0.28", "+10.00", "-"],
        ["9.5%", "98.3 %", "100.00%", "-"],
        ["900", "78.0 k", "1.23 M", "17.0 M", "1.1 G"],
        ["252 kB", "2.91 MB"],
        ["0.680 ms", "15 ms", "8.4 s", "12 min", "5.1 h"],
        ["p < 0.001", "p = 0.001", "p = 0.062"],
        ["2 x slower (1.9 to 2.1)", "1.25 x slower", "as fast", "1.1 x faster", "10 x faster", "-"],
        ["2,308 images/s", "10,000 images/s"],
        ["class 2", "class 10", "Class 11"],
    ):
        texts = ordered[1:] + ordered[:1]
        rows = "".join(f"<tr><td><span>x</span><td><span>{text}</span>" for text in texts)
        path = tmp_path / "table.html"
        head = "<thead><tr><th>name<th>value</thead>"
        path.write_text(
            f"<meta charset=utf-8><table class=sortable>{head}{rows}</table>{script}", "utf-8"
        )
        chromium.show(path, width=800)
        chromium.evaluate("document.querySelectorAll('button')[1].click()")
        assert shown_column(chromium, "table", 1) == ordered
        chromium.evaluate("document.querySelectorAll('button')[1].click()")
        absent = [text for text in ordered if text == "-"]
        present = [text for text in ordered if text != "-"]
        assert shown_column(chromium, "table", 1) == [*present[::-1], *absent]


def test_without_scripts_the_page_has_the_same_texts_and_no_buttons(pages, chromium):
    texts = "document.body.innerText.replace(/Press a column.*/, '').replace(/\\s+/g, ' ')"
    try:
        chromium.show(pages["few"], width=1280)
        with_scripts = chromium.evaluate(texts)
        chromium.call("Emulation.setScriptExecutionDisabled", value=True)
        chromium.show(pages["few"], width=1280)
        assert chromium.evaluate(texts) == with_scripts
        assert chromium.evaluate("document.querySelectorAll('button').length") == 0
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)


def test_no_row_and_no_chart_is_cut_between_two_pages_of_print(pages, chromium):
    chromium.show(pages["few"], width=718)
    chromium.look(width=718, media="print")
    inside = "getComputedStyle(element).breakInside"
    kinds = "[...document.querySelectorAll('tr, figure.card, .strip figure')]"
    assert chromium.evaluate(f"[...new Set({kinds}.map(element => {inside}))]") == ["avoid"]
    shown = "[...document.querySelectorAll('td')].every(cell => cell.checkVisibility())"
    assert chromium.evaluate(shown)


def test_a_name_runs_no_script_in_the_page(pages, chromium, tmp_path):
    """The policy holds even where the escaping of a name is undone."""
    page = (
        pages["few"]
        .read_text("utf-8")
        .replace(
            "a_student_of_a_long_name",
            "<img src=x onerror='document.title = 1'><script>document.title = 2</script>",
        )
    )
    path = tmp_path / "index.html"
    path.write_text(page, "utf-8")
    chromium.show(path, width=1280)
    assert chromium.evaluate("document.title").startswith("Comparison")
    assert chromium.evaluate("document.querySelectorAll('th button').length") > 9


def test_the_page_is_dark_if_the_reader_prefers_dark(pages, chromium):
    chromium.show(pages["real"], width=390)
    light = chromium.evaluate(PAINT)
    chromium.look(width=390, dark=True)
    assert light != chromium.evaluate(PAINT)


def test_the_browser_reports_a_request_an_error_and_an_overflow(tmp_path, chromium):
    """The checks above can fail."""
    chromium.requests.clear()
    chromium.errors.clear()
    page = tmp_path / "bad.html"
    page.write_text(
        "<body><p style='width: 3000px'>wide</p><img src='http://example.org/a.png'>"
        "<script>console.error('oh')</script>"
        "<p style='color: #999'>faint</p><p style='margin: -34px 0 60px'>over it</p>"
        "<svg viewBox='0 0 90 90' width=90><text y=40>one</text><text y=52>two</text>"
        "<text transform='rotate(-90 60 60)' x=60 y=60>turned</text>"
        "<text x=66 y=60>beside</text></svg>"
    )
    chromium.show(page, width=1280)
    assert "http://example.org/a.png" in chromium.requests
    assert len(chromium.errors) >= 2
    assert len(chromium.evaluate(OUTSIDE)) == 1
    assert chromium.evaluate(EMPTY) == 1
    chromium.evaluate(PAGE_CHECKS)
    assert chromium.evaluate("pageChecks.overlaps()") == [": faint | over it", ": one | two"]
    assert chromium.evaluate("pageChecks.faint()") == ["2.85 : faint"]


def test_a_name_in_backticks_is_shown_as_code_and_everything_else_is_escaped():
    assert with_code("set `a: <b>` & `c`") == "set <code>a: &lt;b&gt;</code> &amp; <code>c</code>"
