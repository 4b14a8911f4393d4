"""A small run gives the values that it has always given.

Every stage that computes runs in float64, where another processor or library moves a value by
about 1e-12, and rarely a float16 of the store by one step. (An exported file computes in float32.)
After a change of a value on purpose, write the file again and say why:

    python tests/test_golden_run.py
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import PARAMS, write_images
from import_closure import ROOT
from safetensors.numpy import load_file
from stage_process import finish, fork

GOLDEN = ROOT / "tests/files/golden_run.json"
TOLERANCE = 1e-4  # relative; other instructions moved a value by 1e-6 at most
OPTIMISATION = {"batch_size": 17, "warmup_epochs": 1, "ema_decay": 0.5, "gradient_clip_norm": 1.0}
STUDENT = PARAMS["students"]["small"]
RUN_PARAMS = PARAMS | {
    "views": PARAMS["views"]
    | {"rand_augment": {"operations": 1, "magnitude": 9}, "mix": {"method": "mixup", "alpha": 0.4}},
    "teacher": PARAMS["teacher"]
    | {"training": PARAMS["teacher"]["training"] | OPTIMISATION | {"epochs": 2}},
    "students": {
        "plain": STUDENT,
        "every_option": STUDENT
        | {
            "training": OPTIMISATION
            | {"optimizer": "adamw", "learning_rate": 0.01, "epochs": 3, "label_smoothing": 0.1},
            "distillation": {"method": "dist", "temperature": 2.0},
        },
    },
}
STAGES = (
    *("prepare", "teacher", "soft_targets"),
    *(f"{stage}:{name}" for name in RUN_PARAMS["students"] for stage in ("student", "baseline")),
    *("int8_training:plain", "export:plain", "robustness:plain"),
)


def run(folder: Path) -> dict[str, object]:
    """Run STAGES in an empty folder; returns the figures of every file that they wrote."""
    write_images(folder / "images")
    (folder / "params.yaml").write_text(yaml.safe_dump(RUN_PARAMS, sort_keys=False), "utf-8")
    with chdir(folder):
        finish(fork(ROOT / "tests/float64_stages.py", *STAGES))
    outputs = ("data", "models", "predictions", "metrics")
    paths = sorted(path for name in outputs for path in (folder / name).rglob("*.*"))
    found = {str(path.relative_to(folder)): dict(figures(path)) for path in paths}
    return {path: values for path, values in found.items() if values}


def figures(path: Path) -> Iterator[tuple[str, object]]:
    """The values of a file; of an array three sums, one of which depends on the order."""
    if path.suffix == ".safetensors":
        arrays = [array.ravel() for _, array in sorted(load_file(path).items())]
        yield from sums("all tensors", np.concatenate(arrays))
    elif path.suffix == ".h5":
        with h5py.File(path) as file:
            yield from sums("logits", file["logits"][:].astype(np.float64))
    elif path.suffix == ".csv":
        for name, column in pd.read_csv(path).items():
            yield from sums(name, column.to_numpy(np.float64))
    elif path.suffix == ".npy":
        yield from sums("array", np.load(path).astype(np.float64))
    elif "export" in path.parts:
        return  # a file's distance from PyTorch depends on the processor
    elif path.name in ("dataset.json", "teacher.json") or "metrics" in path.parts:
        yield from json.loads(path.read_text("utf-8")).items()


def sums(name: str, values: np.ndarray) -> Iterator[tuple[str, float]]:
    values = values.ravel()
    yield f"{name}: sum", float(values.sum())
    yield f"{name}: sum of squares", float(np.square(values).sum())
    yield f"{name}: weighted by position", float(values @ np.linspace(1, 2, len(values)))


def test_a_small_run_gives_the_values_that_it_has_always_given(tmp_path):
    expected, actual = json.loads(GOLDEN.read_text("utf-8")), run(tmp_path)
    assert actual.keys() == expected.keys()
    for path, values in expected.items():
        assert actual[path].keys() == values.keys(), path
        for name, value in values.items():
            near = pytest.approx(value, rel=TOLERANCE, abs=1e-6) if type(value) is float else value
            assert actual[path][name] == near, f"{path}: {name}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        GOLDEN.write_text(json.dumps(run(Path(name)), indent=1) + "\n", "utf-8")
