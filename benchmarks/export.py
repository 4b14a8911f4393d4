"""What does a further network of one architecture cost to export?

    OMP_NUM_THREADS=1 python -m benchmarks.export

Exports the networks of the first run's students: alone, as the first of a stage is, and with the
graph that the first left. Prints the medians of both, in seconds, and their ratio.
"""

import argparse
from collections.abc import Iterator

import torch

from benchmarks.harness import Row, alternate, median, run_benchmark
from pipeline.export.running.onnx_model import OnnxMetadata
from pipeline.export.running.reading import Reading
from pipeline.export.to_onnx import OPSET, Graphs, to_onnx
from pipeline.models.spec import InputSpec, ModelSpec, build
from pipeline.runtime.params import student_names
from pipeline.students.params import load_student

SIDE, CLASSES = 28, list("0123456789")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    metadata = OnnxMetadata(
        **{"name": "-", "role": "distilled", "precision": "float32", "fingerprint": "-"},
        **{"class_names": CLASSES, "opset": OPSET, "channels": 3, "image_size": SIDE},
        reading=Reading(storage="pixels", image_size=SIDE),
    )
    for name in student_names():
        student = load_student(name)
        params = student.network
        spec = InputSpec(3, params.input_size or SIDE, [0.5] * 3, [0.5] * 3)
        described = ModelSpec(student.family, params.name, params.options, CLASSES, spec)
        network = build(described).eval()
        graphs: Graphs = {}
        to_onnx(network, spec, metadata, graphs)
        sides = {
            "alone": lambda _, n=network, s=spec: to_onnx(n, s, metadata),
            "with a graph": lambda _, n=network, s=spec, g=graphs: to_onnx(n, s, metadata, g),
        }
        times = alternate(sides, arguments.rounds)
        row = {side: median(values) for side, values in times.items()}
        yield {"network": name} | row | {"ratio": median(times["alone"] / times["with a graph"])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_benchmark(__doc__, measure, rounds=(5, "rounds of each network"))
