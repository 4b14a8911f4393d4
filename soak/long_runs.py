"""Measure the memory of every stage over many epochs, and over ten times the data.

    python -m soak.long_runs

Tiny images (8 pixels, PNG, 10 classes of different greys) in a .tar, a ResNet-8 for teacher,
student and baseline; every stage runs in a fresh process, as under DVC, on Linux.

Epochs: trainings of many epochs on a small set. Memory is the process's after epoch 5 and after the
last; it may grow by 8 MiB. Files and processes left are those at the end of the stage minus those
at its start; there may be none.

Data: peak memory of each stage for each count of images, 2 views, one epoch, and the bytes of each
further image. The peak may grow by 1,024 bytes for each, and by 64 MiB that do not depend on them.
A pixel image of this size is 192 bytes and its 2 views' logits 40.
"""

from pipeline.runtime.command import run_command

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from benchmarks.harness import memory_bytes
from pipeline.runtime.errors import UserError
from soak import common

CLASSES = [f"{label:02d}" for label in range(10)]
SETTLED, MIB = 5, 2**20  # epochs; bytes
MOST_GROWTH = 8 * MIB  # over epochs
MOST_FIXED, MOST_PER_IMAGE = 64 * MIB, 1024  # bytes, over data


def run_here(stage: str) -> None:
    """Run the stage in this process; print what it measures as a line of JSON."""
    from pipeline.runtime import progress  # noqa: PLC0415  (it loads torch)

    held: list[int] = []
    line = progress.EpochLog.line

    def watched(self: progress.EpochLog, epoch: int, **values: float) -> None:
        held.append(memory_bytes("VmRSS"))
        line(self, epoch, **values)

    progress.EpochLog.line = watched
    name, *sys.argv[1:] = common.STAGES[stage]
    module, process = importlib.import_module(f"pipeline.stages.{name}"), psutil.Process()
    files, children = process.num_fds(), len(process.children())
    module.main()
    left = {
        "files left": process.num_fds() - files,
        "processes left": len(process.children()) - children,
    }
    print(json.dumps({"peak": memory_bytes("VmHWM"), "held": held, **left}))


def run(images: int, epochs: int) -> dict[str, dict]:
    """Run every stage on this many images, each in a fresh process."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        common.write_tar(Path(name, "images.tar"), common.images(images, 8, CLASSES))
        sections = common.params(size=8, epochs=epochs, batch_size=64)
        sections["dataset"] |= {"root": "images.tar", "validation_fraction": 0.1}
        sections["dataset"] |= {"test_fraction": 0.1}
        common.write_params(Path(name), sections)
        for stage in common.STAGES:
            result = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    f"from soak import long_runs; long_runs.run_here('{stage}')",
                ],
                cwd=name,
                env=common.environment(Path(name), PYTHONPATH=str(common.ROOT)),
                capture_output=True,
                text=True,
                check=False,
            )
            if result.returncode:
                raise UserError(f"the stage {stage} failed:\n{result.stdout}{result.stderr}")
            found[stage] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs=2, default=[10_000, 100_000])
    parser.add_argument("--images", type=int, default=600, help="of the trainings over epochs")
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    few, many = arguments.counts
    failures, rows = [], []
    print(f"{arguments.images:,} images, {arguments.epochs} epochs")
    for stage, measured in run(arguments.images, arguments.epochs).items():
        held = measured["held"][SETTLED - 1 :: max(1, arguments.epochs - SETTLED)]
        row = {"stage": stage, "MiB after 5 epochs": "", "after all": ""}
        if len(measured["held"]) > SETTLED:
            row |= dict(zip(list(row)[1:], [round(value / MIB, 1) for value in held], strict=True))
            if held[1] - held[0] > MOST_GROWTH:
                failures.append(f"{stage}: memory grew by {held[1] - held[0]:,} bytes")
        for name in ("files left", "processes left"):
            row[name] = measured[name]
            if measured[name] > 0:
                failures.append(f"{stage}: {measured[name]} {name}")
        rows.append(row)
    common.print_table(rows)
    print("peak memory, one epoch")
    first, last, rows = run(few, 1), run(many, 1), []
    for stage in common.STAGES:
        least, most = first[stage]["peak"], last[stage]["peak"]
        further = (most - least) / (many - few)
        peaks = {f"MiB, {few:,}": round(least / MIB, 1), f"MiB, {many:,}": round(most / MIB, 1)}
        rows.append({"stage": stage, **peaks, "bytes a further image": round(further)})
        if most - least > MOST_FIXED + MOST_PER_IMAGE * (many - few):
            failures.append(f"{stage}: each further image takes {further:,.0f} bytes")
    common.conclude(rows, failures, campaign="long_runs", **vars(arguments))


if __name__ == "__main__":
    run_command(main)
