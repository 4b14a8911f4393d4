"""Measure whether preparing an image folder stays proportional: CPU seconds, memory, index on disk.

    python -m benchmarks.many_files

Tiny images (8 pixels, PNG, 1,000 classes, all different) in a folder and in a .tar, a tenth of them
in `unlabeled/`. The functions of `prepare` run with `storage: encoded`, in a fresh process for each
row. CPU seconds are those of all its threads. Memory is the process's peak minus its memory after
all imports (Linux). The index is everything that `prepare` writes except the images. `growth` is
the figure for one image at the largest count over that at the smallest: 1 is proportional; it is
less if more images share a fixed cost.
"""

from pipeline.runtime.command import run_command

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness import Row, memory_bytes, run_benchmark
from pipeline.data.sources.params import DatasetParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import atomic_directory
from pipeline.stages.prepare import write_dataset
from soak.common import png, write_tar

ROOT = Path(__file__).parents[1]
CLASSES = 1000
MEASURES = ("CPU s per 1,000", "bytes of memory", "bytes of index")  # for one image


def images(count: int) -> Iterator[tuple[str, bytes]]:
    """Names like ImageNet's, and contents."""
    rng = np.random.default_rng(0)
    for number in range(count):
        content = png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        class_name = f"n{number % CLASSES:08d}"
        folder = "unlabeled" if number // CLASSES % 10 == 9 else f"train/{class_name}"
        yield f"{folder}/{class_name}_{number}.png", content


def prepare(root: Path, directory: Path) -> dict[str, float]:
    """Measure `prepare` for one source, in this process."""
    params = DatasetParams(
        source="image_folder",
        root=str(root),
        storage="encoded",
        image_size=8,
        validation_fraction=0.1,
        test_fraction=0.1,
        split_seed=0,
    )
    before, begin = memory_bytes("VmRSS"), time.process_time()
    with atomic_directory(directory) as partial:
        description = write_dataset(params, partial)
    seconds, memory = time.process_time() - begin, memory_bytes("VmHWM") - before
    count = sum(description.splits.values())
    index = sum(f.stat().st_size for f in directory.iterdir() if not f.name.endswith("_images.bin"))
    values = (1000 * seconds / count, memory / count, index / count)
    return dict(zip(MEASURES, values, strict=True))


def measure_one(count: int, kind: str) -> dict[str, float]:
    """Measure `prepare` in a fresh process."""
    code = "import sys, json, pathlib; from benchmarks.many_files import prepare; "
    code += "print(json.dumps(prepare(*map(pathlib.Path, sys.argv[1:]))))"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "images.tar"
        write_tar(root, images(count))
        if kind == "folder":
            with tarfile.open(root) as archive:
                archive.extractall(root := Path(name) / "images", filter="data")
        command = [sys.executable, "-c", code, str(root), str(Path(name) / "prepared")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"preparing {count:,} images failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    least, most = arguments.counts[0], arguments.counts[-1]
    for kind in ("tar", "folder"):
        found = {count: measure_one(count, kind) for count in arguments.counts}
        for count, row in found.items():
            yield {"images": f"{kind}, {count:,}", **row}
        growth = {name: found[most][name] / found[least][name] for name in MEASURES}
        yield {"images": f"{kind}, growth", **growth}
        memory = {count: count * row["bytes of memory"] for count, row in found.items()}
        further = (memory[most] - memory[least]) / (most - least)
        yield {f"{kind}: bytes of memory": "each further image", "": further}


def main() -> None:
    run_benchmark(__doc__, measure, counts=([10_000, 100_000], "of images, increasing"))


if __name__ == "__main__":
    run_command(main)
