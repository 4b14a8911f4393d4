"""Give the pipeline thousands of wrong inputs, and check that each is read correctly or refused.

    python -m benchmarks.soak_inputs --inputs 2000 --seed 0

A tiny project is finished once. Then each input changes a copy of it (benchmarks/hostile.py), and a
separate process calls the reader of that kind of file like a stage does, within a time limit. The
input must be accepted with the correct result, or be refused with a message to the user. Everything
else is a failure: another exception, a wrong result, a process that dies or hangs, a program or a
connection that is started, a file written outside the copy. Exits with code 1 after a failure;
`--only KIND --first N --inputs 1` tries the input numbered N again.
"""

from pipeline.runtime.command import run_command

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks import hostile, soak_interrupts
from pipeline.commands import check
from pipeline.commands.predict import classify, most_likely, open_student
from pipeline.commands.store import inspect
from pipeline.data.prepared.dataset import open_dataset
from pipeline.data.sources.params import DatasetParams
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.models.spec import InputSpec, ModelSpec
from pipeline.networks import cifar_resnet, logits
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import STORE, TEACHER
from pipeline.runtime.params import load_section, student_names
from pipeline.runtime.progress import bar
from pipeline.stages import (
    baseline,
    compare,
    export,
    prepare,
    robustness,
    soft_targets,
    speed,
    student,
    teacher,
)
from pipeline.store.reading.store import open_store
from pipeline.teacher import foreign_checkpoint
from pipeline.views.loader import open_views
from pipeline.views.params import ViewsParams
from pipeline.views.policy import ViewPolicy

SECONDS = 30  # for one input
SIZE, CLASSES, IMAGES = 16, ("ant", "bee", "cat"), 12  # pixels; images per class
ENCODED, OUT = Path("data/encoded"), Path("data/out")
#: Imported logits: the folder of the file to change, and the path to read.
SOURCES = (
    ("answers_csv", "answers_csv/table.csv"),
    ("answers_npz", "answers_npz/table.npz"),
    ("answers_store", "answers_store"),
)
PARAMS = soak_interrupts.PARAMS | {
    "views": soak_interrupts.PARAMS["views"] | {"count": 2, "seed": 7},
    "soft_targets": {"encoding": "top_k", "k": 2, "precision": "float32", "batch_size": 16},
    "training": soak_interrupts.PARAMS["training"] | {"epochs": 1},
}
STAGES = [
    *((prepare,), (teacher,), (soft_targets,), (baseline, "small"), (student, "small")),
    *((robustness, "--teacher"), (robustness, "small"), (speed,), (compare,), (export, "small")),
]


class WrongResult(Exception):
    """An input was accepted, but the result is wrong."""


def expect(condition: bool, failure: str) -> None:
    if not condition:
        raise WrongResult(failure)


# Readers, one for each kind of file. Each returns if it accepts the input, or raises UserError.


def read_params_file() -> None:
    problems = check.problems()
    if problems:
        raise UserError("\n".join(problems))
    for name, model in check.SECTIONS.items():
        load_section(model, name)
    expect(len(student_names()) > 0, "no student")


def read_images(root: str = "images", *, storage: str = "pixels", quality: Any = 90) -> None:
    values = PARAMS["dataset"] | {"root": root, "storage": storage, "quality": quality}
    OUT.mkdir()
    description = prepare.write_dataset(DatasetParams(**values), OUT)
    dataset = open_dataset(OUT)
    ids = [sample for split in dataset.splits.values() for sample in split.sample_ids]
    if root == "images":
        expected = {
            path.relative_to(root).as_posix()
            for path in Path(root).glob("train/*/**/*")
            if path.is_file() and not any(part.startswith(".") for part in path.parts)
        }
        expect(set(ids) == expected, f"samples {sorted(set(ids) ^ expected)[:3]} of the folder")
    else:
        expected = {p.relative_to("images").as_posix() for p in Path("images").rglob("*.png")}
        expect(expected <= set(ids), f"samples {sorted(expected - set(ids))[:3]} are left out")
    expect(len(ids) == len(set(ids)) == sum(description.splits.values()), "samples are repeated")
    read_every_sample(dataset)


def read_every_sample(dataset: Any) -> None:
    """Make a view of every image, and read every label and id."""
    for split in dataset.splits.values():
        expect(len(split.sample_ids) == len(split.labels), "ids and labels")
        views = open_views(split, ViewPolicy("crop"), 0, torch.device("cpu"))
        for batch in views.batches(0, [np.arange(len(split))]):
            expect(batch.pixels.shape[0] == len(split), "views")


def read_checkpoint(path: Path) -> None:
    if path.suffix == ".onnx":
        network = foreign_checkpoint.load_foreign(description("onnx"), path)
    else:
        network = cifar_resnet.build("resnet8", len(CLASSES), 3)
        foreign_checkpoint.load_foreign_weights(network, path)
    scores = predict(network, description("onnx").input, torch.zeros(2, 3, SIZE, SIZE).byte())
    expect(list(scores.shape) == [2, len(CLASSES)], f"logits {list(scores.shape)}")


def description(family: str) -> ModelSpec:
    return ModelSpec(family, "resnet8", {}, CLASSES, InputSpec(3, SIZE, [0.5] * 3, [0.2] * 3))


def read_store() -> None:
    views, dataset = load_section(ViewsParams, "views"), open_dataset()
    fingerprint = checkpoint.fingerprint(TEACHER.model, produced_by="-")
    list(inspect(STORE))
    store = open_store(dataset, views, fingerprint)
    store.verify(dataset)
    expect(rows_of(store) == Path("rows").read_bytes(), "rows")


def rows_of(store: Any) -> bytes:
    rows = [
        store.gather(view, np.arange(size), split=split)
        for split, size in store.index.split_sizes.items()
        for view in range(store.num_views if split == "train" else 1)
    ]
    return b"".join(array.tobytes() for row in rows for array in row)


def read_prepared(directory: Path) -> None:
    read_every_sample(open_dataset(directory))


def read_results() -> None:
    sys.argv = ["compare"]
    compare.main()


def read_teacher() -> None:
    checkpoint.fingerprint(TEACHER.model, produced_by="-")
    network, spec = checkpoint.load(TEACHER.model, produced_by="-")
    scores = predict(network, spec.input, torch.zeros(2, spec.input.channels, SIZE, SIZE).byte())
    expect(list(scores.shape) == [2, spec.num_classes], f"logits {list(scores.shape)}")


def read_exported(path: Path) -> None:
    model = open_student(str(path))
    files, unreadable = sorted(Path("images").rglob("*.png"))[::6], []
    found = list(classify(model, files, unreadable))
    expect(len(found) + len(unreadable) == len(files), "predictions")
    for _, probabilities in found:
        expect(list(probabilities.shape) == [len(model.metadata.class_names)], "probabilities")
        most_likely(probabilities, model.metadata.class_names, 1)


def read_imported_logits(source: Path) -> None:
    dataset = open_dataset()
    taken = logits.open_source(source, dataset)
    rows = [taken.rows(name, 0, np.arange(len(s))) for name, s in dataset.splits.items()]
    for split, array in zip(dataset.splits.values(), rows, strict=True):
        expect(array.shape == (len(split), len(CLASSES)), f"logits {list(array.shape)}")
        expect(bool(np.isfinite(array).all()), "logits")
    if source.is_dir():  # a table has no checksums
        expect(b"".join(array.tobytes() for array in rows) == Path("answers").read_bytes(), "rows")


def change(*folders: str) -> Callable[[random.Random], None]:
    return lambda rng: hostile.change_a_file(rng, *folders)


def try_image(rng: random.Random) -> Callable[[], None]:
    rng.choice((hostile.image, hostile.image, hostile.image, hostile.names))(rng)
    storage = rng.choice(
        ({}, {"storage": "encoded"}, {"storage": "encoded", "quality": "original"})
    )
    return partial(read_images, **storage)


def trial(
    make: Callable[[random.Random], Any], read: Callable[[], None]
) -> Callable[[random.Random], Callable[[], None]]:
    def change_and_read(rng: random.Random) -> Callable[[], None]:
        make(rng)
        return read

    return change_and_read


def try_imported_logits(rng: random.Random) -> Callable[[], None]:
    folder, source = rng.choice(SOURCES)
    hostile.change_a_file(rng, folder)
    return partial(read_imported_logits, Path(source))


def try_prepared(rng: random.Random) -> Callable[[], None]:
    directory = rng.choice((Path("data/prepared"), ENCODED))
    hostile.change_a_file(rng, str(directory))
    return partial(read_prepared, directory)


#: For each kind: makes a wrong input in the current folder, and returns its reader.
KINDS: dict[str, Callable[[random.Random], Callable[[], None]]] = {
    "params.yaml": trial(hostile.params, read_params_file),
    "images": try_image,
    "archives": lambda rng: partial(read_images, hostile.archive(rng)),
    "checkpoints": lambda rng: partial(read_checkpoint, hostile.checkpoint(rng)),
    "ONNX files": lambda rng: partial(read_checkpoint, hostile.onnx_file(rng)),
    "stores": trial(change(str(STORE)), read_store),
    "answers": try_imported_logits,
    "exported students": lambda rng: partial(read_exported, hostile.exported(rng)),
    "prepared data": try_prepared,
    "results": trial(change("metrics", "predictions", str(STORE / "store.json")), read_results),
    "teachers": trial(change("models/teacher"), read_teacher),
}


# The project that the inputs change.


def make_project(root: Path) -> None:
    """Make a finished project in the folder, and the other files that inputs start from."""
    for label, name in enumerate(CLASSES):
        folder = root / "images/train" / name
        folder.mkdir(parents=True)
        for index in range(IMAGES):
            pixels = np.random.default_rng([label, index]).integers(
                0, 120, (SIZE, SIZE, 3), np.uint8
            )
            pixels[: SIZE // 2, : SIZE // 2, label] += 120
            Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS, sort_keys=False), "utf-8")
    with contextlib.chdir(root), contextlib.redirect_stdout(io.StringIO()):
        for stage, *arguments in STAGES:
            sys.argv = [stage.__name__, *arguments]
            stage.main()
        shutil.rmtree(".scratch")
        ENCODED.mkdir()
        values = PARAMS["dataset"] | {"storage": "encoded"}
        prepare.write_dataset(DatasetParams(**values), ENCODED)
        torch.save(cifar_resnet.build("resnet8", len(CLASSES), 3).state_dict(), "state.pth")
        write_onnx(Path("brought.onnx"))
        store = open_store(
            open_dataset(),
            load_section(ViewsParams, "views"),
            checkpoint.fingerprint(TEACHER.model, produced_by="-"),
        )
        Path("rows").write_bytes(rows_of(store))
        write_imported_logits()
        shutil.move("models/exported/small.onnx", "exported.onnx")


def write_imported_logits() -> None:
    """Write the teacher's logits as a store and as tables, like another system."""
    dense = PARAMS | {"soft_targets": PARAMS["soft_targets"] | {"encoding": "dense", "k": None}}
    for params, keep in ((dense, "answers_store"), (PARAMS, None)):
        Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")
        sys.argv = ["soft_targets"]
        soft_targets.main()
        if keep:
            shutil.copytree(STORE, keep)
    shutil.rmtree(".scratch")
    dataset = open_dataset()
    taken = logits.open_source(Path("answers_store"), dataset)
    rows = [taken.rows(name, 0, np.arange(len(s))) for name, s in dataset.splits.items()]
    Path("answers").write_bytes(b"".join(array.tobytes() for array in rows))
    table = pd.DataFrame(np.concatenate(rows), columns=list(dataset.class_names))
    ids = [sample for split in dataset.splits.values() for sample in split.sample_ids]
    for _, source in SOURCES[:2]:
        Path(source).parent.mkdir()
    table.assign(id=ids).to_csv(SOURCES[0][1], index=False)
    names = np.array(dataset.class_names)
    np.savez(SOURCES[1][1], ids=np.array(ids), logits=table.to_numpy(), class_names=names)


def write_onnx(path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": (8, 3, 3, 3), "v": (len(CLASSES), 8)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("GlobalAveragePool", ["b"], ["c"]),
            helper.make_node("Flatten", ["c"], ["d"]),
            helper.make_node("Gemm", ["d", "v"], ["e"], transB=1),
            helper.make_node("Softmax", ["e"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", len(CLASSES)])],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)


# Processes that try inputs, and one that watches them.


@dataclass(frozen=True)
class Outcome:
    kind: str
    number: int
    result: str  # accepted | refused | one of FAILURES
    message: str


FAILURES = ("traceback", "wrong result", "died", "hang", "executed", "wrote outside")
_STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
)
_CHANGES = (
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.symlink",
    "os.link",
)


class Watch:
    """Record forbidden actions of a process while an input is read, by Python's audit hooks."""

    def __init__(self, folder: Path):
        self._folder, self.noted, self.on = os.path.realpath(folder), "", False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in _STARTS:
            self.noted = self.noted or f"executed: {event} {str(arguments)[:200]}"
        writes = event in _CHANGES
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(path, (str, bytes, os.PathLike)) and bool(
                (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            )
        if writes and not isinstance(arguments[0], int):
            inside = os.path.realpath(os.fsdecode(arguments[0])).startswith(self._folder)
            if not inside and os.fsdecode(arguments[0]) != os.devnull:
                self.noted = self.noted or f"wrote outside: {event} {str(arguments)[:200]}"


def try_input(kind: str, number: int, seed: int, pristine: Path, watch: Watch) -> tuple[str, str]:
    """Try one input in the process's folder, the current one; returns result and message."""
    folder = Path.cwd()
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    rng = random.Random(f"{kind} {number} {seed}")
    read = KINDS[kind](rng)
    message = ""
    watch.noted, watch.on = "", True
    try:
        read()
        result = "accepted"
    except UserError as error:
        result, message = "refused", str(error)
    except WrongResult as error:
        result, message = "wrong result", str(error)
    except BaseException:  # a stage would end with it
        result, message = "traceback", traceback.format_exc()
    finally:
        watch.on = False
    if Path(hostile.CANARY).exists():
        return "executed", message
    if watch.noted:
        result, _, message = watch.noted.partition(": ")
    return result, message


def work(folder: Path, pristine: Path, seed: int, channel: Connection) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open while the process lives)
    os.dup2(sys.stdout.fileno(), 2)
    watch = Watch(folder)
    while (task := channel.recv()) is not None:
        channel.send(try_input(*task, seed, pristine, watch))


class Worker:
    """A process that tries one input after another, and is replaced if an input ends it."""

    def __init__(self, folder: Path, pristine: Path, seed: int):
        folder.mkdir(exist_ok=True)
        self._start = (folder, pristine, seed)
        self.task: tuple[str, int] | None = None
        self._begin()

    def _begin(self) -> None:
        self.channel, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=work, args=(*self._start, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, task: tuple[str, int]) -> None:
        self.task, self._task_start = task, time.monotonic()
        self.channel.send(task)

    def outcome(self) -> Outcome | None:
        """The outcome of its task; None while it runs."""
        kind, number = self.task
        if self.channel.poll():
            try:
                result, message = self.channel.recv()
            except EOFError:
                self._process.join()
                result, message = "died", f"exit code {self._process.exitcode}"
                self._begin()
        elif time.monotonic() - self._task_start > SECONDS:
            self._process.kill()
            self._process.join()
            result, message = "hang", f"more than {SECONDS} s"
            self._begin()
        else:
            return None
        self.task = None
        return Outcome(kind, number, result, message)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def soak(tasks: list[tuple[str, int]], seed: int, jobs: int) -> Iterator[Outcome]:
    """Try the inputs in `jobs` processes; yields the outcomes in any order."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "pristine").mkdir()
        make_project(root / "pristine")
        workers = [Worker(root / str(n), root / "pristine", seed) for n in range(jobs)]
        waiting = list(reversed(tasks))
        try:
            while waiting or any(worker.task for worker in workers):
                for worker in workers:
                    if worker.task is None and waiting:
                        worker.give(waiting.pop())
                wait([worker.channel for worker in workers if worker.task], timeout=1)
                for worker in workers:
                    if worker.task and (outcome := worker.outcome()):
                        yield outcome
        finally:
            for worker in workers:
                worker.stop()


def table(outcomes: list[Outcome]) -> dict[str, Counter]:
    counts: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    for outcome in outcomes:
        counts[outcome.kind]["inputs"] += 1
        counts[outcome.kind][outcome.result] += 1
    return {kind: count for kind, count in counts.items() if count}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.soak_inputs", description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", choices=list(KINDS), help="one kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of a kind")
    arguments = parser.parse_args()
    kinds = [arguments.only] if arguments.only else list(KINDS)
    tasks = [
        (kinds[n % len(kinds)], arguments.first + n // len(kinds)) for n in range(arguments.inputs)
    ]
    outcomes = []
    progress = bar(range(len(tasks)), "inputs")
    for outcome in soak(tasks, arguments.seed, arguments.jobs):
        next(progress, None)
        outcomes.append(outcome)
        if outcome.result in FAILURES:
            print(
                f"{outcome.kind} {outcome.number}: {outcome.result}\n{outcome.message}", flush=True
            )
    counts = table(outcomes)
    columns = ("inputs", "accepted", "refused", *FAILURES)
    print(f"{'':>14} " + " ".join(f"{column:>13}" for column in columns))
    for kind, count in counts.items():
        print(f"{kind:>14} " + " ".join(f"{count[column]:13,}" for column in columns))
    totals = {column: sum(count[column] for count in counts.values()) for column in columns}
    print(f"{'all':>14} " + " ".join(f"{totals[column]:13,}" for column in columns))
    totals = {name.replace(" ", "_"): number for name, number in totals.items()}
    print(json.dumps({"benchmark": "soak_inputs", "seed": arguments.seed, **totals}))
    if any(outcome.result in FAILURES for outcome in outcomes):
        raise UserError("some inputs failed; expected each to be read correctly or refused")


if __name__ == "__main__":
    run_command(main)
