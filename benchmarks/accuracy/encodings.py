"""Compare accuracy with bytes: students of dense and sparse caches, both tails, at T = 1 and 4.

    python -m benchmarks.accuracy.encodings PROJECT               # recipes/cifar100_laptop.yaml
    python -m benchmarks.accuracy.encodings PROJECT --budget gpu  # recipes/cifar100_240_epochs.yaml
    python -m benchmarks.accuracy.encodings --tables

All students learn by `kd` from the same logits of the same views, with one store per encoding.
(benchmarks/encodings.py measures the cost and loss of an encoding without training.)
Appends to benchmarks/accuracy/runs.csv; study.py says how.
"""

from pipeline.runtime.command import run_command

from collections.abc import Iterator

from benchmarks.accuracy.methods import SMALL, TABLE
from benchmarks.accuracy.study import (
    BUDGETS,
    Budget,
    Cache,
    Cell,
    Run,
    Teacher,
    cell,
    command,
    markdown,
    results,
    with_noise,
)

PAIRS = {"cpu": SMALL["resnet20 > resnet8"], "gpu": TABLE["resnet56 > resnet20"]}
TEMPERATURES = (4.0, 1.0)
DENSE = (None, "spread")  # every class is kept, so there is no tail
#: (k, tail)
ENCODINGS = [DENSE, *((k, tail) for k in (5, 10, 20, 50) for tail in ("bucket", "spread"))]


def run(budget: Budget, k: int | None, tail: str, temperature: float, seed: int) -> Run:
    pair = PAIRS[budget.name]
    # Only overrides of the method's defaults, so that the dense run at T = 4 is that of methods.py.
    distillation = {"method": "kd"}
    if temperature != 4.0:
        distillation["temperature"] = temperature
    if tail != "spread":
        distillation["tail"] = tail
    cache = Cache(Teacher(pair.teacher, pair.teacher_seed), budget.num_views, k)
    return Run(budget.name, pair.student, budget.epochs, seed, (cache,), distillation)


def plan(budget: Budget) -> list[list[Run]]:
    return [
        [run(budget, k, tail, temperature, seed) for k, tail in ENCODINGS]
        for temperature in TEMPERATURES
        for seed in budget.seeds
    ]


def cells(budget: Budget) -> dict[tuple[int | None, str, float], Cell | None]:
    found = results()
    return {
        (k, tail, t): cell(found, [run(budget, k, tail, t, seed) for seed in budget.seeds])
        for k, tail in ENCODINGS
        for t in TEMPERATURES
    }


def table(budget: Budget) -> str:
    """One row per encoding and tail: bytes per view of an image; and for each temperature the last
    epoch's accuracy, and its difference from that of the dense cache."""
    ours, rows = cells(budget), []
    for k, tail in ENCODINGS:
        here = [ours[k, tail, t] for t in TEMPERATURES]
        sizes = [found.row["bytes_per_view"] for found in here if found]
        line = ["dense" if k is None else f"top-{k}, {tail}", f"{sizes[0]:.1f}" if sizes else ""]
        for t, found in zip(TEMPERATURES, here, strict=True):
            dense = ours[*DENSE, t]
            line.append(found.shown if found else "")
            both = found and dense and k is not None
            line.append(f"{found.last - dense.last:+.2f}" if both else "")
        rows.append(line)
    columns = [name for t in TEMPERATURES for name in (f"T = {t:g}: last epoch", "minus dense")]
    return with_noise(markdown(["Encoding", "bytes per view", *columns], rows), list(ours.values()))


def tables() -> Iterator[str]:
    """The tables of the CPU budget, and of the GPU's."""
    for budget in (BUDGETS["cpu"], BUDGETS["gpu"]):
        yield table(budget)


def main() -> None:
    command("encodings", __doc__, plan, tables)


if __name__ == "__main__":
    run_command(main)
