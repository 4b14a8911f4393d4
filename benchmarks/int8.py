"""Compare int8 files with the float32 files that they are made of.

    OMP_NUM_THREADS=1 python -m benchmarks.int8 PROJECT

PROJECT is a folder in which `dvc repro` has run, such as `.`: the float32 files in models/exported
are quantised with weights of 7 bits, as `export` does, and of 8. All test images are classified
by onnxruntime's kernels, and by the graph as it is written. Files are timed one image at a time, on
one thread; the sides alternate.

Without VNNI, kernels cut off sums of products with 8-bit weights. To see that on a processor that
has VNNI (Debian's package `qemu-user`; takes 100 times as long):

    qemu-x86_64 -cpu Haswell-noTSX .venv/bin/python -m benchmarks.int8 . --rounds 1 --calibration 64
"""

from pipeline.runtime.command import run_command

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness import Row, alternate, median, run_benchmark
from pipeline.data.prepared.dataset import Dataset, open_dataset
from pipeline.export.int8 import CALIBRATION_IMAGES, calibration_views, to_int8
from pipeline.export.int8_checks import int8_accuracy
from pipeline.export.running.file_images import file_logits
from pipeline.export.running.onnx_model import ExportedNetwork
from pipeline.runtime.errors import UserError
from pipeline.runtime.params import load_section
from pipeline.views.params import ViewsParams

RUNS = 20  # in a round: one takes less than a millisecond


def measure_file(
    path: Path, dataset: Dataset, views: ViewsParams, calibration: int, rounds: int
) -> Iterator[Row]:
    test, content = dataset.splits["test"], path.read_bytes()
    float32 = ExportedNetwork(content, str(path), 1)
    files = {
        bits: to_int8(content, calibration_views(dataset, views, calibration), weight_bits=bits)
        for bits in (7, 8)
    }
    sessions = {bits: ExportedNetwork(file, str(path), 1) for bits, file in files.items()}
    image = next(calibration_views(dataset, views, 1))

    def timed(session: ExportedNetwork, _: int) -> None:
        for _ in range(RUNS):
            session.logits(image)

    sides = {"float32": float32} | sessions
    times = alternate(
        {name: lambda n, session=session: timed(session, n) for name, session in sides.items()},
        rounds,
    )
    expected = file_logits(float32, test)
    for bits, file in files.items():
        kernels = file_logits(sessions[bits], test)
        as_written = file_logits(ExportedNetwork(file, str(path), 1, optimised=False), test)
        points, written = (
            int8_accuracy(expected, logits, test.labels, 0.5) for logits in (kernels, as_written)
        )
        yield {
            "": f"{path.stem}, {bits} bits",
            "x smaller": len(content) / len(file),
            "x faster": median(times["float32"] / times[bits]),
            "float32": f"{points.float32:.2%}",
            "kernels": f"{points.int8:.2%}",
            "as written": f"{written.int8:.2%}",
            "points": f"{100 * points.gain.gain:+.2f}",
            "from": f"{100 * points.gain.low:+.2f}",
            "to": f"{100 * points.gain.high:+.2f}",
            "other class": int((kernels.argmax(1) != as_written.argmax(1)).sum()),
            "apart": float(np.sqrt(((kernels - as_written) ** 2).mean()) / spread(as_written)),
        }


def spread(logits: np.ndarray) -> float:
    return np.sqrt(((logits - logits.mean(1, keepdims=True)) ** 2).mean())


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    if not arguments.project.is_dir():
        raise UserError(f"`{arguments.project}` is no folder; expected a project that has run.")
    os.chdir(arguments.project)
    views = load_section(ViewsParams, "views")
    dataset = open_dataset().resized(views.image_size)
    paths = sorted(Path("models/exported").glob("*.onnx"))
    if not paths:
        raise UserError("`models/exported` has no .onnx file. Run `dvc repro`.")
    for path in paths:
        yield from measure_file(path, dataset, views, arguments.calibration, arguments.rounds)


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        "project",
        rounds=(40, "of each file, 20 runs in each"),
        calibration=(CALIBRATION_IMAGES, "training views behind the ranges of activations"),
    )


if __name__ == "__main__":
    run_command(main)
