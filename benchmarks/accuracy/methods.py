"""Compare the literature's methods on the same cached logits.

    python -m benchmarks.accuracy.methods PROJECT                # recipes/cifar100_laptop.yaml
    python -m benchmarks.accuracy.methods PROJECT --budget gpu   # recipes/cifar100_240_epochs.yaml
    python -m benchmarks.accuracy.methods --tables

At the GPU budget the pairs, teachers and recipe of the published CIFAR-100 tables; at the CPU
budget two small pairs. Appends to benchmarks/accuracy/runs.csv; study.py says how.
"""

from pipeline.runtime.command import run_command

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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


def _pair(teacher: Network, student: Network, beta: float, *figures: float | None) -> Pair:
    names = ("teacher", LABELS, KD, "DIST", "DKD", "TTM", "WTTM", "MLKD", "KD+LS", "DKD+LS",
             "MLKD+LS", "RLD")  # fmt: skip
    published = {n: f for n, f in zip(names, figures, strict=True) if f is not None}
    return Pair(teacher, student, beta, published)


_RESNET, _WIDE, _VGG = "cifar_resnet", "wide_resnet", "cifar_vgg"
#: Published figures. docs/losses.md has the sources of the methods, methods.md those of the tables.
TABLE = {
    "resnet56 > resnet20": _pair(
        Network(_RESNET, "resnet56"), Network(_RESNET, "resnet20"), 2.0,
        72.34, 69.06, 70.66, 71.75, 71.97, 71.83, 71.92, 72.19, 71.43, 72.32, 72.33, 72.00),
    "resnet32x4 > resnet8x4": _pair(
        Network(_RESNET, "resnet32x4"), Network(_RESNET, "resnet8x4"), 8.0,
        79.42, 72.50, 73.33, 76.31, 76.32, 76.17, 76.06, 77.08, 76.62, 77.01, 78.28, 76.64),
    "resnet110 > resnet32": _pair(
        Network(_RESNET, "resnet110"), Network(_RESNET, "resnet32"), 2.0,
        74.31, 71.14, 73.08, 73.69, 74.11, 73.97, 74.13, 74.11, 74.17, 74.29, 74.32, 74.02),
    "wrn_40_2 > wrn_16_2": _pair(
        Network(_WIDE, "wrn_40_2"), Network(_WIDE, "wrn_16_2"), 6.0,
        75.61, 73.26, 74.92, 75.51, 76.24, 76.23, 76.37, 76.63, 76.11, 76.39, 76.95, None),
    "wrn_40_2 > wrn_40_1": _pair(
        Network(_WIDE, "wrn_40_2"), Network(_WIDE, "wrn_40_1"), 6.0,
        75.61, 71.98, 73.54, 74.43, 74.81, 74.32, 74.58, 75.35, 74.37, 74.89, 75.56, 74.88),
    "vgg13 > vgg8": _pair(
        Network(_VGG, "vgg13"), Network(_VGG, "vgg8"), 6.0,
        74.64, 70.36, 72.98, 73.89, 74.68, 74.33, 74.44, 75.18, 74.36, 74.81, 75.22, 74.93),
}  # fmt: skip
_SHUFFLE = (("learning_rate", 0.01),)  # the tables', of mobile networks
TABLE |= {
    "resnet32x4 > shufflenet_v1": _pair(
        Network(_RESNET, "resnet32x4"), Network("cifar_shufflenet_v1", "shufflenet_v1", _SHUFFLE),
        8.0, 79.42, 70.50, 74.07, 76.34, 76.45, 74.18, 74.37, None, None, None, None, None),
    "resnet32x4 > shufflenet_v2": _pair(
        Network(_RESNET, "resnet32x4"), Network("cifar_shufflenet_v2", "shufflenet_v2", _SHUFFLE),
        8.0, 79.42, 71.82, 74.45, 77.35, 77.07, 76.57, 76.55, 78.44, 75.56, 77.37, 78.76, None),
    "vgg13 > mobilenet_v2": _pair(
        Network(_VGG, "vgg13"), Network("cifar_mobilenet_v2", "mobilenet_v2", _SHUFFLE), 6.0,
        74.64, 64.60, 67.37, 68.50, 69.71, 68.98, 69.16, 70.57, 68.61, 69.98, 70.94, None),
}  # fmt: skip
SMALL = {
    "resnet20 > resnet8": Pair(
        Network(_RESNET, "resnet20"), Network(_RESNET, "resnet8"), 2.0, {}, teacher_seed=None
    ),
    "resnet32 > resnet20": Pair(
        Network(_RESNET, "resnet32"), Network(_RESNET, "resnet20"), 2.0, {}
    ),
}
PAIRS = {"cpu": SMALL, "gpu": TABLE}
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
    """Pair by pair, each method with every seed."""
    return [
        [run(budget, pair, method, seed) for method in METHODS for seed in budget.seeds]
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
    header = ("Method", "last epoch", "best epoch", "less KD", f"published, {NEAREST}: less KD")
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
    command("methods", __doc__, plan, tables)


if __name__ == "__main__":
    run_command(main)
