"""Exported files give onnxruntime's logits in OpenVINO, and in onnxruntime-web (Node, Chromium).

Each client is run by the lines that docs/exporting.md shows.
"""

import functools
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Page, browser
from image_files import exif, orientation, saved
from import_closure import ROOT
from PIL import Image, ImageCms
from sklearn.datasets import load_digits
from torch import nn

from pipeline.commands.predict import student_input
from pipeline.export.int8 import CALIBRATION_IMAGES, to_int8
from pipeline.export.running.onnx_model import ExportedNetwork, OnnxMetadata
from pipeline.export.to_onnx import OPSET, to_onnx
from pipeline.models.spec import InputSpec, ModelSpec, build

PACKAGES = ROOT / ".scratch/browser/node_modules"
HAS_WEB = (PACKAGES / "onnxruntime-web").is_dir()
NODE = shutil.which("node")
INSTALL_WEB = "onnxruntime-web is absent: npm install --prefix .scratch/browser onnxruntime-web"

pytestmark = pytest.mark.slow
openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the extra `clients` is not installed"
)
node = pytest.mark.skipif(
    not HAS_WEB or NODE is None, reason=INSTALL_WEB if NODE else "node is absent"
)
needs_chromium = pytest.mark.skipif(
    not HAS_WEB or CHROMIUM is None, reason=INSTALL_WEB if CHROMIUM else "chromium is absent"
)

#: How far a logit may be from onnxruntime's, as a fraction of the largest magnitude in its row (at
#: least 1).
TOLERANCE = 1e-4

Client = Callable[[Path, np.ndarray], np.ndarray]


# The clients: each runs models/exported/resnet8.onnx of a folder on [B, C, S, S] uint8.


def lines_of_the_page(language: str, beginning: str) -> str:
    """The indented block of docs/exporting.md that begins with this line."""
    page = (ROOT / "docs/exporting.md").read_text("utf-8")
    (block,) = re.findall(rf"^    {re.escape(beginning)}\n(?:(?:    .*)?\n)*", page, re.MULTILINE)
    lines = re.sub(r"^    ", "", block, flags=re.MULTILINE).strip()
    assert len(lines.splitlines()) <= 10, f"the page shows {language} in ten lines"
    return lines


def in_openvino(folder: Path, images: np.ndarray) -> np.ndarray:
    names: dict[str, Any] = {"images": images}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(lines_of_the_page("Python", "import json, openvino"), names)
    card = json.loads((folder / "models/exported/resnet8.json").read_text("utf-8"))
    assert names["classes"] == [card["classes"][label] for label in names["logits"].argmax(1)]
    return names["logits"]


def program(images: np.ndarray, pixels: str, result: str) -> str:
    """The page's lines of JavaScript, with the code before and after them."""
    batch, channels, side, _ = images.shape
    return "\n".join(
        (
            f"const [batch, channels, side] = {[batch, channels, side]};",
            f"const pixels = {pixels};",
            lines_of_the_page("JavaScript", 'import * as ort from "onnxruntime-web";'),
            result,
        )
    )


def in_node(folder: Path, images: np.ndarray) -> np.ndarray:
    (folder / "pixels").write_bytes(images.tobytes())
    pixels = 'new Uint8Array((await import("node:fs")).readFileSync("pixels"))'
    result = "console.log(JSON.stringify(Array.from(logits.data)));"
    (folder / "program.mjs").write_text(program(images, pixels, result), "utf-8")
    run = subprocess.run(
        [NODE, "program.mjs"], cwd=folder, check=True, capture_output=True, text=True
    )
    return np.array(json.loads(run.stdout), np.float32).reshape(len(images), -1)


def in_chromium(folder: Path, images: np.ndarray) -> np.ndarray:
    (folder / "pixels").write_bytes(images.tobytes())
    pixels = 'new Uint8Array(await (await fetch("pixels")).arrayBuffer())'
    script = program(images, pixels, "export const result = Array.from(logits.data);")
    (folder / "program.mjs").write_text(script, "utf-8")
    page = (ROOT / "docs/examples/browser/index.html").read_text("utf-8")
    (imports,) = re.findall(r'<script type="importmap">.*?</script>', page, re.DOTALL)
    (folder / "index.html").write_text(f"<!doctype html>{imports}", "utf-8")
    with opened(folder) as tab:
        logits = value(tab, 'import("./program.mjs").then((module) => module.result)')
    return np.array(logits, np.float32).reshape(len(images), -1)


@contextmanager
def opened(folder: Path) -> Iterator[Page]:
    """Serve the folder on this machine, and yield a tab of Chromium that shows its index.html."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with browser() as tab:
                address = f"http://127.0.0.1:{server.server_port}/"
                tab.call("Page.navigate", url=address)
                while tab.next_message().get("method") != "Page.loadEventFired":
                    pass
                yield tab
                assert all(url.startswith((address, "blob:", "data:")) for url in tab.requests)
        finally:
            server.shutdown()


def value(tab: Page, expression: str) -> Any:
    """The expression's value in the tab, awaited if it is a promise."""
    answer = tab.call(
        "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
    )
    assert "exceptionDetails" not in answer, answer["exceptionDetails"]
    return answer["result"].get("value")


CLIENTS = [
    pytest.param(in_openvino, id="openvino", marks=openvino),
    pytest.param(in_node, id="node", marks=node),
    pytest.param(in_chromium, id="chromium", marks=needs_chromium),
]


# The files.


@dataclass(frozen=True)
class Student:
    family: str
    network: str
    side: int  # pixels, of the file's input
    size: int  # pixels, of the network's input
    channels: int = 3
    width: float | None = None
    interpolation: str | None = None
    resize_ratio: float | None = None


STUDENTS = {
    "without a resize": Student("cifar_resnet", "resnet8", 32, 32),
    "greyscale, shrinks": Student("cifar_resnet", "resnet8", 33, 16, channels=1),
    "bicubic": Student("cifar_resnet", "resnet8", 24, 32, interpolation="bicubic"),
    "bicubic, shrinks": Student("cifar_resnet", "resnet8", 40, 32, interpolation="bicubic"),
    "cuts the middle out": Student("cifar_resnet", "resnet8", 36, 32, resize_ratio=1.25),
    "mobilenet": Student("torchvision", "mobilenet_v2", 32, 64, width=0.25),
    "squeezenet": Student("torchvision", "squeezenet1_1", 32, 64),
}


def metadata_of(reading: dict[str, object], side: int, channels: int) -> OnnxMetadata:
    return OnnxMetadata(
        name="mine",
        role="distilled",
        precision="float32",
        fingerprint="-",
        class_names=list("abcde"),
        opset=OPSET,
        channels=channels,
        image_size=side,
        reading=reading,
    )


def with_statistics_of(network: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """Set the statistics of batch norm: without them a new network's logits are near 0."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        network.train()(inputs)
    return network.eval()


def write_student(folder: Path, student: Student) -> np.ndarray:
    """Export the student to models/exported/resnet8.onnx, and return images."""
    channels, side = student.channels, student.side
    spec = InputSpec(
        channels,
        student.size,
        [0.4] * channels,
        [0.2] * channels,
        interpolation=student.interpolation,
        resize_ratio=student.resize_ratio,
    )
    options = {} if student.width is None else {"width_mult": student.width}
    torch.manual_seed(0)
    network = build(ModelSpec(student.family, student.network, options, list("abcde"), spec))
    views = torch.randint(0, 256, (64, channels, side, side), dtype=torch.uint8)
    with_statistics_of(network, spec.apply(views))
    metadata = metadata_of({"storage": "pixels", "image_size": side}, side, channels)
    write_file(folder, to_onnx(network, spec, metadata), metadata.class_names)
    return views.numpy()


def write_file(folder: Path, content: bytes, class_names: list[str]) -> None:
    exported = folder / "models/exported"
    exported.mkdir(parents=True)
    (exported / "resnet8.onnx").write_bytes(content)
    (exported / "resnet8.json").write_text(json.dumps({"classes": class_names}), "utf-8")
    (folder / "node_modules").symlink_to(PACKAGES)


def in_onnxruntime(folder: Path, images: np.ndarray) -> np.ndarray:
    content = (folder / "models/exported/resnet8.onnx").read_bytes()
    return ExportedNetwork(content, "resnet8.onnx", 1).logits(images)


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of a logit, as TOLERANCE counts it."""
    largest = np.maximum(1, np.abs(expected).max(1, keepdims=True))
    return float((np.abs(actual - expected) / largest).max())


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("student", STUDENTS)
def test_a_client_gives_the_logits_of_onnxruntime(client: Client, student: str, tmp_path: Path):
    images = write_student(tmp_path, STUDENTS[student])
    for batch in (1, 7):
        part = images[:batch]
        found = difference(client(tmp_path, part), in_onnxruntime(tmp_path, part))
        print(f"{student}, batch of {batch}: {found:.1e}")
        assert found < TOLERANCE


# int8.

#: For an int8 file, of onnxruntime-web and of OpenVINO: how far a logit may be from onnxruntime's,
#: as TOLERANCE counts it; and the share of images that may have another class.
INT8_TOLERANCE = {in_node: 0.05, in_chromium: 0.05, in_openvino: 0.25}
INT8_DECISIONS = 0.01

EPOCHS = {"without a resize": 8, "mobilenet": 20}


@pytest.fixture(scope="module", params=EPOCHS)
def int8_student(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray]:
    """The folder of an int8 file that loses little, and its test images: handwritten digits."""
    student = STUDENTS[request.param]
    digits = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)[:, None].repeat(3, 1)
    images = images.repeat(student.side // 8, 2).repeat(student.side // 8, 3)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], digits.target[order]
    spec = InputSpec(3, student.size, [0.4] * 3, [0.2] * 3)
    options = {} if student.width is None else {"width_mult": student.width}
    names = list("0123456789")
    torch.manual_seed(0)
    network = build(ModelSpec(student.family, student.network, options, names, spec))
    train = slice(359, None)
    fit(network, spec.apply(torch.from_numpy(images[train])), labels[train], EPOCHS[request.param])
    reading = {"storage": "pixels", "image_size": student.side}
    metadata = metadata_of(reading, student.side, 3).model_copy(update={"class_names": names})
    content = to_onnx(network, spec, metadata)
    folder = tmp_path_factory.mktemp("int8")
    write_file(folder, to_int8(content, np.split(images[train][:CALIBRATION_IMAGES], 8)), names)
    test = images[:359]
    float32 = ExportedNetwork(content, "float32", 1).logits(test).argmax(1)
    int8 = in_onnxruntime(folder, test).argmax(1)
    assert (float32 == labels[:359]).mean() > 0.95
    assert (float32 != int8).mean() < 0.01
    return folder, test


def fit(network: nn.Module, inputs: torch.Tensor, labels: np.ndarray, epochs: int) -> None:
    targets = torch.from_numpy(labels)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    steps = -(-len(targets) // 64) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(targets)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs[batch]), targets[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gives_the_logits_of_an_int8_file_within_the_bound_of_the_page(
    client: Client, int8_student: tuple[Path, np.ndarray]
):
    folder, images = int8_student
    actual, expected = client(folder, images), in_onnxruntime(folder, images)
    found = difference(actual, expected)
    decisions = (actual.argmax(1) != expected.argmax(1)).sum()
    print(f"{client.__name__}: {found:.2g}, another class of {decisions} of {len(images)} images")
    assert found < INT8_TOLERANCE[client]
    assert decisions <= INT8_DECISIONS * len(images)


# The page of docs/examples/browser/.

PAGE = ROOT / "docs/examples/browser"


def other_profile() -> bytes:
    """sRGB's colour profile with red and green exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green, neither = b"rXYZ", b"gXYZ", b"????"
    return profile.replace(red, neither).replace(green, red).replace(neither, green)


def image_files() -> dict[str, bytes]:
    """Files of each kind that browsers read."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 4), np.uint8)
    smooth = Image.fromarray(noise[:6, :9, :3]).resize((90, 60), Image.Resampling.BICUBIC)
    photograph = Image.fromarray(noise[:, :, :3]).resize((900, 600), Image.Resampling.BICUBIC)
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    opaque = noise[..., :3]
    return {
        "colours.png": saved("PNG", opaque),
        "upright.jpg": saved("JPEG", smooth, exif=exif(orientation(6)), quality=90),
        "mirrored.jpg": saved("JPEG", smooth, exif=exif(orientation(2)), quality=90),
        "transparent.png": saved("PNG", noise),
        "palette.png": saved("PNG", smooth.convert("P"), transparency=3),
        "grey.png": saved("PNG", smooth.convert("L").resize((11, 9))),
        "deep.png": saved("PNG", deep),
        "profile.png": saved("PNG", opaque, icc_profile=other_profile()),
        "lossless.webp": saved("WEBP", opaque, lossless=True),
        "animation_of_one.gif": saved("GIF", smooth),
        "old.bmp": saved("BMP", opaque),
        "photograph.jpg": saved("JPEG", photograph, quality=90),
        "cmyk.jpg": saved("JPEG", smooth.convert("CMYK"), quality=90),
        "portrait.png": saved("PNG", smooth.resize((41, 233))),
    }


PIXELS = {"storage": "pixels", "image_size": 32}
KEPT = {
    "storage": "encoded",
    "image_size": 64,
    "quality": "original",
    "resize_ratio": 256 / 224,
    "interpolation": "bilinear",
}
READINGS = [  # ..., the side of the file's input, its channels
    (PIXELS, 32, 3),
    (PIXELS, 32, 1),
    (PIXELS | {"image_size": 48}, 20, 3),
    (KEPT, 24, 3),
    (KEPT | {"resize_ratio": 1.0, "interpolation": "bicubic"}, 32, 1),
]


@needs_chromium
@pytest.mark.parametrize(("reading", "side", "channels"), READINGS)
def test_the_page_makes_the_pixels_of_predict_within_one_level(reading, side, channels, tmp_path):
    shutil.copytree(PAGE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "node_modules").symlink_to(PACKAGES)
    metadata = metadata_of(reading, side, channels)
    card = {
        "input": {"channels": channels, "image_size": side},
        "preprocessing": metadata.reading.model_dump(exclude_none=True),
    }
    with opened(tmp_path) as tab:
        for name, content in image_files().items():
            if reading["storage"] == "encoded" and name.endswith(".jpg"):
                continue  # `predict` decodes a large JPEG at a fraction of its size
            (tmp_path / name).write_bytes(content)
            read = f"""(async () => {{
                const {{ preprocess }} = await import("./classify.js");
                const file = await (await fetch("{name}")).blob();
                return Array.from(await preprocess(file, {json.dumps(card)}));
            }})()"""
            expected = student_input(content, metadata).ravel().astype(int)
            assert np.abs(np.array(value(tab, read)) - expected).max() <= 1, name


@dataclass(frozen=True)
class PageOfAStudent:
    """The page's folder with an exported student, and images."""

    folder: Path
    images: list[Path]

    def predicted(self, image: Path) -> list[tuple[str, float]]:
        """Classes and probabilities, by `predict`."""
        command = [sys.executable, "-m", "pipeline.commands.predict", "--json", "--top", "3"]
        run = subprocess.run(
            [*command, str(self.folder / "student.onnx"), str(image)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        return [(each["class"], each["probability"]) for each in json.loads(run.stdout)["classes"]]


@pytest.fixture
def page_of_a_student(finished_project: Path, tmp_path: Path) -> PageOfAStudent:
    folder = tmp_path / "page"
    shutil.copytree(PAGE, folder)
    (folder / "node_modules").symlink_to(PACKAGES)
    for suffix in (".onnx", ".json"):
        exported = finished_project / "models/exported/small"
        shutil.copy(exported.with_suffix(suffix), folder / f"student{suffix}")
    images = [next(finished_project.glob(f"images/train/{name}/*.png")) for name in ("ant", "bee")]
    photograph = tmp_path / "photograph.jpg"
    photograph.write_bytes(image_files()["photograph.jpg"])
    return PageOfAStudent(folder, [*images, photograph])


def choose(tab: Page, image: Path) -> None:
    field = tab.call("Runtime.evaluate", expression='document.querySelector("input")')
    tab.call("DOM.setFileInputFiles", files=[str(image)], objectId=field["result"]["objectId"])


def drop(tab: Page, image: Path) -> None:
    data = {"items": [], "files": [str(image)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        tab.call("Input.dispatchDragEvent", type=kind, x=100, y=150, data=data)


def message(tab: Page, ending: str) -> None:
    """Wait until the page's message ends so."""
    text = 'document.querySelector("[role=status]").textContent'
    waiting = f"""new Promise((done) => {{
        const start = Date.now();
        (function look() {{
            const late = Date.now() > start + 20_000;
            if (late || {text}.endsWith({json.dumps(ending)})) done({text});
            else setTimeout(look, 20);
        }})();
    }})"""
    assert value(tab, waiting).endswith(ending)


def rows(tab: Page) -> list[tuple[str, float]]:
    """The classes and probabilities that the page shows."""
    cells = value(
        tab,
        """Array.from(document.querySelectorAll("tbody tr"),
            (row) => Array.from(row.cells, (cell) => cell.textContent))""",
    )
    return [(name, float(share.removesuffix(" %")) / 100) for name, share in cells]


@needs_chromium
@pytest.mark.parametrize("give", [choose, drop])
def test_the_page_shows_the_classes_of_predict(give, page_of_a_student):
    with opened(page_of_a_student.folder) as tab:
        message(tab, "Ready.")
        for image in page_of_a_student.images:
            give(tab, image)
            message(tab, f"{image.name}, as the student sees it:")
            expected = page_of_a_student.predicted(image)
            # The photograph's pixels may differ by one level.
            accuracy = 0.01 if image.suffix == ".jpg" else 0.0001
            assert [name for name, _ in rows(tab)] == [name for name, _ in expected]
            for (_, shown), (_, share) in zip(rows(tab), expected, strict=True):
                assert shown == pytest.approx(share, abs=accuracy)
        assert not tab.errors


@needs_chromium
def test_the_page_says_that_a_file_is_not_an_image_and_hides_the_last_result(
    page_of_a_student, tmp_path
):
    (tmp_path / "notes.txt").write_text("no image", "utf-8")
    with opened(page_of_a_student.folder) as tab:
        drop(tab, page_of_a_student.images[0])
        message(tab, "as the student sees it:")
        drop(tab, tmp_path / "notes.txt")
        message(tab, "The browser cannot read notes.txt as an image.")
        assert value(tab, 'document.querySelector("main").hidden')


FAULTS = {  # of the folder: an edit that makes it, and the message
    "another student": (
        lambda folder: (folder / "student.onnx").write_bytes(b"another"),
        "student.json describes another file than student.onnx: copy both again.",
    ),
    "no student": (
        lambda folder: (folder / "student.onnx").unlink(),
        "student.onnx is not beside this page (404).",
    ),
    "a card without a file": (
        lambda folder: (folder / "student.json").write_text('{"no_file": "It lost 3 points."}'),
        "student.json says why there is no file: It lost 3 points.",
    ),
    "no onnxruntime-web": (
        lambda folder: (folder / "node_modules").unlink(),
        "The page cannot load its code. Run `npm install onnxruntime-web` in its folder, and serve "
        "the folder: `python -m http.server`.",
    ),
}


@needs_chromium
@pytest.mark.parametrize("fault", FAULTS)
def test_the_page_says_what_is_wrong_with_its_folder(fault, page_of_a_student):
    edit, expected = FAULTS[fault]
    edit(page_of_a_student.folder)
    with opened(page_of_a_student.folder) as tab:
        message(tab, expected)


@needs_chromium
def test_the_page_classifies_no_image_with_another_student_than_the_cards(page_of_a_student):
    edit, expected = FAULTS["another student"]
    edit(page_of_a_student.folder)
    with opened(page_of_a_student.folder) as tab:
        message(tab, expected)
        drop(tab, page_of_a_student.images[0])
        value(tab, "new Promise((done) => setTimeout(done, 500))")
        message(tab, expected)
        assert rows(tab) == []


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_no_wider_than_its_window(width, page_of_a_student, tmp_path):
    image = shutil.copy(page_of_a_student.images[0], tmp_path / f"{'long' * 40}.png")
    with opened(page_of_a_student.folder) as tab:
        tab.look(width=width)
        drop(tab, image)
        message(tab, "as the student sees it:")
        assert value(tab, "document.documentElement.scrollWidth") == width
