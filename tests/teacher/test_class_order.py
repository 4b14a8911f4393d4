"""A significantly better order of the classes is found always, and named; chance is not."""

import numpy as np
import pytest
from test_accuracy_gate import check, refusal

from pipeline.teacher.class_order import LIKELY, SIGNIFICANCE, OtherOrder, best_other_order


def names(count: int) -> list[str]:
    return [f"class {c:04d}" for c in range(count)]


def confused(num_classes: int, accuracy: float) -> np.ndarray:
    """The probabilities of the predictions for each class: [C, C]."""
    rows = np.full((num_classes, num_classes), (1 - accuracy) / (num_classes - 1))
    np.fill_diagonal(rows, accuracy)
    return rows


def draw(rows: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    uniform = np.random.default_rng(seed).random(len(labels))
    return (rows[labels].cumsum(1) < uniform[:, None]).sum(1).clip(0, len(rows) - 1)


def found_of(
    rows: np.ndarray, per_class: int, seed: int = 0, class_names: list[str] | None = None
) -> OtherOrder:
    labels = np.repeat(np.arange(len(rows)), per_class)
    return best_other_order(draw(rows, labels, seed), labels, class_names or names(len(rows)))


def places_in(order: list[str], class_names: list[str]) -> np.ndarray:
    return np.array([order.index(name) for name in class_names])


NATURAL = [f"c{k}" for k in range(11)]  # the folders are c0, c1, c10, c2, ...


def test_a_perfect_teacher_in_natural_order_is_refused_with_that_order_and_the_pairs(project):
    labels = np.repeat(np.arange(11), 22)
    predictions = places_in(NATURAL, sorted(NATURAL))[labels]
    message = refusal(labels, predictions, sorted(NATURAL))  # the accuracy of 18 % passes
    assert message.startswith("teacher accuracy on validation: 18.18% (44 of 242), but 100.00% wit")
    assert "the outputs are in natural order (c0, c1, c2, c3, c4, c5, c6, c7, c8, c9," in message
    assert "images of `c10` are predicted as `c9`, images of `c2` are predicted as `c10`" in message
    assert message.count("are predicted as") == 9
    assert "Set `teacher.checkpoint_classes`: for each class, in the order" in message


def test_two_swapped_classes_of_ten_are_refused_by_name_even_above_the_minimum(project):
    labels = np.arange(100) % 10
    swapped = np.where(labels == 2, 7, np.where(labels == 7, 2, labels))
    for changed in ({}, {"minimum_accuracy": 0.5}):
        message = refusal(labels, swapped, **changed)
        assert "80.00% (80 of 100), but 100.00% with the classes in another order" in message
        assert (
            "images of `class 002` are predicted as `class 007`, images of `class 007` are "
            "predicted as `class 002`\n" in message
        )
        assert message.count("are predicted as") == 2


@pytest.mark.parametrize(
    ("usual", "order"),
    [
        ("alphabetical order that ignores case", ["ant", "Bee", "cat", "Dog", "eel", "Fly"]),
        ("natural order that ignores case", ["A2", "a10", "B1", "b3", "C4", "c20"]),
        (
            "alphabetical order that ignores case and punctuation",
            ["air_bus", "airbus a", "air-car", "airplane", "bus", "Car"],
        ),
        ("ImageNet's order", ["tench", "goldfish", "hen", "ostrich", "brambling", "house finch"]),
    ],
)
def test_usual_orders_are_named(usual, order):
    rows = np.eye(6)[places_in(order, sorted(order))]
    found = found_of(rows, 10, class_names=sorted(order))
    assert found.p_value < SIGNIFICANCE
    assert found.name == usual
    assert ", ".join(order) in found.in_words()


@pytest.mark.parametrize(
    ("num_classes", "per_class", "accuracy", "shift"),
    [(100, 2, 0.7, 1), (10, 5, 0.6, 3), (1000, 1, 1.0, 500), (2, 12, 1.0, 1)],
)
def test_a_shifted_order_is_found_with_few_images_of_each_class(
    num_classes, per_class, accuracy, shift
):
    found = found_of(np.roll(confused(num_classes, accuracy), shift, 1), per_class)
    if per_class == 1:  # no half has what the other needs
        assert found.p_value > SIGNIFICANCE
    else:
        assert found.p_value < SIGNIFICANCE


@pytest.mark.parametrize(("per_class", "refused"), [(5, False), (6, True)])
def test_two_swapped_classes_of_ten_are_refused_from_six_images_of_each(per_class, refused):
    swapped = np.eye(10)[[0, 1, 7, 3, 4, 5, 6, 2, 8, 9]]
    assert (found_of(swapped, per_class).p_value <= SIGNIFICANCE) == refused


def test_a_likely_order_of_few_images_is_printed_and_not_refused(project, capsys):
    labels = np.arange(40) % 10
    check(labels, np.where(labels == 2, 7, np.where(labels == 7, 2, labels)))
    printed = capsys.readouterr().out
    assert "the classes may be in another order (p = 0." in printed
    assert "40 validation images are too few to be sure): images of `class 002` are" in printed


def test_a_permutation_is_not_found_in_predictions_of_chance():
    rng = np.random.default_rng(0)
    labels, predictions = np.arange(200) % 50, rng.integers(0, 50, 200)
    found = best_other_order(predictions, labels, names(50))
    assert found.correct < 10  # on the same images, the best has more than 40
    assert found.p_value > LIKELY


def test_one_prediction_for_two_classes_is_no_swap():
    """Of 100 and 50 images, all predicted as the rarer class: swapped, 100 are right."""
    labels = np.repeat([0, 1], [100, 50])
    assert best_other_order(np.ones(150, int), labels, names(2)).p_value == 1
    shifted = np.array([[0.05, 0.95], [0.01, 0.99]])
    p_values = [
        best_other_order(draw(shifted, labels, s), labels, names(2)).p_value for s in range(20)
    ]
    assert min(p_values) > LIKELY


def in_pairs(num_classes: int, inside: float) -> np.ndarray:
    """Classes of which each two are mixed up: the other one is predicted in a share `inside`."""
    rows = np.eye(num_classes) * (1 - inside)
    rows[np.arange(num_classes), np.arange(num_classes) ^ 1] = inside
    return 0.9 * rows + 0.1 / num_classes


REAL_TEACHERS = {
    "good": (confused(10, 0.9), 20),
    "few images of each class": (confused(100, 0.6), 2),
    "weak": (confused(10, 0.3), 10),
    "two classes that it mixes up": (in_pairs(2, 0.4), 50),
    "five pairs that it mixes up": (in_pairs(10, 0.45), 20),
    "none": (confused(10, 0.1), 20),
}


def false_alarms(rows: np.ndarray, per_class: int, trials: int) -> np.ndarray:
    p_values = [found_of(rows, per_class, seed).p_value for seed in range(trials)]
    return np.array([np.mean(np.array(p_values) <= level) for level in (SIGNIFICANCE, LIKELY)])


@pytest.mark.parametrize("teacher", REAL_TEACHERS)
def test_a_real_teacher_is_not_refused_by_chance(teacher):
    refused, likely = false_alarms(*REAL_TEACHERS[teacher], trials=60)
    assert refused == 0
    assert likely < 0.1


@pytest.mark.slow
def test_even_classes_that_are_mixed_up_evenly_are_seldom_refused():
    """The worst case: either order is as good. Measured: 0.1 % (10 classes), 0.25 % (50)."""
    assert false_alarms(in_pairs(10, 0.5), 20, 4000)[0] < 0.003
    assert false_alarms(in_pairs(50, 0.5), 10, 2000)[0] < 0.006
    for rows, per_class in REAL_TEACHERS.values():
        assert false_alarms(rows, per_class, 2000)[0] <= 0.002
