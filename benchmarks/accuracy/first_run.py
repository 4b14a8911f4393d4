"""Do the gains of a run hold for other seeds? Train its students again, and their baselines.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.first_run            # after `make repro`
    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.first_run --run cifar10_foreign_teacher
    python -m benchmarks.accuracy.first_run --tables

The students of params.yaml in the current folder are trained by their stages with other seeds of
weights and order, from the images, the teacher and the soft targets that are there. A student and
its baseline have the same seed. Appends one line per training to RUN.csv beside this file, and
skips what is in it: a killed study resumes.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
import yaml

from benchmarks.accuracy.study import append, link, markdown, processor, run_stage
from benchmarks.harness import mean_interval
from pipeline.data.prepared.dataset import open_dataset
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import PREPARED, STORE, TEACHER, ModelOutputs
from pipeline.runtime.params import read_params

WORKSPACE = Path(".scratch/accuracy")
KEY = ["student", "seed", "role"]
ROLES = {"baseline": "baseline", "student": "distilled"}  # the stage -> what it trains
ACCURACY = "test_accuracy"


def train(results: Path, seeds: range) -> None:
    """Train every student and baseline with these seeds, unless they are in the results."""
    params = read_params()
    dataset, teacher = open_dataset(), read_json(TEACHER.metrics, produced_by="dvc repro teacher")
    for seed in seeds:
        folder = WORKSPACE / results.stem / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (PREPARED, STORE, TEACHER.model):
            link(Path(name).resolve(), folder / name)
        seeded = params | {"training": params["training"] | {"seeds": seed}}
        (folder / "params.yaml").write_text(yaml.safe_dump(seeded, sort_keys=False), "utf-8")
        for student in params["students"]:
            for stage, role in ROLES.items():
                key = dict(zip(KEY, (student, seed, role), strict=True))
                if tuple(key.values()) in rows(results).index:
                    continue
                run_stage(stage, folder, student)
                metrics = read_json(folder / ModelOutputs(role, student).metrics, produced_by=stage)
                row = {
                    **key,
                    ACCURACY: metrics[ACCURACY],
                    "teacher_test_accuracy": teacher[ACCURACY],
                    "test_images": len(dataset.splits["test"]),
                    "dataset_fingerprint": dataset.fingerprint[:12],
                    "torch": torch.__version__,
                    "hardware": processor(),
                }
                append(results, row)


def rows(results: Path) -> pd.DataFrame:
    """All finished trainings, indexed by their keys."""
    if not results.exists():
        return pd.DataFrame(index=pd.MultiIndex.from_arrays([[]] * len(KEY), names=KEY))
    return pd.read_csv(results).set_index(KEY)


def table(results: Path) -> str:
    """Each student's accuracies in per cent, on average over the seeds, and its gain in points:
    the mean of the pairs of one seed and its 95 % interval by Student's t."""
    return markdown(
        ["Student", "seeds", "baseline", "distilled", "gain", "gain of each seed"],
        list(_lines(results)),
    )


def _lines(results: Path) -> Iterator[list[str]]:
    accuracies = 100 * rows(results)[ACCURACY].unstack("role").dropna()
    for student, pairs in accuracies.groupby("student", sort=False):
        gains = pairs["distilled"] - pairs["baseline"]
        means = [f"{pairs[role].mean():.2f}" for role in ROLES.values()]
        interval = mean_interval(gains.to_numpy()) if len(gains) > 1 else f"{gains.iloc[0]:+.2f}"
        each = ", ".join(f"{gain:+.2f}" for gain in gains)
        yield [str(student), str(len(gains)), *means, interval, each]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accuracy.first_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=4, help="how many, from 1 (default: 4)")
    parser.add_argument("--run", default="first_run", help="its name, which names its results")
    parser.add_argument("--tables", action="store_true", help="print the table and end")
    arguments = parser.parse_args()
    results = Path(__file__).with_name(f"{arguments.run}.csv")
    if not arguments.tables:
        train(results, range(1, arguments.seeds + 1))
    print(table(results))


if __name__ == "__main__":
    run_command(main)
