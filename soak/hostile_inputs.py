"""Give the pipeline thousands of wrong inputs, and check that each is read correctly or refused.

    python -m soak.hostile_inputs --inputs 2475 --seed 0

A tiny project is finished once. Then each input changes a copy of it (soak/hostile.py), and a
process of its own calls the reader of that kind of file like a stage does, within a time limit. The
input must be accepted with the correct result, or be refused with a message to the user. Everything
else is a failure: another exception, a wrong result, a process that dies or hangs, a program or a
connection that is started, a file written outside the copy. `--only KIND --first N --inputs 1`
tries the input numbered N again.
"""

from pipeline.runtime.command import run_command

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pandas as pd
import torch
from onnx import numpy_helper

from pipeline.commands import check
from pipeline.commands.import_logits import import_logits
from pipeline.commands.predict import classify, open_model
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
from pipeline.stages import prepare
from pipeline.store.format.views_by_split import open_views_by_split
from pipeline.store.reading.index import read_index
from pipeline.store.reading.store import open_store
from pipeline.store.writing.imported_logits import open_imported
from pipeline.teacher import foreign_teacher
from pipeline.views.loader import open_views
from pipeline.views.params import ViewsParams
from pipeline.views.policy import ViewPolicy
from soak import common, hostile

SECONDS = 30  # for one input
SIZE, CLASSES, IMAGES = 16, common.CLASSES, 36  # pixels; images of all classes
ENCODED, ONNX, EXPORTED = Path("data/encoded"), Path("brought.onnx"), Path("exported.onnx")
DENSE = common.params(size=SIZE)
PARAMS = DENSE | {"soft_targets": DENSE["soft_targets"] | {"encoding": "top_k", "k": 2}}
#: Logits of another system: the folder of the file to change -> the path to read.
IMPORTED = {
    "imported_csv": "imported_csv/table.csv",
    "imported_npz": "imported_npz/table.npz",
    "imported_store": "imported_store",
}


class WrongResult(Exception):
    """An input was accepted, but the result is wrong."""


def expect(condition: bool, failure: str) -> None:
    if not condition:
        raise WrongResult(failure)


# Readers, one for each kind of file. Each returns if it accepts the input, or raises UserError.


def read_params_file() -> None:
    if problems := check.problems():
        raise UserError("\n".join(problems))
    for name, model in check.SECTIONS.items():
        load_section(model, name)
    expect(len(student_names()) > 0, "no student")


def read_images(root: str = "images", **storage: Any) -> None:
    out = Path("data/out")
    out.mkdir()
    values = PARAMS["dataset"] | {"root": root} | storage
    sizes = prepare.write_dataset(DatasetParams(**values), out).splits
    splits = open_dataset(out).splits
    ids = [sample for split in splits.values() for sample in split.sample_ids]
    files = [p.relative_to("images") for p in Path("images").glob("train/*/**/*") if p.is_file()]
    hidden = {path for path in files if any(part.startswith(".") for part in path.parts)}
    possible = {path.as_posix() for path in files if path not in hidden}
    expected = {name for name in possible if name.endswith((".png", ".jpg"))}
    # An archive of the images may have a member more.
    same = expected <= set(ids) and (set(ids) <= possible or root != "images")
    expect(same, f"samples {sorted(set(ids) ^ expected)[:3]}")
    expect(len(ids) == len(set(ids)) == sum(sizes.values()), "samples are repeated")
    read_prepared(out)


def read_prepared(directory: Path) -> None:
    """Make a view of every image, and read every label and id."""
    for split in open_dataset(directory).splits.values():
        expect(len(split.sample_ids) == len(split.labels), "ids and labels")
        views = open_views(split, ViewPolicy("crop"), 0, torch.device("cpu"))
        for batch in views.batches(0, [np.arange(len(split))]):
            expect(batch.pixels.shape[0] == len(split), "views")


def read_checkpoint(path: Path) -> None:
    classes, spec = tuple(CLASSES), InputSpec(3, SIZE, [0.5] * 3, [0.2] * 3)
    family = "onnx" if path.suffix == ".onnx" else "cifar_resnet"
    description = ModelSpec(family, "resnet8", {}, classes, spec)
    network, _ = foreign_teacher.load_foreign(description, path)
    check_scores(network, spec, len(CLASSES))


def read_teacher() -> None:
    checkpoint.fingerprint(TEACHER.model, produced_by="-")
    network, spec = checkpoint.load(TEACHER.model, produced_by="-")
    check_scores(network, spec.input, spec.num_classes)


def check_scores(network: torch.nn.Module, spec: InputSpec, classes: int) -> None:
    scores = predict(network, spec, torch.zeros(2, spec.channels, SIZE, SIZE).byte())
    expect(list(scores.shape) == [2, classes], f"logits {list(scores.shape)}")


def the_store() -> Any:
    teacher = checkpoint.fingerprint(TEACHER.model, produced_by="-")
    return open_store(open_dataset(), load_section(ViewsParams, "views"), teacher)


def read_store() -> None:
    list(inspect(STORE))
    store = the_store()
    store.verify(open_dataset())
    expect(rows_of(store) == Path("rows").read_bytes(), "rows")


def rows_of(store: Any) -> bytes:
    rows = [
        store.gather(view, np.arange(size), split=split)
        for split, size in store.index.split_sizes.items()
        for view in range(store.num_views if split == "train" else 1)
    ]
    return b"".join(array.tobytes() for row in rows for array in row)


def read_results() -> None:
    run_stage("compare")


def read_exported(path: Path) -> None:
    model = open_model(path)[0]
    files, unreadable = sorted(Path("images").rglob("*.png"))[::6], []
    found, names = list(classify(model, files, unreadable, [])), model.metadata.class_names
    expect(len(found) + len(unreadable) == len(files), "predictions")
    for _, probabilities in found:
        expect(list(probabilities.shape) == [len(names)], "probabilities")


def read_imported(source: str) -> None:
    rows = rows_of_imported(Path(source))
    for split, array in zip(open_dataset().splits.values(), rows, strict=True):
        expect(array.shape == (len(split), len(CLASSES)), f"logits {list(array.shape)}")
        expect(bool(np.isfinite(array).all()), "logits")
    if Path(source).is_dir():  # a table has no checksums
        expect(b"".join(map(bytes, rows)) == Path("imported_rows").read_bytes(), "rows")


def rows_of_imported(path: Path) -> list[np.ndarray]:
    """The rows of view 0 of each split, as the stage `soft_targets` reads them."""
    if not path.is_dir():
        import_logits(path, Path("imported"))
        path = Path("imported")
    dataset, index = open_dataset(), read_index(STORE)
    source = checkpoint.LogitSource(
        family="logits",
        network="mine",
        class_names=dataset.class_names,
        path=str(path),
        contents_sha256=logits.open_source(path, dataset).contents_sha256,
    )
    device = torch.device("cpu")
    views = open_views_by_split(dataset, index, device)
    opened = open_imported(source, dataset, index, 1, views, device)
    return [opened.logits(name, 0, np.arange(len(s))) for name, s in dataset.splits.items()]


# Kinds of input. Each makes one in the current folder, and returns its reader.


def file_of(*folders: str | Path, read: Callable[[], None]) -> Callable[[random.Random], Callable]:
    def change(rng: random.Random) -> Callable[[], None]:
        hostile.change_a_file(rng, *map(str, folders))
        return read

    return change


def params_file(rng: random.Random) -> Callable[[], None]:
    hostile.params(rng)
    return read_params_file


def images(rng: random.Random) -> Callable[[], None]:
    rng.choice((hostile.image, hostile.image, hostile.image, hostile.names))(rng)
    encoded = {"storage": "encoded"}
    return partial(read_images, **rng.choice(({}, encoded, encoded | {"quality": "original"})))


def imported(rng: random.Random) -> Callable[[], None]:
    folder, source = rng.choice(list(IMPORTED.items()))
    return file_of(folder, read=partial(read_imported, source))(rng)


def prepared(rng: random.Random) -> Callable[[], None]:
    directory = rng.choice((Path("data/prepared"), ENCODED))
    return file_of(directory, read=partial(read_prepared, directory))(rng)


KINDS: Mapping[str, Callable[[random.Random], Callable[[], None]]] = {
    "params.yaml": params_file,
    "images": images,
    "archives": lambda rng: partial(read_images, hostile.archive(rng)),
    "checkpoints": lambda rng: partial(read_checkpoint, hostile.checkpoint(rng)),
    "ONNX files": lambda rng: partial(read_checkpoint, hostile.onnx_file(rng, ONNX)),
    "stores": file_of(STORE, read=read_store),
    "imported logits": imported,
    "exported students": lambda rng: partial(read_exported, hostile.onnx_file(rng, EXPORTED)),
    "prepared data": prepared,
    "results": file_of("metrics", "predictions", STORE / "store.json", read=read_results),
    "teachers": file_of(TEACHER.model, read=read_teacher),
}


# The project that the inputs change.


def run_stage(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    importlib.import_module(f"pipeline.stages.{name}").main()


def make_project() -> None:
    """Make a finished project in the current folder, and the other files that inputs start from."""
    common.write_folder(Path("images"), common.images(IMAGES, SIZE))
    common.write_params(Path(), DENSE)
    for name in ("prepare", "teacher", "soft_targets"):
        run_stage(name)
    shutil.copytree(STORE, "imported_store")
    rows = rows_of_imported(Path("imported_store"))
    Path("imported_rows").write_bytes(b"".join(map(bytes, rows)))
    dataset = open_dataset()
    table = pd.DataFrame(np.concatenate(rows), columns=list(dataset.class_names))
    ids = [sample for split in dataset.splits.values() for sample in split.sample_ids]
    for folder in ("imported_csv", "imported_npz"):
        Path(folder).mkdir()
    table.assign(id=ids).to_csv(IMPORTED["imported_csv"], index=False)
    columns = {"ids": np.array(ids), "class_names": np.array(dataset.class_names)}
    np.savez(IMPORTED["imported_npz"], logits=table.to_numpy(), **columns)
    common.write_params(Path(), PARAMS)
    for name, *arguments in list(common.STAGES.values())[2:]:
        run_stage(name, *arguments)
    shutil.copy("models/exported/small.onnx", EXPORTED)
    shutil.rmtree(".scratch")
    ENCODED.mkdir()
    prepare.write_dataset(DatasetParams(**PARAMS["dataset"] | {"storage": "encoded"}), ENCODED)
    torch.save(cifar_resnet.build("resnet8", len(CLASSES), 3).state_dict(), "state.pth")
    write_onnx(ONNX)
    Path("rows").write_bytes(rows_of(the_store()))


def write_onnx(path: Path) -> None:
    """Write a small network of another framework."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[n, 3, {SIZE}, {SIZE}] x) => (float[n, {len(CLASSES)}] y) {{
            a = Conv(x, w)
            b = Relu(a)
            c = GlobalAveragePool(b)
            d = Flatten(c)
            e = Gemm<transB = 1>(d, v)
            y = Softmax(e)
        }}"""
    )
    for name, shape in {"w": (8, 3, 3, 3), "v": (len(CLASSES), 8)}.items():
        weights = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weights, name))
    onnx.save(model, path)


# Each input is tried in a process of its own.

FAILURES = ("traceback", "wrong result", "died", "hang", "executed", "wrote outside")
_STARTS = {f"os.{name}" for name in ("system", "exec", "posix_spawn", "fork")}
_STARTS |= {"subprocess.Popen", "socket.connect"}
_CHANGES = {
    f"os.{name}" for name in ("mkdir", "remove", "rename", "rmdir", "truncate", "symlink", "link")
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Watch:
    """Record forbidden actions of a process while an input is read, by Python's audit hooks."""

    def __init__(self, folder: Path):
        self._folder, self.noted, self.on = os.path.realpath(folder), "", False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on or self.noted:
            return
        if event in _STARTS:
            self.noted = f"executed: {event} {str(arguments)[:200]}"
        if event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITES):
            path = arguments[0]
            if isinstance(path, int) or os.fsdecode(path) == os.devnull:
                return
            if not os.path.realpath(os.fsdecode(path)).startswith(self._folder):
                self.noted = f"wrote outside: {event} {str(arguments)[:200]}"


def try_input(kind: str, number: int, seed: int) -> tuple[str, str]:
    """Try one input in the current folder; returns result and message."""
    watch = Watch(Path.cwd())
    read, message = KINDS[kind](random.Random(f"{kind} {number} {seed}")), ""
    watch.on = True
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


class Process:
    """A function's call in a process and a folder of its own."""

    def __init__(self, folder: Path, call: Callable[[], Any]):
        self.folder, self._begin = folder, time.monotonic()
        self.channel, theirs = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")  # a fresh one would import for seconds
        self._process = context.Process(target=self._work, args=(call, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def _work(self, call: Callable[[], Any], channel: Any) -> None:
        os.chdir(self.folder)
        sys.stdout = io.StringIO()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        channel.send(call())

    def outcome(self) -> tuple[str, str] | None:
        """What the call returned, or how its process ended; None while it runs."""
        found = None
        if self.channel.poll():
            try:
                found = self.channel.recv()
            except EOFError:
                self._process.join()
                found = "died", f"exit code {self._process.exitcode}"
        elif time.monotonic() - self._begin > SECONDS:
            found = "hang", f"more than {SECONDS} s"
        if found is not None:
            self._process.kill()
            self._process.join()
        return found


def soak(tasks: list[tuple[str, int]], seed: int, jobs: int) -> Iterator[tuple[str, int, str, str]]:
    """Try the inputs, `jobs` at a time; yields kind, number, result and message in any order."""
    waiting, running = list(reversed(tasks)), {}
    with tempfile.TemporaryDirectory() as folder:
        pristine = Path(folder, "pristine")
        pristine.mkdir()
        with contextlib.chdir(pristine), contextlib.redirect_stdout(io.StringIO()):
            make_project()
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop()
                copy = Path(folder, f"{task[0].replace(' ', '_')}-{task[1]}")
                shutil.copytree(pristine, copy)
                running[task] = Process(copy, partial(try_input, *task, seed))
            wait([process.channel for process in running.values()], timeout=1)
            for task, process in list(running.items()):
                if outcome := process.outcome():
                    shutil.rmtree(process.folder)
                    del running[task]
                    yield *task, *outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2475, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", choices=list(KINDS), help="one kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of a kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [arguments.only] if arguments.only else list(KINDS)
    tasks = [
        (kinds[n % len(kinds)], arguments.first + n // len(kinds)) for n in range(arguments.inputs)
    ]
    counts: dict[str, Counter] = {kind: Counter() for kind in (*kinds, "all")}
    failures, progress = [], bar(range(len(tasks)), "inputs")
    for kind, number, result, message in soak(tasks, arguments.seed, arguments.jobs):
        next(progress, None)
        counts[kind].update(("inputs", result))
        counts["all"].update(("inputs", result))
        if result in FAILURES:
            failures.append(f"{kind} {number}: {result}: {message}")
            print(failures[-1], flush=True)
    columns = ("inputs", "accepted", "refused", *FAILURES)
    rows = [{"kind": k} | {column: c[column] for column in columns} for k, c in counts.items()]
    totals = {column: counts["all"][column] for column in columns[:3]}
    common.conclude(rows, failures, campaign="hostile_inputs", seed=arguments.seed, **totals)


if __name__ == "__main__":
    run_command(main)
