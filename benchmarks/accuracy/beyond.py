"""Beyond the tables: compare other uses of the same number of cached teacher passes.

    python -m benchmarks.accuracy.beyond PROJECT                # recipes/cifar100_laptop.yaml
    python -m benchmarks.accuracy.beyond PROJECT --budget equal # the same; the best of each idea
    python -m benchmarks.accuracy.beyond PROJECT --budget gpu   # recipes/cifar100_240_epochs.yaml
    python -m benchmarks.accuracy.beyond --tables

The opponent sees each cached view once, as with a teacher at every step. Every other way uses the
same number of teacher passes, over all members together: it trains longer on them, splits them
among an ensemble, mixes the views, pairs them, or adds images without labels. Appends to
benchmarks/accuracy/runs.csv; study.py says how.
"""

from pipeline.runtime.command import run_command

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.accuracy.methods import METHODS, SMALL, TABLE
from benchmarks.accuracy.study import (
    BUDGETS,
    UNLABELLED_PER_CLASS,
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

PAIRS = {
    "cpu": [SMALL["resnet20 > resnet8"]],
    "equal": [SMALL["resnet20 > resnet8"]],
    "gpu": [TABLE["resnet56 > resnet20"], TABLE["resnet32x4 > resnet8x4"]],
}
#: A teacher of the pairs -> a more accurate one of the tables.
LARGER = {
    pair.teacher: Teacher(larger.teacher, larger.teacher_seed)
    for pair, larger in (
        (SMALL["resnet20 > resnet8"], SMALL["resnet32 > resnet20"]),
        (TABLE["resnet56 > resnet20"], TABLE["resnet110 > resnet32"]),
    )
}
METHOD = METHODS["KD+LS"]  # the best of those that need no label and take mixed views
FALLING = {**METHOD, "temperature": {"first": 4.0, "last": 1.0}}  # 2.0 is the authors'
OPPONENT = "each view once"
#: All images over those with labels.
_IMAGES = 1 + UNLABELLED_PER_CLASS // BUDGETS["cpu"].per_class


@dataclass(frozen=True)
class Way:
    times: int = 1  # multiple of the budget's student passes
    members: int = 1  # of an ensemble, which divides the views among them
    larger: bool = False  # a teacher of LARGER
    mix: str = "none"
    unlabelled: bool = False  # 3 images without labels for each image of the subset
    paired: bool = False  # as many pairs as half the views; the student sees both views
    method: Mapping[str, Any] = field(default_factory=lambda: METHOD)


WAYS = {
    OPPONENT: Way(),
    "trained twice as long": Way(times=2),
    "unlabelled images": Way(unlabelled=True),
    "cutmix": Way(mix="cutmix"),
    "mixup": Way(mix="mixup"),
    "unlabelled images, trained twice as long": Way(times=2, unlabelled=True),
    "cutmix, trained twice as long": Way(times=2, mix="cutmix"),
    "a larger teacher": Way(larger=True),
    "an ensemble of 2": Way(members=2),
    "trained four times as long": Way(times=4),
    "unlabelled images, trained four times as long": Way(times=4, unlabelled=True),
}
#: The best of each idea, trained four times as long.
EQUAL = {
    OPPONENT: Way(),
    **{
        f"{name}, trained four times as long": replace(way, times=4)
        for name, way in {
            "plain views": Way(),
            "unlabelled images": Way(unlabelled=True),
            "paired views": Way(paired=True),
            "a falling temperature": Way(method=FALLING),
            "a sorted teacher": Way(method={**METHOD, "sort_teacher": True}),
            "paired views by MLKD+LS": Way(paired=True, method=METHODS["MLKD+LS"]),
            "paired views by CRLD": Way(paired=True, method={"method": "crld"}),
            "unlabelled images, a falling temperature": Way(unlabelled=True, method=FALLING),
            "cutmix": Way(mix="cutmix"),
            "a larger teacher": Way(larger=True),
            "an ensemble of 2": Way(members=2),
        }.items()
    },
}


def ways(budget: Budget, pair: int) -> dict[str, Way]:
    """The ways that a pair can take: only the subset has unlabelled images, and not every teacher
    has a larger one."""
    larger = PAIRS[budget.name][pair].teacher in LARGER
    return {
        name: way
        for name, way in (EQUAL if budget.name == "equal" else WAYS).items()
        if (budget.per_class or not way.unlabelled) and (larger or not way.larger)
    }


def run(budget: Budget, pair: int, way: Way, seed: int) -> Run:
    chosen, images = PAIRS[budget.name][pair], _IMAGES if way.unlabelled else 1
    if way.larger:
        teachers = [LARGER[chosen.teacher]]
    else:
        seeds = [chosen.teacher_seed, 1][: way.members]
        teachers = [Teacher(chosen.teacher, teacher_seed) for teacher_seed in seeds]
    caches = tuple(
        Cache(
            teacher,
            budget.num_views // (way.members * images),
            mix=way.mix,
            unlabelled=way.unlabelled,
            paired=way.paired,
        )
        for teacher in teachers
    )
    epochs = budget.epochs * way.times // (images * (1 + way.paired))
    return Run(budget.name, chosen.student, epochs, seed, caches, way.method)


def plan(budget: Budget) -> list[list[Run]]:
    """Pair by pair, the most important ways first, each with every seed."""
    return [
        [run(budget, pair, way, seed) for seed in budget.seeds]
        for pair in range(len(PAIRS[budget.name]))
        for way in ways(budget, pair).values()
    ]


def cells(budget: Budget, pair: int) -> dict[str, Cell | None]:
    found = results()
    return {
        name: cell(found, [run(budget, pair, way, seed) for seed in budget.seeds])
        for name, way in ways(budget, pair).items()
    }


def table(budget: Budget, pair: int) -> str:
    """One row per way: the teacher's accuracy and passes, the student's passes and accuracy, and
    the difference from the opponent's."""
    ours, rows = cells(budget, pair), []
    opponent = ours[OPPONENT]
    for name, found in ours.items():
        line = [name, "", "", "", "", "", ""]
        if found:
            line[1] = f"{100 * found.row['teacher_test_accuracy']:.2f}"
            line[2:4] = (f"{found.row[c]:,}" for c in ("teacher_passes", "student_passes"))
            line[4:6] = found.shown, f"{found.best:.2f}"
            if opponent and name != OPPONENT:
                line[6] = f"{found.last - opponent.last:+.2f}"
        rows.append(line)
    header = ("Way", "teacher", "teacher passes", "student passes", "last epoch", "best epoch",
              f"minus {OPPONENT}")  # fmt: skip
    return with_noise(markdown(header, rows), list(ours.values()))


def tables() -> Iterator[str]:
    """The tables of the CPU budgets' pair, and of the GPU's."""
    for budget in (BUDGETS["cpu"], BUDGETS["equal"], BUDGETS["gpu"]):
        for pair in range(len(PAIRS[budget.name])):
            yield table(budget, pair)


def main() -> None:
    command("beyond", __doc__, plan, tables, budgets=tuple(PAIRS))


if __name__ == "__main__":
    run_command(main)
