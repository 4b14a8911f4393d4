"""Kill the stage `soft_targets` hundreds of times, and compare what it leaves with one clean run.

    python -m benchmarks.soak_store --kills 300

Real processes on the embedded digits: all 81 views of 4-pixel crops from a ResNet-8, in one or two
processes, drawn anew for each run. Each run is killed at a random moment, all of it or its launcher
alone; when one ends before that, the store's bytes are compared, and all starts over without
scratch. Ends with code 1 at the first difference, or shard that was damaged or lost.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import yaml

from pipeline.errors import UserError, reported
from pipeline.files import sha256_of_file
from pipeline.progress import bar

ROOT = Path(__file__).parents[1]
STORE, SCRATCH = Path("data/soft_targets"), Path(".scratch/soft_targets")
PARAMS = {
    "dataset": {
        "source": "digits",
        "root": "data/raw/none",
        "storage": "pixels",
        "image_size": 8,
        "validation_fraction": 0.1,
        "test_fraction": 0.2,
        "split_seed": 0,
    },
    "views": {
        "policy": "crop",
        "rand_augment": "none",
        "mix": "none",
        "count": "all",
        "seed": 0,
        "image_size": 8,
    },
    "teacher": {
        "family": "cifar_resnet",
        "network": "resnet8",
        "weights": "train",
        "checkpoint": "models/imported/none",
        "training": {
            "epochs": 1,
            "batch_size": 64,
            "learning_rate": 0.05,
            "policy": "crop",
            "seed": 0,
        },
    },
    "soft_targets": {"encoding": "top_k", "k": 3, "precision": "float32", "batch_size": 256},
}


def start(stage: str, processes: int = 1) -> subprocess.Popen:
    settings = {"PYTHONPATH": str(ROOT), "PROCESSES": str(processes), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", f"pipeline.stages.{stage}"],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen) -> str:
    output = process.communicate()[0]
    if process.returncode:
        raise UserError(f"a run that was not killed ended with {process.returncode}:\n{output}")
    return output


def shards() -> int:
    return len(list(SCRATCH.glob("*/*.h5")))


def digests() -> dict[str, str]:
    return {path.name: sha256_of_file(path) for path in STORE.iterdir()}


def check(output: str, kept: int, expected: dict[str, str]) -> None:
    """That a run which came to its end resumed all there was, and left what one run leaves."""
    said = re.search(r"resumes (\d+) finished shards", output)
    if "made again" in output or (int(said[1]) if said else 0) < kept:
        raise UserError(f"of {kept} finished shards, the next run said:\n{output}")
    found = digests()
    different = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if different:
        raise UserError(f"other bytes than those of an uninterrupted run: {', '.join(different)}")


def soak(kills: int, seed: int) -> dict[str, int]:
    for stage in ("prepare", "teacher"):
        finished(start(stage))
    moments = random.Random(seed)
    begin = time.perf_counter()
    finished(start("soft_targets"))
    duration = time.perf_counter() - begin
    expected = digests()
    shutil.rmtree(SCRATCH)
    counts = {"kills": 0, "kills_that_kept_shards": 0, "finished_runs": 0}
    progress = bar(range(kills), "kills")
    kept = 0
    while counts["kills"] < kills:
        process = start("soft_targets", processes := moments.choice((1, 1, 1, 2)))
        time.sleep(moments.uniform(0, duration * (1 if processes == 1 else 2)))
        if process.poll() is None:
            group = moments.random() < 0.8
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
            process.communicate()
            if shards() < kept:
                raise UserError(f"{kept} finished shards became {shards()}")
            kept = shards()
            counts["kills"] += 1
            counts["kills_that_kept_shards"] += kept > 0
            next(progress, None)
        if process.returncode == 0 or kept == len(expected) - 1:
            output = finished(process if process.returncode == 0 else start("soft_targets"))
            check(output, kept, expected)
            counts["finished_runs"] += 1
            shutil.rmtree(SCRATCH)
            kept = 0
    check(finished(start("soft_targets")), kept, expected)
    counts["finished_runs"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.soak_store", description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("params.yaml").write_text(yaml.safe_dump(PARAMS), "utf-8")
        try:
            counts = soak(arguments.kills, arguments.seed)
        finally:
            os.chdir(ROOT)
    for name, count in counts.items():
        print(f"{name.replace('_', ' '):>24} {count:6,}")
    print(json.dumps({"benchmark": "soak_store", "seed": arguments.seed, **counts}))


if __name__ == "__main__":
    with reported():
        main()
