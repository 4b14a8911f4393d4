"""What the report says of seeds, and of several students together."""

from types import SimpleNamespace

import pytest

from pipeline.comparison.measurement.statistics import Gain
from pipeline.comparison.report.summary import adjusted_sentence, covered, seed_sentences


def gain(p_value: float) -> Gain:
    return Gain(gain=0.01, low=0.001, high=0.019, p_value=p_value)


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ({"a": 0.03}, []),  # one student
        ({"a": 0.2, "b": 0.3}, []),  # nothing to adjust
        ({"a": 0.001, "b": 0.5}, ["it stays significant"]),
        ({"a": 0.001, "b": 0.002}, ["both stay significant"]),
        ({"a": 0.001, "b": 0.03, "c": 0.04}, ["a alone stays significant"]),
        ({"a": 0.04, "b": 0.03, "c": 0.5}, ["none stays significant"]),
    ],
)
def test_it_is_said_which_gains_stay_significant_among_several_students(p_values, expected):
    said = adjusted_sentence({name: gain(p) for name, p in p_values.items()})
    assert said == [f"Adjusted for {len(p_values)} students (Holm), {text}." for text in expected]


def student(seeds: int, needed: int | None = None, p_value: float = 0.5) -> SimpleNamespace:
    several = SimpleNamespace(trainings=[None] * seeds, needed=needed)
    return SimpleNamespace(
        seeds=several if seeds > 1 else None,
        gain=0.01,
        gain_deviation=0.004,
        tested_gain=gain(p_value),
    )


def test_it_is_said_what_seeds_are_not_in_an_interval_and_how_many_a_significant_gain_needs():
    students = {
        **{"one": student(1), "few": student(3, needed=7), "small": student(3)},
        "sure": student(3, needed=3, p_value=0.01),
    }
    figures = SimpleNamespace(students=students)
    assert seed_sentences(figures) == [
        "One seed of one: another seed would change the gain, which the interval does not cover. "
        "`training.seeds: [0, 1, 2]` trains three.",
        "few: 3 seeds, +1.00 points on average (deviation 0.40 points). An equal mean of 7 "
        "seeds would be significant.",
        "small: 3 seeds, +1.00 points on average (deviation 0.40 points). More seeds would not "
        "make it significant; more test images may.",
        "sure: 3 seeds, +1.00 points on average (deviation 0.40 points). Its interval covers "
        "seeds and test images.",
    ]
    assert "and, for few, small and sure, the seed of the training" in covered(figures)
    assert covered(SimpleNamespace(students={"one": students["one"]})) == (
        "not the seed of the training"
    )
