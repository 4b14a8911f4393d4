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
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.memory import memory_bytes
from pipeline.data.sources.params import DatasetParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import atomic_directory
from pipeline.stages.prepare import write_dataset

ROOT = Path(__file__).parents[1]
CLASSES = 1000
MEASURES = ("cpu_seconds_per_1000", "memory_bytes_per_image", "index_bytes_per_image")


def images(count: int) -> Iterator[tuple[str, bytes]]:
    """Names like ImageNet's, and contents."""
    rng = np.random.default_rng(0)
    for number in range(count):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        class_name = f"n{number % CLASSES:08d}"
        folder = "unlabeled" if number // CLASSES % 10 == 9 else f"train/{class_name}"
        yield f"{folder}/{class_name}_{number}.png", file.getvalue()


def write_tar(path: Path, count: int) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in images(count):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def unpack(path: Path, folder: Path) -> None:
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")


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


def measure(root: Path, directory: Path) -> dict[str, float]:
    """Measure `prepare` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.many_files", "--one", str(root), str(directory)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"preparing `{root}` failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.many_files", description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--one", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(prepare(*arguments.one)))
        return
    print(f"{'':<18}{'CPU s per 1,000':>18}{'bytes of memory':>18}{'bytes of index':>16}")
    summary: dict[str, object] = {"benchmark": "many_files", "counts": arguments.counts}
    for kind in ("tar", "folder"):
        rows = []
        for count in arguments.counts:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                root = folder / "images.tar"
                write_tar(root, count)
                if kind == "folder":
                    unpack(root, folder / "images")
                    root = folder / "images"
                rows.append(measure(root, folder / "prepared"))
            seconds, memory, index = rows[-1].values()
            print(
                f"{kind:<8}{count:>14,}{seconds:>14.2f}{memory:>18,.0f}{index:>16.1f}", flush=True
            )
        growth = {key: rows[-1][key] / rows[0][key] for key in MEASURES}
        seconds, memory, index = growth.values()
        print(f"{'':<8}{'growth':>14}{seconds:>14.2f}{memory:>18.2f}{index:>16.2f}", flush=True)
        most, least = arguments.counts[-1], arguments.counts[0]
        memory = rows[-1]["memory_bytes_per_image"] * most
        further = (memory - rows[0]["memory_bytes_per_image"] * least) / (most - least)
        print(f"{'':<8}each further image takes {further:,.0f} bytes of memory", flush=True)
        summary[f"{kind}_memory_bytes_per_further_image"] = round(further, 1)
        summary[kind] = [{k: round(v, 3) for k, v in row.items()} for row in rows]
        summary[f"{kind}_growth"] = {k: round(v, 3) for k, v in growth.items()}
    print(json.dumps(summary))


if __name__ == "__main__":
    run_command(main)
