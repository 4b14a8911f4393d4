"""Measure how many views a cache needs: test accuracy of one student for different caches.

    python -m benchmarks.accuracy.views PROJECT      # of recipes/cifar100_laptop.yaml
    python -m benchmarks.accuracy.views --tables
    python -m benchmarks.accuracy.views --plot FILE  # needs matplotlib

Trains a ResNet-8 on a fixed subset of the project's images (the first 100 training images of each
class), with the project's teacher in the ways of CURVE and BEYOND. Appends to
benchmarks/accuracy/runs.csv; study.py says how.
"""

from pipeline.runtime.command import run_command

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.study import (
    BUDGETS,
    LAST,
    POLICY,
    Budget,
    Cache,
    Network,
    Run,
    Teacher,
    cell,
    command,
    key,
    markdown,
    results,
)

SHORT, LONG = 10, 40  # epochs
STUDENT = Network("cifar_resnet", "resnet8")


def _cache(count: int, policy: str = POLICY) -> Cache:
    return Cache(Teacher(Network("cifar_resnet", "resnet20")), count, policy=policy)


KD = {"method": "kd"}
Ways = dict[str, dict[str, Any]]  # name -> fields of a run


def curve(counts: Sequence[int]) -> Ways:
    """No teacher; one clean view under augmented training; exact views; the teacher at every
    step."""
    return {
        "labels only": {"caches": (_cache(1),), "distillation": {}},
        "1 clean view, inexact": {"caches": (_cache(1, "none"),), "use": "inexact"},
        **{exact(count): {"caches": (_cache(count),)} for count in counts},
        "live teacher": {"caches": (_cache(1),), "use": "live"},
    }


def exact(count: int) -> str:
    return f"{count} exact"


CURVE = curve((1, 2, 4, 8, 16))
#: Ways to make few views worth more.
BEYOND = {
    **{f"{count} exact + jitter": {"caches": (_cache(count),), "jitter": 2} for count in (1, 4, 8)},
    "1 clean + 3 exact": {"caches": (_cache(1, "none"), _cache(3)), "use": "sequence"},
    "4 unmirrored + 4 exact": {"caches": (_cache(4, "crop"), _cache(4)), "use": "sequence"},
}
WAYS = CURVE | BEYOND


def run(name: str, epochs: int, seed: int) -> Run:
    options = {"distillation": KD, **WAYS[name]}
    return Run(budget="views", student=STUDENT, epochs=epochs, seed=seed, **options)


def plan(budget: Budget) -> list[list[Run]]:
    """The most important runs first."""
    first, *others = budget.seeds
    return [
        *([run(name, SHORT, seed) for name in CURVE] for seed in budget.seeds),
        [run(name, LONG, first) for name in WAYS],
        [run(name, SHORT, first) for name in BEYOND],
        *([run(name, LONG, seed) for name in WAYS] for seed in others),
        *([run(name, SHORT, seed) for name in BEYOND] for seed in others),
    ]


def tables() -> Iterator[str]:
    """One row per way; for each number of epochs the accuracy of the last and of the best epoch,
    and the teacher passes. A cell without a run is empty."""
    found, rows = results(), []
    for name in WAYS:
        row = [name]
        for epochs in (SHORT, LONG):
            here = cell(found, [run(name, epochs, seed) for seed in BUDGETS["views"].seeds])
            passes = here and f"{here.row['teacher_passes']:,}"
            row += [here.shown, f"{here.best:.2f}", passes] if here else ["", "", ""]
        rows.append(row)
    columns = [part for e in (SHORT, LONG) for part in (f"{e} epochs: last", "best", "passes")]
    yield markdown(["Way", *columns], rows)


def plot(path: Path) -> None:
    """Plot accuracy of the last epoch against the number of exact views, between the labels alone
    and the live teacher; every run is a dot."""
    import matplotlib  # noqa: PLC0415  (of the extra `bench`)

    matplotlib.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    matplotlib.rcParams["svg.hashsalt"] = "views"  # equal tables give equal bytes
    found, counts = 100 * results()[LAST], [1, 2, 4, 8, 16]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, epochs in zip(axes, (SHORT, LONG), strict=True):

        def accuracies(name: str, epochs: int = epochs) -> list[float]:
            keys = [tuple(key(run(name, epochs, s)).values()) for s in BUDGETS["views"].seeds]
            return [found[k] for k in keys if k in found.index]

        exact = {count: accuracies(f"{count} exact") for count in counts}
        means = [sum(values) / len(values) for values in exact.values()]
        axis.plot(counts, means, color="C0", label="exact views")
        dots = [(count, value) for count, values in exact.items() for value in values]
        axis.scatter(*zip(*dots, strict=True), s=12, color="C0")
        for colour, name in (("C7", "labels only"), ("C1", "1 clean view, inexact"),
                             ("C2", "live teacher")):  # fmt: skip
            values = accuracies(name)
            level = sum(values) / len(values)
            axis.axhline(level, color=colour, linestyle="--", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, list(map(str, counts)))
        axis.set(title=f"{epochs} epochs", xlabel="cached views", ylabel="test accuracy, %")
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    command("views", __doc__, plan, tables, budgets=("views",), plot=plot)


if __name__ == "__main__":
    run_command(main)
