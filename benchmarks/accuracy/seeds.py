"""How do intervals over training seeds behave on real trainings?

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.seeds PROJECT   # recipes/cifar100_laptop.yaml
    python -m benchmarks.accuracy.seeds PROJECT --quick             # try it: nothing to conclude
    python -m benchmarks.accuracy.seeds --tables

Trains a ResNet-8 at the CPU budget of study.py with ten seeds: on labels alone, by KD and by DIST.
The three networks of one seed start from the same weights and see the images in the same order.
Then computes 95 % intervals of the gain over labels alone from each seed, from each 3 of the ten
seeds and from all ten, and counts how many of them cover the mean gain of all ten. Writes seeds.csv
and seed_intervals.csv beside this file. Keeps the result of every training, image by image, below
PROJECT/.scratch/accuracy/cpu/seeds, and skips the trainings that are there: a killed study resumes.

The mean of ten seeds is not the true gain. It is of the same test images, whose choice moves it and
every interval together: intervals over images cover it more often than they cover the true gain,
and the share that counts is of intervals over seeds alone. It is also of the same seeds: the mean
of 3 of the ten differs from it with 0.7 of the variance with which it differs from the mean over
all possible seeds, so an exact interval over seeds covers it in 96.4 % of cases, not 95 %. And the
subsets overlap: their shares are of ten seeds, not of 120 independent results.
`python -m benchmarks.seed_intervals` measures how often a true gain is covered, by simulation.
"""

from pipeline.runtime.command import run_command

import argparse
import contextlib
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import t

from benchmarks.accuracy import methods
from benchmarks.accuracy.study import (
    BUDGETS,
    Run,
    Workshop,
    markdown,
    open_pool,
    params_of,
    training_data,
    training_of,
)
from pipeline.comparison.measurement import statistics
from pipeline.comparison.measurement.seeds import seed_mean
from pipeline.compute.device import default_device
from pipeline.distillation.objective import student_loss
from pipeline.models.params import NetworkParams
from pipeline.models.spec import build, model_spec
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_bytes
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import evaluate, fit

RESULTS = Path(__file__).parent  # the folder of ACCURACIES and INTERVALS
ACCURACIES, INTERVALS = "seeds.csv", "seed_intervals.csv"
BASELINE, *STUDENTS = METHODS = methods.LABELS, methods.KD, "DIST"
PAIR = methods.SMALL["resnet20 > resnet8"]
SUBSET = 3  # seeds

FULL = replace(BUDGETS["cpu"], seeds=range(10))
QUICK = replace(FULL, training={**FULL.training, "epochs": 2}, num_views=2, seeds=range(4))


def train(run: Run, file: Path, workshop: Workshop) -> None:
    """Train one network as study.py does; write whether its last epoch classifies each test image
    correctly: [N] bool."""
    device = default_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    opened = [workshop.open(cache) for cache in run.caches]
    dataset = opened[0][1]
    torch.manual_seed(run.seed)
    description = model_spec(run.student.family, NetworkParams(name=run.student.name), dataset)
    network, spec = build(description).to(device), description.input
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        data, soft_targets = training_data(opened, run, device)
        loss = (
            student_loss(params_of(run.distillation), soft_targets, device)
            if soft_targets
            else lambda logits, batch: label_loss(logits, batch.labels)
        )
        fit(network, spec, data, loss, training_of(run), device)
    taken, test = time.perf_counter() - start, dataset.splits["test"]
    logits, content = evaluate(network, spec, test, device)[0], io.BytesIO()
    correct = logits.argmax(1).numpy() == test.labels
    np.save(content, correct)
    write_bytes(file, content.getvalue())
    print(f"{file.stem}: {correct.mean():.2%} in {taken:.0f} s", flush=True)


def conduct(workshop: Workshop, folder: Path, jobs: int) -> dict[str, np.ndarray]:
    """Train what the folder does not hold yet. Returns method -> [S, N] bool."""
    budget, files, missing = workshop.budget, {}, {}
    for seed in budget.seeds:
        for method in METHODS:
            file = files[method, seed] = folder / f"{method}-{seed}.npy"
            if not file.exists():
                missing[file] = methods.run(budget, PAIR, method, seed)
    print(f"`{folder}` holds {len(files) - len(missing)} of {len(files)} trainings", flush=True)
    if missing:
        workshop.make(next(iter(missing.values())).caches)
        with open_pool(jobs) as pool:
            list(pool.map(partial(train, workshop=workshop), missing.values(), missing))
    return {
        method: np.stack([np.load(files[method, seed]) for seed in budget.seeds])
        for method in METHODS
    }


def write_results(correct: Mapping[str, np.ndarray], seeds: Sequence[int], folder: Path) -> None:
    figures = {method: of_method.mean(1) for method, of_method in correct.items()}
    wide = pd.DataFrame(figures, index=pd.Index(seeds, name="seed")).rename_axis(columns="method")
    accuracies = wide.unstack().rename("test_accuracy").reset_index()
    for name, table in ((ACCURACIES, accuracies), (INTERVALS, intervals(correct, seeds))):
        write_bytes(folder / name, table.to_csv(index=False, float_format="%.6g").encode())


def intervals(correct: Mapping[str, np.ndarray], seeds: Sequence[int]) -> pd.DataFrame:
    """The 95 % intervals of each method's gain over the baseline, from each seed, each SUBSET of
    the seeds and all of them.

    Args:
        correct: method -> [S, N] bool.
    """
    resampled = statistics.bootstrap_means(np.concatenate([correct[name] for name in METHODS]).T)
    drawn = dict(zip(METHODS, np.split(resampled, len(METHODS), axis=1), strict=True))
    rows = []
    for method in STUDENTS:
        gains = correct[method].mean(1) - correct[BASELINE].mean(1)  # [S]
        draws = drawn[method] - drawn[BASELINE]  # [resamples, S]
        for size in (1, SUBSET, len(seeds)):
            for subset in map(list, combinations(range(len(seeds)), size)):
                names, mean = " ".join(str(seeds[i]) for i in subset), gains[subset].mean()
                for over, low, high in intervals_of(gains[subset], draws[:, subset]):
                    rows.append((method, size, names, over, mean, low, high))
    columns = ["method", "num_seeds", "seeds", "interval_over", "gain", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def intervals_of(gains: np.ndarray, resampled: np.ndarray) -> Iterator[tuple[str, float, float]]:
    """Yield each interval's name and bounds, from [S] gains and [resamples, S] of them."""
    yield "images alone", *statistics.interval(resampled.mean(1))
    if len(gains) > 1:
        found = seed_mean(gains, resampled)
        half = t.isf((1 - statistics.LEVEL) / 2, len(gains) - 1) * np.sqrt(found.of_seeds)
        yield "seeds alone", found.mean - half, found.mean + half
        yield "seeds and images", *found.interval


def tables(folder: Path = RESULTS) -> Iterator[str]:
    """Each method's accuracy, in per cent, and gain over all seeds, in points, with its interval
    over seeds and images; and how many intervals of fewer seeds cover that gain."""
    accuracies = pd.read_csv(folder / ACCURACIES).groupby("method")["test_accuracy"]
    found = pd.read_csv(folder / INTERVALS, dtype={"seeds": str})
    is_whole = found["num_seeds"] == found["num_seeds"].max()
    whole = found[is_whole & (found["interval_over"] == "seeds and images")].set_index("method")
    rows = []
    for method in METHODS:
        points, gain = 100 * accuracies.get_group(method), ""
        if method in whole.index:
            mean, low, high = 100 * whole.loc[method, ["gain", "low", "high"]]
            gain = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        rows.append([method, f"{points.mean():.2f} ± {points.std():.2f}", gain])
    yield markdown(("Method", "test accuracy", f"gain over {BASELINE}"), rows)
    rows = []
    kinds = found[~is_whole].groupby(["method", "num_seeds", "interval_over"], sort=False)
    for (method, size, over), group in kinds:
        covers = group["low"].le(whole["gain"][method]) & group["high"].ge(whole["gain"][method])
        share = f"{covers.sum()} of {len(group)} ({covers.mean():.1%})"
        half = 50 * (group["high"] - group["low"]).median()
        rows.append([method, str(size), over, share, str((~covers).sum()), f"{half:.2f}"])
    header = ("Method", "seeds", "interval over", "cover", "miss", "median half-width")
    yield markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accuracy.seeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("project", nargs="?", type=Path, help="a project with a trained teacher")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--quick", action="store_true", help="tiny trainings and their tables")
    parser.add_argument("--tables", action="store_true", help="print the page's tables and end")
    arguments = parser.parse_args()
    results = RESULTS
    if not arguments.tables:
        if arguments.project is None:
            raise UserError(
                "PROJECT is missing; expected the folder of a project in which `prepare` and "
                "`teacher` have run. Name it, or use --tables."
            )
        workshop = Workshop(arguments.project, QUICK if arguments.quick else FULL)
        folder = workshop.root / ("seeds-quick" if arguments.quick else "seeds")
        results = folder if arguments.quick else RESULTS
        correct = conduct(workshop, folder, arguments.jobs)
        write_results(correct, workshop.budget.seeds, results)
    print("\n\n".join(tables(results)))


if __name__ == "__main__":
    run_command(main)
