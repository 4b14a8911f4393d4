"""What does int8 cost, with and without `int8_training`?

    python -m benchmarks.int8_training PROJECT

PROJECT is the folder of a finished run of pixels, such as the first run. Its students train again
with each seed, from its soft targets, by their own stages in a copy, and `int8_training` after
them. Each becomes a float32 file and two int8 files: of its own weights, and of those of
`int8_training`. Differences are in points of accuracy on the test images, int8 less float32 file:
the mean over the seeds and its 95 % interval by Student's t. Bytes and latency (one image, one
thread, alternating rounds) are the float32 file's over the int8 file's.
"""

from pipeline.runtime.command import run_command

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.special import log_softmax

from benchmarks.harness import Row, alternate, mean_interval, median, run_benchmark
from pipeline.data.prepared.dataset import Dataset, open_dataset
from pipeline.data.sources.params import DatasetParams
from pipeline.export.int8 import calibration_views, to_int8
from pipeline.export.running.file_images import file_logits
from pipeline.export.running.onnx_model import ExportedNetwork
from pipeline.export.to_onnx import to_onnx
from pipeline.models import checkpoint
from pipeline.runtime.outputs import ModelOutputs
from pipeline.runtime.params import load_section, student_names
from pipeline.stages.export import onnx_metadata, reading_of
from pipeline.views.params import ViewsParams

ROOT = Path(__file__).parents[1]
RUNS = 20  # in a round: one takes less than a millisecond
WAYS = ("int8", "after int8_training")
FILES = ("float32", *WAYS)


def copy_project(source: Path, copy: Path, seed: int, options: dict[str, Any]) -> None:
    """Write a project with the data, the teacher and the soft targets of another."""
    params = yaml.safe_load((source / "params.yaml").read_text("utf-8"))
    params["training"]["seeds"] = seed
    params["export"] = {"precision": "int8", "int8_training": options}
    (copy / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")
    (copy / "models").mkdir()
    for name in ("data", "models/teacher"):
        (copy / name).symlink_to((source / name).resolve())


def train(stage: str, name: str) -> None:
    """Run a stage in the current folder, with the code beside this file."""
    command = [sys.executable, "-m", f"pipeline.stages.{stage}", name]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, check=True
    )


def float32_file(folder: Path, name: str, dataset: Dataset) -> bytes:
    """Export the weights of a folder as a float32 file of a student."""
    model = ModelOutputs("distilled", name)
    network, spec = checkpoint.load(folder, produced_by=f"dvc repro {model.stage}")
    reading = reading_of(load_section(DatasetParams, "dataset"), spec.input)
    return to_onnx(network, spec.input, onnx_metadata(model, spec, dataset, reading))


def files_of(name: str, dataset: Dataset) -> dict[str, bytes]:
    """The float32 file of a student, and its int8 files."""
    model, views = ModelOutputs("distilled", name), load_section(ViewsParams, "views")
    files = {"float32": float32_file(model.model, name, dataset)}
    trained = float32_file(model.int8_model, name, dataset)
    for way, content in zip(WAYS, (files["float32"], trained), strict=True):
        files[way] = to_int8(content, calibration_views(dataset, views))
    return files


def results_of_seed(
    project: Path, seed: int, options: dict[str, Any], rounds: int
) -> dict[str, dict[str, Any]]:
    """Train every student with a seed; returns the figures of its files, by student."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary, chdir(temporary):
        copy_project(project, Path(), seed, options)
        dataset = open_dataset()
        test = dataset.splits["test"]
        for name in student_names():
            train("student", name)
            train("int8_training", name)
            files = files_of(name, dataset)
            sessions = {way: ExportedNetwork(each, way, 1) for way, each in files.items()}
            found[name] = {}
            for way, session in sessions.items():
                logits = file_logits(session, test)
                correct = log_softmax(logits, axis=1)[np.arange(len(test)), test.labels]
                found[name][f"accuracy, {way}"] = 100 * np.mean(logits.argmax(1) == test.labels)
                found[name][f"nll, {way}"] = -np.mean(correct)
            image = np.ascontiguousarray(test.images[:1])
            sides = {way: partial(timed, each, image) for way, each in sessions.items()}
            times = alternate(sides, rounds)
            for way in WAYS:
                found[name][f"bytes, {way}"] = len(files["float32"]) / len(files[way])
                found[name][f"latency, {way}"] = times["float32"] / times[way]
    return found


def timed(session: ExportedNetwork, image: np.ndarray, _: int) -> None:
    for _ in range(RUNS):
        session.logits(image)


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    options = {"epochs": arguments.epochs, "learning_rate_factor": arguments.factor}
    project = arguments.project.resolve()
    results = [
        results_of_seed(project, seed, options, arguments.rounds) for seed in range(arguments.seeds)
    ]
    losses = {way: np.empty((0,)) for way in WAYS}
    for name in results[0]:
        of_student = [result[name] for result in results]
        accuracy, nll = (
            {way: np.array([each[f"{key}, {way}"] for each in of_student]) for way in FILES}
            for key in ("accuracy", "nll")
        )
        for way in WAYS:
            lost = accuracy[way] - accuracy["float32"]
            losses[way] = np.append(losses[way], lost)
            yield {
                "student, file": f"{name}, {way}",
                "float32, %": f"{accuracy['float32'].mean():.2f}",
                "int8, %": f"{accuracy[way].mean():.2f}",
                "points, mean and 95 % interval": mean_interval(lost),
                "float32, NLL": float(nll["float32"].mean()),
                "int8, NLL": float(nll[way].mean()),
                "times smaller": of_student[0][f"bytes, {way}"],
                "times faster": median(
                    np.concatenate([each[f"latency, {way}"] for each in of_student])
                ),
            }
    for way in WAYS:
        yield {"all students": way, "points, mean and 95 % interval": mean_interval(losses[way])}


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        "project",
        seeds=(3, "trainings of each student"),
        epochs=(2, "of int8_training"),
        factor=(0.1, "learning_rate_factor of int8_training"),
        rounds=(40, "of timing, for each training"),
    )


if __name__ == "__main__":
    run_command(main)
