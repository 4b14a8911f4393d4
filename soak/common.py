"""Shared by the campaigns: a small project, its runs, and the verdict at the end.

A campaign tries to break a promise of docs/reliability.md, a counted number of times, from a seed.
It exits with a code other than 0 if the promise is broken once.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipeline.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
CLASSES = ("ant", "bee", "cat")
OUTPUTS = ("data/prepared", "data/soft_targets", "models", "predictions", "metrics", "reports")
CLOCKED = {"metrics/speed.json", "reports/index.html", "reports/comparison.md"}  # show seconds
#: Each stage's module and arguments, in order.
STAGES = {
    **{name: (name,) for name in ("prepare", "teacher", "soft_targets")},
    **{name: (name, "small") for name in ("baseline", "student")},
    "int8_training": ("int8_training", "small"),
    **{f"{name}_teacher": (name, "--teacher") for name in ("export", "robustness")},
    **{name: (name, "small") for name in ("export", "robustness")},
    **{name: (name,) for name in ("speed", "compare")},
}


def params(*, size: int = 16, epochs: int = 6, batch_size: int = 8, views: int = 2) -> dict:
    """Parameters of a ResNet-8 that teaches a ResNet-8."""
    network = {"family": "cifar_resnet", "network": "resnet8"}
    steps = {"epochs": epochs, "batch_size": batch_size, "learning_rate": 0.05}
    return {
        "dataset": {
            "source": "image_folder",
            "root": "images",
            "storage": "pixels",
            "image_size": size,
            "channels": 3,
            "validation_fraction": 0.2,
            "test_fraction": 0.2,
            "split_seed": 0,
        },
        "views": {
            "policy": "crop_flip",
            "rand_augment": "none",
            "mix": "none",
            "count": views,
            "seed": 0,
            "image_size": size,
        },
        "teacher": {
            **network,
            "weights": "train",
            "checkpoint": "models/imported/none",
            "training": {**steps, "policy": "crop_flip", "seed": 0},
        },
        "soft_targets": {"encoding": "dense", "precision": "float32", "batch_size": 16},
        "training": {**steps, "optimizer": "sgd", "seeds": 0},
        "distillation": {
            "method": "kd",
            "temperature": 4.0,
            "soft_label_weight": 0.9,
            "hard_label_weight": 0.1,
        },
        "export": {"precision": "float32", "int8_training": "none"},
        "students": {"small": {**network, "training": {}, "distillation": {}}},
    }


def write_params(folder: Path, sections: Mapping[str, Any]) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(dict(sections), sort_keys=False), "utf-8")


def png(pixels: np.ndarray) -> bytes:
    """[H, W, 3] uint8 -> a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def images(count: int, size: int, classes: Sequence[str] = CLASSES) -> Iterator[tuple[str, bytes]]:
    """Names and contents of noise around a grey of each class, so that a teacher passes the
    gate."""
    rng = np.random.default_rng(0)
    for number in range(count):
        label = number % len(classes)
        grey = np.uint8(230 // len(classes) * label)
        pixels = rng.integers(0, 20, (size, size, 3), dtype=np.uint8) + grey
        yield f"train/{classes[label]}/{number // len(classes):03d}.png", png(pixels)


def write_folder(folder: Path, files: Iterator[tuple[str, bytes]]) -> None:
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_tar(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def copy_code(folder: Path) -> None:
    """Copy the code and DVC's files of this project to an empty folder under Git."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).splitlines():
        kept = name.startswith(("pipeline/", ".dvc/", ".git", "models/", "data/"))
        if (kept or name in ("dvc.yaml", ".dvcignore")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


def environment(root: Path, **settings: str) -> dict[str, str]:
    """The environment of a command in the project `root`: this Python, one thread."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DVC_SITE_CACHE_DIR": str(root / ".venv/dvc"),
        **settings,
    }


def files_of(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every output."""
    for folder in OUTPUTS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file():
                yield str(path.relative_to(root)), path


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    import pandas as pd  # noqa: PLC0415  (not in the memory that soak.long_runs measures)

    print(pd.DataFrame(list(rows)).to_string(index=False), flush=True)


def conclude(rows: Sequence[Mapping[str, Any]], failures: Sequence[str], **figures: Any) -> None:
    """Print a table of the results and one line of JSON.

    Raises:
        UserError: names every failure.
    """
    print_table(rows)
    print(json.dumps({**figures, "failures": len(failures)}))
    if failures:
        raise UserError("\n".join([*failures, f"{len(failures)} failures; expected none."]))
