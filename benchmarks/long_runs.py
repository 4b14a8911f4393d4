"""Measure the memory of every stage over many epochs, and over ten times the data.

    python -m benchmarks.long_runs

Tiny images (8 pixels, PNG, 10 classes of different greys) in a .tar, a ResNet-8 for teacher,
student and baseline; every stage runs in a fresh process, as under DVC, on Linux.

Epochs: trainings of many epochs on a small set. Memory is the process's after epoch 5 and after the
last. Files left and processes left are those at the end of the stage minus those at its start.

Data: peak memory of each stage for each count of images, 2 views, one epoch, and the bytes of each
further image. A pixel image of this size is 192 bytes and its 2 views' logits 40.
"""

from pipeline.runtime.command import run_command

import argparse
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from benchmarks.memory import memory_bytes
from pipeline.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
CLASSES, SIDE = 10, 8
SETTLED = 5  # epochs
MIB = 2**20
#: Each stage's module and arguments.
STAGES = {
    **{name: (name,) for name in ("prepare", "teacher", "soft_targets")},
    **{name: (name, "small") for name in ("baseline", "student")},
    "robustness_teacher": ("robustness", "--teacher"),
    "robustness": ("robustness", "small"),
    **{name: (name,) for name in ("speed", "compare")},
    "export": ("export", "small"),
}
TRAININGS = ("teacher", "baseline", "student")


def write_images(path: Path, count: int) -> None:
    """Write noise around a different grey for each class, so that a teacher passes the gate."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            label = number % CLASSES
            pixels = rng.integers(0, 20, (SIDE, SIDE, 3), dtype=np.uint8) + np.uint8(23 * label)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG", compress_level=1)
            member = tarfile.TarInfo(f"train/{label:02d}/{number:08d}.png")
            member.size = len(file.getvalue())
            archive.addfile(member, io.BytesIO(file.getvalue()))


def write_params(folder: Path, epochs: int) -> None:
    network = {"family": "cifar_resnet", "network": "resnet8"}
    training = {"epochs": epochs, "batch_size": 64, "learning_rate": 0.05, "seed": 0}
    sections = {
        "dataset": {
            "source": "image_folder",
            "root": "images.tar",
            "storage": "pixels",
            "image_size": SIDE,
            "validation_fraction": 0.1,
            "test_fraction": 0.1,
            "split_seed": 0,
        },
        "views": {
            "policy": "crop",
            "rand_augment": "none",
            "mix": "none",
            "count": 2,
            "seed": 0,
            "image_size": SIDE,
        },
        "teacher": {
            **network,
            "weights": "train",
            "checkpoint": "models/imported/none",
            "training": {**training, "policy": "crop"},
        },
        "soft_targets": {"encoding": "dense", "precision": "float32", "batch_size": 256},
        "training": {**training, "optimizer": "sgd"},
        "distillation": {
            "method": "kd",
            "temperature": 4.0,
            "soft_label_weight": 0.9,
            "hard_label_weight": 0.1,
        },
        "students": {"small": {**network, "training": {}, "distillation": {}}},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(sections, sort_keys=False), "utf-8")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> int:
    """The number of running processes that this one has started."""
    found = 0
    for task in Path("/proc/self/task").iterdir():
        found += len((task / "children").read_text("utf-8").split())
    return found


def run_here(stage: str) -> dict[str, object]:
    """Run the stage in this process and measure it."""
    from pipeline.runtime import progress  # noqa: PLC0415

    held: list[int] = []
    line = progress.EpochLog.line

    def watched(self: progress.EpochLog, epoch: int, **values: float) -> None:
        held.append(memory_bytes("VmRSS"))
        line(self, epoch, **values)

    progress.EpochLog.line = watched
    name, *arguments = STAGES[stage]
    module = importlib.import_module(f"pipeline.stages.{name}")
    sys.argv = [stage, *arguments]
    files, processes = open_files(), children()
    module.main()
    return {
        "peak": memory_bytes("VmHWM"),
        "after_epoch": held,
        "files_left": open_files() - files,
        "processes_left": children() - processes,
    }


def run(stage: str, folder: Path) -> dict:
    """Run the stage in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.long_runs", "--stage", stage]
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise UserError(f"the stage {stage} failed:\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def project(folder: Path, images: int, epochs: int) -> dict[str, dict]:
    write_images(folder / "images.tar", images)
    write_params(folder, epochs)
    return {stage: run(stage, folder) for stage in STAGES}


def over_epochs(images: int, epochs: int) -> dict[str, dict]:
    print(f"{images:,} images, {epochs} epochs")
    print(
        f"{'':<20}{'after 5':>12}{'after all':>12}{'more':>12}{'files left':>12}{'processes':>11}"
    )
    with tempfile.TemporaryDirectory() as name:
        found = project(Path(name), images, epochs)
    summary = {}
    for stage, measured in found.items():
        left = {key: measured[key] for key in ("files_left", "processes_left")}
        memory, more = [""] * 3, None
        if stage in TRAININGS:
            first, last = measured["after_epoch"][SETTLED - 1], measured["after_epoch"][-1]
            more = last - first
            memory = [f"{value / MIB:.1f} MiB" for value in (first, last, more)]
        print(
            f"{stage:<20}" + "".join(f"{text:>12}" for text in memory) + f"{left['files_left']:>12}"
            f"{left['processes_left']:>11}",
            flush=True,
        )
        summary[stage] = left | ({} if more is None else {"bytes_more": more})
    return summary


def over_data(counts: list[int]) -> dict[str, dict]:
    print("\npeak memory, one epoch")
    print(f"{'':<20}" + "".join(f"{count:>12,}" for count in counts) + "  bytes a further image")
    peaks = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            found = project(Path(name), count, 1)
        peaks.append({stage: measured["peak"] for stage, measured in found.items()})
    summary = {}
    for stage in STAGES:
        least, most = peaks[0][stage], peaks[-1][stage]
        further = (most - least) / (counts[-1] - counts[0])
        figures = "".join(f"{peak[stage] / MIB:>8.1f} MiB" for peak in peaks)
        print(f"{stage:<20}{figures}{further:>23,.0f}", flush=True)
        summary[stage] = {
            "peaks": [peak[stage] for peak in peaks],
            "bytes_of_further_image": round(further, 1),
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.long_runs", description=__doc__)
    parser.add_argument("--counts", type=int, nargs=2, default=[10_000, 100_000])
    parser.add_argument("--images", type=int, default=600, help="of the trainings over epochs")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(run_here(arguments.stage)))
        return
    summary = {
        "benchmark": "long_runs",
        "images": arguments.images,
        "epochs": arguments.epochs,
        "over_epochs": over_epochs(arguments.images, arguments.epochs),
        "counts": arguments.counts,
        "over_data": over_data(arguments.counts),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    run_command(main)
