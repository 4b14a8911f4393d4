"""Compare engines on the exported files of a finished run: the latency of one image, or of a batch.

    python -m benchmarks.engines [--batch 64]

Runs in the folder of a finished run: the teacher and every student, as float32 and int8 files in
onnxruntime and, where `openvino` is installed, in OpenVINO, and as PyTorch networks, eager and by
torch.compile. On the CPU with one thread, then with all cores; from uint8 images in memory to
logits in memory. All engines and networks alternate. Each is compared with onnxruntime's float32
file of the same network, and with the teacher in the same engine.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks.harness import Interval, Row, run_benchmark
from pipeline.comparison.measurement.latency import (
    Ratio,
    file_label,
    median_interval,
    time_interleaved,
)
from pipeline.data.prepared.image_decoding import available_cores
from pipeline.export.running.onnx_model import IMAGE, open_file
from pipeline.models import checkpoint
from pipeline.runtime.errors import UserError, counted, first_line
from pipeline.runtime.outputs import TEACHER, ExportedFile, ModelOutputs, Precision
from pipeline.runtime.params import student_names

Forward = Callable[[np.ndarray], object]
Engines = dict[str, tuple[tuple[Precision, ...], Callable[[ExportedFile, int], Forward]]]

#: Seconds before each turn: PyTorch's threads wait in loops after a call, and would take a core
#: from the next engine.
PAUSE = 0.01


class Compared(Interval):
    """How much faster or slower, with the interval."""

    width = 48

    def __str__(self) -> str:
        return str(Ratio(median=self.median, low=self.low, high=self.high))


def compared(other: np.ndarray | None, ours: np.ndarray) -> Compared | str:
    """The other's times over ours, [rounds, calls] seconds each."""
    if other is None:
        return "-"
    return Compared(*median_interval(np.median(other, 1) / np.median(ours, 1)))


def in_onnxruntime(file: ExportedFile, threads: int) -> Forward:
    return open_file(file.path, threads).logits


def in_openvino(file: ExportedFile, threads: int) -> Forward:
    import openvino  # noqa: PLC0415  (optional)

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(file.path), "CPU", settings)
    return lambda images: compiled({IMAGE: images})[0]


def in_pytorch(file: ExportedFile, threads: int) -> Forward:
    model = TEACHER if file.name is None else ModelOutputs(file.role, file.name)
    network, spec = checkpoint.load(model.model, produced_by=f"dvc repro {model.stage}")
    network.eval()

    @torch.inference_mode()
    def forward(images: np.ndarray) -> torch.Tensor:
        return network(spec.input.apply_clean(torch.from_numpy(images))).float()

    return forward


def in_torch_compile(file: ExportedFile, threads: int) -> Forward:
    torch._dynamo.config.recompile_limit = 64  # all networks share the code of `forward`
    return torch.compile(in_pytorch(file, threads))


#: By engine: the precisions that it runs, and how it opens a file or its network.
ENGINES: Engines = {
    "onnxruntime": (("float32", "int8"), in_onnxruntime),
    "OpenVINO": (("float32", "int8"), in_openvino),
    "PyTorch": (("float32",), in_pytorch),
    "torch.compile": (("float32",), in_torch_compile),
}


def files_of(precision: Precision) -> list[ExportedFile]:
    """Of the teacher, which has no int8 file, and the students."""
    files = [ExportedFile("distilled", name, precision) for name in student_names()]
    files = [ExportedFile("teacher"), *files] if precision == "float32" else files
    return [file for file in files if file.path.is_file()]


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    if not files_of("float32"):
        raise UserError("there is no exported file here. Run `dvc repro` first.")
    wanted = {"onnxruntime", *arguments.engines}  # which all others are compared with
    engines = {name: ENGINES[name] for name in ENGINES if name in wanted}
    if "OpenVINO" in engines and importlib.util.find_spec("openvino") is None:
        del engines["OpenVINO"]
        yield {"not measured": "OpenVINO", "reason": "the package `openvino` is not installed"}
    cores, before = available_cores(), torch.get_num_threads()
    for threads in (1, cores) if cores > 1 else (1,):
        torch.set_num_threads(threads)
        yield from with_threads(threads, engines, arguments.batch, arguments.rounds)
    torch.set_num_threads(before)


def with_threads(threads: int, engines: Engines, batch: int, rounds: int) -> Iterator[Row]:
    tasks: dict[tuple[str, ExportedFile], Callable[[], object]] = {}
    for engine, (precisions, open_in_engine) in engines.items():
        for file in (file for precision in precisions for file in files_of(precision)):
            metadata = open_file(file.path, 1).metadata
            shape = (batch, metadata.channels, metadata.image_size, metadata.image_size)
            images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
            try:
                forward = open_in_engine(file, threads)
                forward(images)
            except Exception as error:  # of an optional engine, or of a compiler
                if engine in ("onnxruntime", "PyTorch"):
                    raise
                yield {"not measured": label(engine, file), "reason": first_line(error)}
                continue
            tasks[engine, file] = lambda run=forward, of=images: run(of)
    counts = {"rounds": rounds, "calls": 3, "min_rounds": rounds}
    times = time_interleaved(list(tasks.values()), **counts, max_seconds=0, pause=PAUSE)
    of_side = dict(zip(tasks, times, strict=True))
    for (engine, file), ours in of_side.items():
        yield {
            f"{counted(batch, 'image')}, {counted(threads, 'thread')}": label(engine, file),
            "ms": float(1000 * np.median(ours)),
            "than the teacher": compared(of_side.get((engine, ExportedFile("teacher"))), ours),
            "than the float32 file in onnxruntime": compared(
                of_side["onnxruntime", replace(file, precision="float32")], ours
            ),
        }


def label(engine: str, file: ExportedFile) -> str:
    return f"{engine}: {file_label(file.name or 'teacher', file.precision)}"


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        batch=(1, "images at once"),
        rounds=(100, "rounds, of 3 calls each"),
        engines=([*ENGINES], "engines to compare, with onnxruntime"),
    )


if __name__ == "__main__":
    main()
