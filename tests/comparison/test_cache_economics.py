"""The cache's costs and savings in teacher passes, by arithmetic that a reader can repeat."""

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from pipeline.comparison.cache_economics import CacheFigures, Economics
from pipeline.comparison.measurement.latency import DeviceSpeed, NetworkSpeed, Speeds
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


def costs(**images_per_second: float | None) -> Costs:
    """The default run's; the teacher's rate on each device, None without a network."""
    devices = {
        name: DeviceSpeed(
            name=f"a {name.upper()}",
            cores=2,
            system="Linux x86_64",
            torch="2.15.0+cu132",
            batch_size=64,
            teacher=rate and TEACHER.model_copy(update={"images_per_second": rate}),
            students={"s": STUDENT},
        )
        for name, rate in images_per_second.items()
    }
    timed = Speeds(cpu=devices["cpu"]).machine
    return Costs(devices, timed, timed, DIGITS)


def test_the_passes_of_the_default_run_equal_hand_computed_ones():
    assert DIGITS.figures.model_dump() == {
        "teacher_passes": 8 * 1259 + 179 + 359,  # 10,610
        "passes_saved": (10 + 14 + 12) * 1259 - 10_610,  # 34,714
        "break_even_epochs": 9,  # 8 epochs take 10,072 passes, 9 take 11,331
        "break_even_students": 1,  # of 12 epochs: 15,108 passes
        "store_bytes": 252_094,  # 10,610 x 23.76
    }


@given(
    st.integers(1, 20),
    st.integers(1, 1000),
    st.integers(0, 100),
    st.dictionaries(st.text(max_size=3), st.integers(1, 300), min_size=1, max_size=5),
)
def test_the_break_even_is_the_fewest_that_take_more_passes_than_the_cache(
    views, images, held_out, epochs
):
    economics = DIGITS.model_copy(
        update={
            "views": views,
            "training_images": images,
            "held_out_images": held_out,
            "epochs": epochs,
        }
    )

    def fewest_above(passes_of_one: float) -> int:
        made = views * images + held_out
        return next(n for n in count(1) if n * passes_of_one > made * (1 + 1e-12))

    assert economics.break_even_epochs == fewest_above(images)
    mean = sum(epochs.values()) / len(epochs)
    assert economics.break_even_students == fewest_above(mean * images)


def test_the_sentence_states_how_many_passes_were_saved_or_lost():
    assert cache_sentence(DIGITS.figures) == (
        "The cache took 10,610 teacher passes, a live teacher would have taken 45,324: 34,714 "
        "saved. Caching takes fewer passes from 9 epochs of one student, or from the first student "
        "trained as long as these."
    )
    short = DIGITS.model_copy(update={"epochs": {"a": 2, "b": 3}})
    assert "would have taken 6,295: the cache took 4,315 more." in cache_sentence(short.figures)
    assert "or from 4 students trained as long" in cache_sentence(short.figures)
    one = CacheFigures(
        teacher_passes=1,
        passes_saved=9,
        break_even_epochs=1,
        break_even_students=1,
        store_bytes=None,
    )
    assert "took 1 teacher pass, " in cache_sentence(one)
    assert "fewer passes from 1 epoch of one student" in cache_sentence(one)


def test_time_in_the_teacher_is_passes_over_its_measured_rate_on_the_named_device():
    cpu = costs(cpu=1000.0)
    assert list(cache_table(cpu)["time in the teacher"]) == ["11 s", "45 s", "35 s"]
    assert cost_sentences(cpu)[-1].endswith(
        "At the teacher's 1,000 images/s (a CPU, batches of 64) that would be 11 s and 45 s. "
        "The store takes about 252 kB."
    )
    both = costs(cpu=1000.0, cuda=10_000.0)
    assert list(cache_table(both)["time in the teacher"]) == ["1.1 s", "4.5 s", "3.5 s"]
    on_cpu, on_gpu, timed, cache = cost_sentences(both)
    assert on_cpu == (
        "One image in PyTorch on a CPU: teacher 5.00 ms, s 2.50 (2.25 to 2.75) times as fast."
    )
    assert on_gpu.startswith("One image in PyTorch on a CUDA: ")
    assert timed == "All times were measured on a CPU (2 cores, Linux x86_64, torch 2.15.0)."
    assert "(a CUDA, batches of 64)" in cache


def test_a_teacher_without_a_network_has_passes_and_no_time():
    without = costs(cpu=None)
    assert list(cache_table(without)) == ["", "teacher passes"]
    assert "images/s" not in cost_sentences(without)[-1]


def test_a_duration_is_shown_in_the_unit_that_fits():
    durations = {9.94: "9.9 s", 9.96: "10 s", -35: "-35 s", 120: "2.0 min", 3.6e6: "1,000 h"}
    assert {seconds: duration(seconds) for seconds in durations} == durations
