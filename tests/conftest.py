"""A small project in a temporary folder: 3 classes of 16-pixel images, ResNet-8 for everything."""

import functools
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from hypothesis import settings
from import_closure import ROOT
from PIL import Image

from pipeline.comparison.measurement import latency
from pipeline.data.prepared.dataset import Dataset, DatasetDescription, fingerprint_of, open_dataset
from pipeline.models import checkpoint
from pipeline.runtime.files import write_json
from pipeline.runtime.outputs import PREPARED, TEACHER
from pipeline.runtime.params import load_section
from pipeline.store.reading.store import Store, open_store
from pipeline.students import loop
from pipeline.views.params import ViewsParams

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# Background jobs ignore Ctrl-C, and so would the processes that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # under other load, two threads wait for one another

PARAMS = {
    "dataset": {
        "source": "image_folder",
        "root": "images",
        "storage": "pixels",
        "image_size": 16,
        "channels": 3,
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "split_seed": 0,
    },
    "views": {
        "policy": "crop_flip",
        "rand_augment": "none",
        "mix": "none",
        "count": 3,
        "seed": 7,
        "image_size": 16,
    },
    "teacher": {
        "family": "cifar_resnet",
        "network": "resnet8",
        "weights": "train",
        "checkpoint": "models/imported/none",
        "training": {  # just enough for the gate
            "epochs": 6,
            "batch_size": 8,
            "learning_rate": 0.05,
            "policy": "crop_flip",
            "seed": 1,
        },
    },
    "soft_targets": {"encoding": "dense", "precision": "float32", "batch_size": 13},
    "training": {
        "epochs": 2,
        "batch_size": 16,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "seeds": 2,
    },
    "distillation": {
        "method": "kd",
        "temperature": 4.0,
        "soft_label_weight": 0.9,
        "hard_label_weight": 0.1,
    },
    "export": {"precision": "float32", "int8_training": "none"},
    "students": {
        "small": {
            "family": "cifar_resnet",
            "network": "resnet8",
            "training": {},
            "distillation": {},
        }
    },
}


#: The outputs of a training; `kind` is students or baselines.
OUTPUTS = [
    "models/{kind}/small/weights.safetensors",
    "models/{kind}/small/network.json",
    "predictions/{kind}/small.safetensors",
    "metrics/{kind}/small.json",
    "metrics/history/{kind}/small.csv",
]


def write_images(root: Path, per_class: int = 20, size: int = 16, split: str = "train") -> None:
    """Write images of noise; the first quarter is brighter in the class's channel."""
    for label, name in enumerate(("ant", "bee", "cat")):
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            rng = np.random.default_rng([label, index])
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[: size // 2, : size // 2, label] += 120
            Image.fromarray(pixels).save(folder / f"{index:03d}.png")


def write_params(root: Path, params: dict) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")


def run_stage(name: str, *arguments: str) -> None:
    """Run the stage's `main` in this process and the current folder."""
    run_module(f"pipeline.stages.{name}", *arguments)


def run_stage_interrupted(stage: str, name: str) -> None:
    """Run a stage that trains a student or a baseline, and interrupt it in its second epoch."""
    original, calls = loop.evaluate, []

    def evaluate(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            run_stage(stage, name)


def run_module(module: str, *arguments: str) -> None:
    """Run the `main` of a stage or command in this process and the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(module).main()


@contextmanager
def memory_left(size: int) -> Iterator[None]:
    """Let this process allocate so many bytes more, and no others."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def opened() -> Store:
    """Open the current folder's store and verify every byte."""
    teacher = checkpoint.fingerprint(TEACHER.model, produced_by="-")
    views = load_section(ViewsParams, "views")
    dataset = open_dataset().resized(views.image_size)
    store = open_store(dataset, views, teacher)
    store.verify(dataset)
    return store


def change_params(section: str, **values: object) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params[section] |= values
    write_params(Path(), params)


def forget_trainings() -> None:
    """Remove the states of trainings, finished ones, too, so that each trains again."""
    shutil.rmtree(".scratch/training", ignore_errors=True)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def prepare(**dataset: object) -> Dataset:
    """Prepare the current folder's images, with these changes of PARAMS."""
    write_params(Path(), {"dataset": PARAMS["dataset"] | dataset})
    run_stage("prepare")
    return open_dataset()


def take_as_prepared() -> None:
    """Update the fingerprint of data/prepared after a test edited it."""
    path = PREPARED / "dataset.json"
    description = DatasetDescription.model_validate_json(path.read_bytes())
    changed = {"fingerprint": fingerprint_of(PREPARED, description)}
    write_json(path, description.model_copy(update=changed).model_dump(exclude_none=True))


def run_every_stage(root: Path, params: dict) -> None:
    """Run every stage in the folder, which has the images."""
    train_every_network(root, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        compare_every_network()


def train_every_network(root: Path, params: dict) -> None:
    """Run the stages up to the trainings in the folder, which has the images."""
    write_params(root, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in ("prepare", "teacher", "soft_targets"):
            run_stage(stage)
        for stage in ("baseline", "student", "int8_training"):
            run_stage(stage, "small")
    shutil.rmtree(root / ".scratch")  # a test that trains a teacher must not resume


def compare_every_network() -> None:
    """Run the stages after the trainings in the current folder."""
    for stage in ("export", "robustness"):
        for models in ("--teacher", "small"):
            run_stage(stage, models)
    for stage in ("speed", "compare"):
        run_stage(stage)


def clone_into(root: Path) -> None:
    """Make a clone of this project with the images, in which nothing has run."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).splitlines():
        generated = name == "dvc.lock" or name.startswith("metrics/")
        if not generated and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    write_images(root / "images")


def finish_clone(root: Path) -> None:
    """Make a clone in which every stage has run in this process, without DVC."""
    clone_into(root)
    run_every_stage(root, PARAMS)


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A copy of the folder that `build` fills, which one of pytest's workers builds for all."""
    base = factory.getbasetemp()
    original = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"built_{name}"
    with FileLock(f"{original}.lock"):
        if not original.exists():
            unfinished = original.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(unfinished)
            unfinished.rename(original)
    return shutil.copytree(original, factory.mktemp(name), dirs_exist_ok=True)


@pytest.fixture(scope="session", autouse=True)
def one_list_of_operators() -> None:
    """Let torch.onnx make its list of operators once, not in 0.5 s for each export of a test."""
    module = importlib.import_module("torch.onnx._internal.exporter._registration")
    registry = module.ONNXRegistry
    registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))


@pytest.fixture(scope="session", autouse=True)
def one_graph_of_equal_networks() -> None:
    """Let the exports of all tests share graphs, as those of a student's seeds do: torch takes
    seconds to capture one."""
    module = importlib.import_module("pipeline.export.to_onnx")
    original, graphs = module._captured, {}

    @functools.wraps(original)
    def captured(network: torch.nn.Module, metadata: Any) -> object:
        parts = list(network.modules())
        values = [{k: value for k, value in vars(part).items() if k[0] != "_"} for part in parts]
        size = (metadata.image_size, metadata.channels, metadata.opset)
        key = (f"{network} {values}", size, *map(type, parts))
        if key not in graphs:
            graphs[key] = original(network, metadata)
        return graphs[key]

    module._captured = captured


@pytest.fixture(scope="session", autouse=True)
def full_rounds() -> list[dict]:
    """Time networks in the fewest rounds, which saves a second for each `speed` of a test; return
    the rounds of a real run."""
    full = [latency.SINGLE_IMAGE, latency.FULL_BATCH]
    latency.SINGLE_IMAGE, latency.FULL_BATCH = (
        each | {"rounds": each["min_rounds"]} for each in full
    )
    return full


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which every stage has run. Read it; `project` is a copy to change."""
    clone = built_once(tmp_path_factory, "clone", finish_clone)
    root = tmp_path_factory.mktemp("project")
    shutil.copy(clone / "params.yaml", root)
    for name in ("images", "data", "models", "predictions", "metrics", "reports"):
        shutil.copytree(clone / name, root / name)
    return root


@pytest.fixture
def project(finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project, as the current folder."""
    root = tmp_path / "project"
    shutil.copytree(finished_project, root)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def exported(finished_project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished project, as the current folder. Only read it."""
    monkeypatch.chdir(finished_project)
    return finished_project


@pytest.fixture(scope="session")
def finished_encoded_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `finished_project`, of photographs that are kept encoded."""
    import encoded_photographs  # noqa: PLC0415  (it imports this module)

    def build(root: Path) -> None:
        encoded_photographs.write_pictures(root / "images")
        run_every_stage(root, encoded_photographs.encoded_params())

    return built_once(tmp_path_factory, "encoded", build)


@pytest.fixture
def encoded_project(
    finished_encoded_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of the finished project of encoded images, as the current folder."""
    root = tmp_path / "project"
    shutil.copytree(finished_encoded_project, root)
    monkeypatch.chdir(root)
    return root


@contextmanager
def small_file_system(folder: Path) -> Iterator[Path]:
    """Create the folder as a file system of 128 KiB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
