"""Compare the literature's methods on the same cached logits.

    python -m benchmarks.accuracy.methods PROJECT                # recipes/cifar100_laptop.yaml
    python -m benchmarks.accuracy.methods PROJECT --budget gpu   # recipes/cifar100_240_epochs.yaml
    python -m benchmarks.accuracy.methods --tables

At the GPU budget the pairs, teachers and recipe of the published CIFAR-100 tables; at the CPU
budget two small pairs. Appends to benchmarks/accuracy/runs.csv; study.py says how.
"""

from pipeline.runtime.command import run_command

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy.study import (
    BUDGETS,
    Budget,
    Cache,
    Cell,
    Network,
    Run,
    Teacher,
    cell,
    command,
    markdown,
    results,
    with_noise,
)

LABELS, KD = "labels only", "KD"

#: The authors' parameters for CIFAR-100, the most important first; a pair overrides some.
METHODS: dict[str, Mapping[str, Any]] = {
    LABELS: {},
    KD: {"method": "kd"},
    "DKD": {"method": "dkd"},
    "KD+LS": {"method": "kd", "standardize": True},
    "DIST": {"method": "dist", "temperature": 4.0},
    "WTTM": {"method": "wttm"},
    "DKD+LS": {"method": "dkd", "standardize": True},
    "TTM": {"method": "ttm"},
    "RLD": {"method": "rld", "alpha_temperature": 4.0},
    "MLKD": {"method": "mlkd"},
    "MLKD+LS": {"method": "mlkd", "standardize": True},
    "NKD": {"method": "nkd", "temperature": 3.0, "gamma": 3.5},
    "function matching": {"method": "soft_cross_entropy"},
    "logit regression": {"method": "logit_mse"},
}


@dataclass(frozen=True)
class Pair:
    teacher: Network
    student: Network
    dkd_beta: float  # of DKD's authors for this teacher
    published: Mapping[str, float]  # "teacher", or a method -> top-1 on test, in per cent
    teacher_seed: int | None = 0  # None: the project's teacher


def published_pairs() -> Iterator[tuple[str, Pair]]:
    """The pairs of published.csv. docs/losses.md has the sources of the methods, methods.md those
    of the tables."""
    with open(Path(__file__).with_name("published.csv"), encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rate = row["learning rate"]
            teacher = Network(row["teacher family"], row["teacher network"])
            training = (("learning_rate", float(rate)),) if rate else ()
            student = Network(row["student family"], row["student network"], training)
            figures = {name: row[name] for name in ("teacher", *METHODS) if row.get(name)}
            published = {name: float(figure) for name, figure in figures.items()}
            pair = Pair(teacher, student, float(row["DKD beta"]), published)
            yield f"{teacher.name} > {student.name}", pair


TABLE = dict(published_pairs())
_resnet = partial(Network, "cifar_resnet")
SMALL = {
    "resnet20 > resnet8": Pair(_resnet("resnet20"), _resnet("resnet8"), 2.0, {}, None),
    "resnet32 > resnet20": Pair(_resnet("resnet32"), _resnet("resnet20"), 2.0, {}),
}
QUICK = {"resnet14 > resnet8": Pair(_resnet("resnet14"), _resnet("resnet8"), 2.0, {})}
PAIRS = {"cpu": SMALL, "gpu": TABLE, "quick": QUICK}
#: The tables compare the small pairs with the published differences of this pair.
NEAREST = "resnet56 > resnet20"


def distillation(method: str, pair: Pair, epochs: int) -> dict[str, Any]:
    """The method's parameters for a pair; a warm-up of 20 epochs in 240 is shortened in
    proportion."""
    params = dict(METHODS[method])
    if params.get("method") == "dkd":
        # Standardised, both of DKD's weights are 9 times as large (Sun et al. 2024).
        params["beta"] = pair.dkd_beta * (9 if params.get("standardize") else 1)
    if params.get("method") in ("dkd", "rld"):
        params["warmup_epochs"] = max(1, round(20 * epochs / 240))
    return params


def run(budget: Budget, pair: Pair, method: str, seed: int) -> Run:
    return Run(
        budget.name,
        pair.student,
        budget.epochs,
        seed,
        (Cache(Teacher(pair.teacher, pair.teacher_seed), budget.num_views),),
        distillation(method, pair, budget.epochs),
    )


def plan(budget: Budget) -> list[list[Run]]:
    """Pair by pair, every method with the first seed before another seed."""
    return [
        [run(budget, pair, method, seed) for seed in budget.seeds for method in METHODS]
        for pair in PAIRS[budget.name].values()
    ]


def cells(budget: Budget, pair: Pair) -> dict[str, Cell | None]:
    found = results()
    return {
        method: cell(found, [run(budget, pair, method, seed) for seed in budget.seeds])
        for method in METHODS
    }


def tables() -> Iterator[str]:
    """The tables of the CPU budget's pairs, and of the GPU's."""
    yield from map(small_table, SMALL.values())
    yield published_table()


def small_table(pair: Pair) -> str:
    """Each method of a small pair, its difference from KD, and the published difference of the
    nearest pair."""
    ours, published = cells(BUDGETS["cpu"], pair), TABLE[NEAREST].published
    rows = []
    for method, found in ours.items():
        row = [method, "", "", "", ""]
        if found:
            row[1:3] = found.shown, f"{found.best:.2f}"
            if ours[KD] and method != KD:
                row[3] = f"{found.last - ours[KD].last:+.2f}"
        if method in published and method != KD:
            row[4] = f"{published[method] - published[KD]:+.2f}"
        rows.append(row)
    header = ("Method", "last epoch", "best epoch", "minus KD", f"published, {NEAREST}: minus KD")
    return with_noise(markdown(header, rows), list(ours.values()))


def published_table() -> str:
    """Each pair's published figures, ours of the last epoch if we have any, and the difference."""
    columns = []
    for pair in TABLE.values():
        ours = cells(BUDGETS["gpu"], pair)
        teacher = ours[KD] and 100 * ours[KD].row["teacher_test_accuracy"]
        columns.append(
            [
                beside(pair.published["teacher"], teacher, f"{teacher:.2f}" if teacher else ""),
                *(
                    beside(pair.published.get(name), found and found.last, found and found.shown)
                    for name, found in ours.items()
                ),
            ]
        )
    rows = [list(row) for row in zip(("teacher", *METHODS), *columns, strict=True)]
    return markdown(("Method", *TABLE), rows)


def beside(published: float | None, ours: float | None, shown: str | None) -> str:
    """`published; ours: difference`, without the parts that are missing."""
    figure = "" if published is None else f"{published:.2f}"
    if ours is None:
        return figure
    return f"{figure}; {shown}: {ours - published:+.2f}" if figure else f"; {shown}"


def main() -> None:
    command("methods", __doc__, plan, tables, budgets=("cpu", "gpu", "quick"))


if __name__ == "__main__":
    run_command(main)
