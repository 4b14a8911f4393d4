"""Measure what long trainings make of few cached views: test accuracy against epochs.

    python -m benchmarks.accuracy.long_runs PROJECT      # of recipes/cifar100_laptop.yaml
    python -m benchmarks.accuracy.long_runs --tables
    python -m benchmarks.accuracy.long_runs --plot FILE  # needs matplotlib

Trains a ResNet-8 and a ResNet-20 on the first 50 training images of each class for 40 to 400
epochs, with the project's teacher in the ways of WAYS. Appends to benchmarks/accuracy/runs.csv;
study.py says how.
"""

from pipeline.runtime.command import run_command

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.accuracy.study import (
    BUDGETS,
    LAST,
    Budget,
    Network,
    Run,
    cell,
    command,
    key,
    markdown,
    results,
    with_noise,
)
from benchmarks.accuracy.views import KD, curve, exact

BUDGET = "long"
EPOCHS = (40, 100, 400)
ENDS_FIRST = (40, 400, 100)  # the order of the plan
COUNTS = (1, 2, 4, 8, 16, 50, 162)
STUDENTS = {name: Network("cifar_resnet", name) for name in ("resnet8", "resnet20")}


WAYS = curve(COUNTS)
FIRST = [exact(1), exact(16), exact(162), "1 clean view, inexact", "labels only"]  # most telling
CLOSE = [exact(count) for count in (2, 4, 8, 16, 50)]  # one seed does not tell them apart


def run(student: str, way: str, epochs: int, seed: int) -> Run:
    options = {"distillation": KD, **WAYS[way]}
    return Run(BUDGET, STUDENTS[student], epochs, seed, **options)


def ways(epochs: int) -> list[str]:
    """The ways that differ at this number of epochs: a cache of at least as many views as epochs
    gives a new view at each epoch, however many more it has."""
    alike = [exact(count) for fewer, count in pairwise(COUNTS) if fewer >= epochs]
    return [way for way in WAYS if way not in alike]


def seeds(student: str, way: str, epochs: int) -> Sequence[int]:
    """Every seed where runs are short, and for the close ways of the smaller student."""
    every = BUDGETS[BUDGET].seeds
    return every if epochs == min(EPOCHS) or (student == "resnet8" and way in CLOSE) else every[:1]


def plan(budget: Budget) -> list[list[Run]]:
    """The first ways first, of the smaller student, at the ends of the range; further seeds
    last."""
    return [
        [
            run(student, way, epochs, seed)
            for way in ways(epochs)
            if (way in FIRST) == is_first and seed in seeds(student, way, epochs)
        ]
        for seed in budget.seeds
        for student in STUDENTS
        for is_first in (True, False)
        for epochs in ENDS_FIRST
    ]


def tables() -> Iterator[str]:
    """For each student one row per way, one column per number of epochs: the accuracy of the last
    epoch. A cell without a run is empty."""
    found = results()
    for student in STUDENTS:
        cells = [
            [
                cell(found, [run(student, way, epochs, seed) for seed in BUDGETS[BUDGET].seeds])
                for epochs in EPOCHS
            ]
            for way in WAYS
        ]
        rows = [
            [way, *(here.shown if here else "" for here in row)]
            for way, row in zip(WAYS, cells, strict=True)
        ]
        table = markdown([student, *(f"{epochs} epochs" for epochs in EPOCHS)], rows)
        yield with_noise(table, [here for row in cells for here in row])


def _runs(found: pd.Series, student: str, chosen: Iterable[str]) -> pd.Series:
    keys = {
        tuple(key(run(student, way, epochs, seed)).values())
        for way in chosen
        for epochs in EPOCHS
        for seed in BUDGETS[BUDGET].seeds
    }
    return found[found.index.isin(keys)]


def plot(path: Path) -> None:
    """Plot accuracy of the last epoch against epochs, one line per way, each run a dot."""
    import matplotlib  # noqa: PLC0415  (of the extra `bench`)

    matplotlib.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    matplotlib.rcParams["svg.hashsalt"] = BUDGET  # equal tables give equal bytes
    found = 100 * results()[LAST]
    students = [s for s in STUDENTS if not _runs(found, s, WAYS).empty]
    figure, axes = plt.subplots(
        1, len(students), figsize=(4 + 4 * len(students), 4), squeeze=False, layout="constrained"
    )
    shades = plt.colormaps["viridis_r"](np.linspace(0, 1, len(COUNTS)))
    colours = ["black", "red", *shades, "grey"]
    for axis, student in zip(axes[0], students, strict=True):
        for way, colour in zip(WAYS, colours, strict=True):
            runs = _runs(found, student, [way])
            epochs = runs.index.get_level_values("epochs")
            means = runs.groupby(epochs).mean()
            line = "--" if isinstance(colour, str) else "-"
            axis.plot(means.index, means, line, color=colour, label=way)
            axis.scatter(epochs, runs, s=12, color=colour)
        axis.set_xscale("log")
        axis.set_xticks(EPOCHS, list(map(str, EPOCHS)))
        axis.minorticks_off()
        axis.set(title=student, xlabel="epochs", ylabel="test accuracy, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    command("long_runs", __doc__, plan, tables, budgets=(BUDGET,), plot=plot)


if __name__ == "__main__":
    run_command(main)
