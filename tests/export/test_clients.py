"""Exported files give onnxruntime's logits in OpenVINO, and in onnxruntime-web (Node, Chromium).

Each client is run by the lines that docs/exporting.md shows.
"""

import functools
import hashlib
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
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
from import_closure import ROOT
from test_to_onnx import metadata_of, with_statistics_of

from pipeline.export.running.onnx_model import OnnxMetadata, OnnxStudent
from pipeline.export.to_onnx import to_onnx
from pipeline.models.spec import InputSpec, ModelSpec, build

PACKAGES = ROOT / ".scratch/browser/node_modules"
HAS_WEB = (PACKAGES / "onnxruntime-web").is_dir()
NODE = shutil.which("node")
INSTALL_WEB = "onnxruntime-web is absent: npm install --prefix .scratch/browser onnxruntime-web"

pytestmark = pytest.mark.slow
openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the extra `clients` is not installed"
)
node = [
    pytest.mark.skipif(not HAS_WEB, reason=INSTALL_WEB),
    pytest.mark.skipif(NODE is None, reason="node is absent"),
]
chromium = [
    pytest.mark.skipif(not HAS_WEB, reason=INSTALL_WEB),
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is absent"),
]

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
    pytest.param(in_chromium, id="chromium", marks=chromium),
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


STUDENTS = {
    "without a resize": Student("cifar_resnet", "resnet8", 32, 32),
    "greyscale, shrinks": Student("cifar_resnet", "resnet8", 33, 16, channels=1),
    "bicubic": Student("cifar_resnet", "resnet8", 24, 32, interpolation="bicubic"),
    "bicubic, shrinks": Student("cifar_resnet", "resnet8", 40, 32, interpolation="bicubic"),
    "mobilenet": Student("torchvision", "mobilenet_v2", 32, 64, width=0.25),
    "squeezenet": Student("torchvision", "squeezenet1_1", 32, 64),
}


def write_student(folder: Path, student: Student) -> np.ndarray:
    """Export the student to models/exported/resnet8.onnx, and write its card. Return images."""
    channels, side = student.channels, student.side
    spec = InputSpec(
        channels,
        student.size,
        [0.4] * channels,
        [0.2] * channels,
        interpolation=student.interpolation,
    )
    options = {} if student.width is None else {"width_mult": student.width}
    torch.manual_seed(0)
    network = build(ModelSpec(student.family, student.network, options, list("abcde"), spec))
    views = torch.randint(0, 256, (64, channels, side, side), dtype=torch.uint8)
    with_statistics_of(network, spec.apply(views))
    metadata = metadata_of({"storage": "pixels", "image_size": side}, side, channels)
    write_file(folder, to_onnx(network, spec, metadata), metadata)
    return views.numpy()


def write_file(folder: Path, content: bytes, metadata: OnnxMetadata) -> None:
    exported = folder / "models/exported"
    exported.mkdir(parents=True)
    (exported / "resnet8.onnx").write_bytes(content)
    card = json.dumps(card_of(content, metadata), ensure_ascii=False)
    (exported / "resnet8.json").write_text(card, "utf-8")
    (folder / "node_modules").symlink_to(PACKAGES)


def card_of(content: bytes, metadata: OnnxMetadata) -> dict[str, Any]:
    """The model card's entries that a client reads."""
    image = {"type": "uint8", "channels": metadata.channels, "image_size": metadata.image_size}
    digest = hashlib.sha256(content).hexdigest()
    return {
        "classes": metadata.class_names,
        "input": {"name": "image", **image},
        "output": {"name": "logits"},
        "preprocessing": metadata.reading.model_dump(exclude_none=True),
        "file": {"name": "resnet8.onnx", "bytes": len(content), "sha256": digest},
    }


def in_onnxruntime(folder: Path, images: np.ndarray) -> np.ndarray:
    content = (folder / "models/exported/resnet8.onnx").read_bytes()
    return OnnxStudent(content, "resnet8.onnx", 1).logits(images)


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
