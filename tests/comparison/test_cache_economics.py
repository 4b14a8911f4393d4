"""The cache's costs and savings in teacher passes, by arithmetic that a reader can repeat."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comparison.cache_economics import Economics
from pipeline.comparison.measurement.latency import DeviceSpeed, NetworkSpeed
from pipeline.comparison.report.costs import Costs, cache_sentence, cost_sentences
from pipeline.comparison.report.numbers import duration
from pipeline.comparison.report.tables import cache_table

DIGITS = Economics(  # the default run
    views=8,
    training_images=1259,
    held_out_images=179 + 359,
    epochs={"mobilenet": 10, "squeezenet": 14, "resnet8": 12},
    bytes_per_row=23.76,
)
TEACHER = NetworkSpeed(latency_ms=5, latency_p95_ms=6, images_per_second=1000)
STUDENT = NetworkSpeed(
    latency_ms=2,
    latency_p95_ms=2.5,
    images_per_second=4000,
    speedup=2.5,
    speedup_low=2.25,
    speedup_high=2.75,
)


def device(name: str, teacher: NetworkSpeed | None = TEACHER) -> DeviceSpeed:
    return DeviceSpeed(
        name=name, torch="2.15", batch_size=64, teacher=teacher, students={"s": STUDENT}
    )


def test_the_passes_of_the_default_run_equal_hand_computed_ones():
    assert DIGITS.figures.model_dump() == {
        "teacher_passes": 8 * 1259 + 179 + 359,  # 10,610
        "passes_saved": (10 + 14 + 12) * 1259 - 10_610,  # 34,714
        "break_even_epochs": 9,  # 8 epochs take 10,072 passes, 9 take 11,331
        "break_even_students": 1,  # of 12 epochs: 15,108 passes
        "store_bytes": 252_094,  # 10,610 x 23.76
    }


def test_an_equal_number_of_passes_is_not_yet_cheaper():
    economics = Economics(
        views=4, training_images=10, held_out_images=0, epochs={"a": 2, "b": 2}, bytes_per_row=None
    )
    assert economics.passes_saved == 0
    assert economics.break_even_epochs == 5  # 4 epochs take the 40 passes of the cache
    assert economics.break_even_students == 3  # 2 students of 2 epochs do
    assert economics.store_bytes is None


@given(
    st.integers(1, 20),
    st.integers(1, 1000),
    st.integers(0, 100),
    st.dictionaries(st.text(max_size=3), st.integers(1, 300), min_size=1, max_size=5),
)
def test_the_break_even_is_the_fewest_that_take_more_passes_than_the_cache(
    views, images, held_out, epochs
):
    economics = Economics(
        views=views,
        training_images=images,
        held_out_images=held_out,
        epochs=epochs,
        bytes_per_row=None,
    )
    made = views * images + held_out

    def fewest_above(passes_of_one: float) -> int:
        count = 1
        while count * passes_of_one <= made * (1 + 1e-12):
            count += 1
        return count

    assert economics.break_even_epochs == fewest_above(images)
    mean = sum(epochs.values()) / len(epochs)
    assert economics.break_even_students == fewest_above(mean * images)


def test_the_sentence_states_how_many_passes_were_saved_or_lost():
    assert cache_sentence(DIGITS.figures) == (
        "The cache took 10,610 teacher passes, a live teacher would have taken 45,324: 34,714 "
        "saved. Caching is cheaper from 9 epochs of one student, or from the first student trained "
        "as long as these."
    )
    short = DIGITS.model_copy(update={"epochs": {"a": 2, "b": 3}})
    assert "would have taken 6,295: the cache took 4,315 more." in cache_sentence(short.figures)
    assert "or from 4 students trained as long" in cache_sentence(short.figures)


def test_time_in_the_teacher_is_passes_over_its_measured_rate_on_the_named_device():
    costs = Costs({"cpu": device("a CPU")}, DIGITS)
    assert list(cache_table(costs)["time in the teacher"]) == [
        "11 s",
        "45 s",
        "35 s",
    ]  # at 1,000 images/s
    assert cost_sentences(costs)[-1].endswith(
        "At the teacher's 1,000 images/s (a CPU, batches of 64) that is 11 s and 45 s. "
        "The store takes about 252 kB."
    )
    faster = TEACHER.model_copy(update={"images_per_second": 10_000.0})
    both = Costs({"cpu": device("a CPU"), "cuda": device("a GPU", faster)}, DIGITS)
    assert list(cache_table(both)["time in the teacher"]) == ["1.1 s", "4.5 s", "3.5 s"]
    assert "(a GPU, batches of 64)" in cost_sentences(both)[-1]
    assert [sentence.partition(":")[0] for sentence in cost_sentences(both)[:2]] == [
        "One image on a CPU",
        "One image on a GPU",
    ]


def test_a_teacher_without_a_network_has_passes_and_no_time():
    costs = Costs({"cpu": device("a CPU", None)}, DIGITS)
    assert list(cache_table(costs)) == ["", "teacher passes"]
    assert "images/s" not in cost_sentences(costs)[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.44, "8.4 s"),
        (9.96, "10 s"),
        (-35, "-35 s"),
        (120, "2.0 min"),
        (7200, "2.0 h"),
        (3.6e6, "1,000 h"),
    ],
)
def test_a_duration_is_shown_in_the_unit_that_fits(seconds, text):
    assert duration(seconds) == text
