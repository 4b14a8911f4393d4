"""The cache's costs and savings in teacher passes, by arithmetic that a reader can repeat."""

from dataclasses import replace
from itertools import count

import pandas as pd
import pytest
from conftest import PARAMS, write_params
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comparison.cache_economics import CacheFigures, Economics
from pipeline.comparison.measurement.latency import EngineSpeed, FileSpeed, Machine, Ratio
from pipeline.comparison.report.costs import Costs, cache_sentence, cost_sentences, speed_of
from pipeline.comparison.report.numbers import duration
from pipeline.comparison.report.tables import cache_table
from pipeline.comparison.results import StoreIndex, cache_economics
from pipeline.distillation.params import load_distillation

DIGITS = Economics(  # the first run
    views=8,
    training_images=1259,
    held_out_images=179 + 359,
    epochs={"mobilenet": 10, "squeezenet": 14, "resnet8": 12},
    bytes_per_row=23.76,
)
STORED = {
    "dataset_fingerprint": "-",
    "teacher_fingerprint": "-",
    "num_views": 4,
    "splits": {"train": 10, "validation": 1, "test": 1},
    "fidelity": {},
}
TEACHER = FileSpeed(latency_ms=5, latency_p95_ms=6, images_per_second=1000)
FLOAT32 = FileSpeed(
    latency_ms=4,
    latency_p95_ms=5,
    images_per_second=4000,
    speedup=Ratio(median=0.8, low=0.75, high=1.25),
    batch_speedup=Ratio(median=4.0, low=3.5, high=4.5),
)
INT8 = FLOAT32.model_copy(update={"speedup": Ratio(median=2.5, low=2.25, high=2.75)})


def costs(**images_per_second: float | None) -> Costs:
    """The first run's; the teacher's rate in each setting, None without a file."""
    settings = {
        name: EngineSpeed(
            engine="PyTorch 2.15.0" if name == "pytorch_cuda" else "onnxruntime 1.32.0",
            device="a GPU" if name.endswith("cuda") else "a CPU",
            threads=1 if name == "onnxruntime_1_thread" else None,
            rounds=100,
            batch_size=64,
            teacher=rate and TEACHER.model_copy(update={"images_per_second": rate}),
            students={"s": {"float32": FLOAT32, "int8": INT8}},
        )
        for name, rate in images_per_second.items()
    }
    timed = Machine(cpu="a CPU", cores=2, system="Linux x86_64", onnxruntime="1.32.0")
    missing = settings["onnxruntime_1_thread"].teacher is None
    return Costs(settings, "it is imported logits." if missing else None, timed, timed, DIGITS)


def test_the_passes_of_the_default_run_equal_hand_computed_ones():
    assert DIGITS.figures.model_dump() == {
        "teacher_passes": 8 * 1259 + 179 + 359,  # 10,610
        "passes_saved": (10 + 14 + 12) * 1259 - 10_610,  # 34,714
        "break_even_epochs": 9,  # 8 epochs take 10,072 passes, 9 take 11,331
        "break_even_students": 1,  # of 12 epochs: 15,108 passes
        "store_bytes": 252_094,  # 10,610 x 23.76
    }


def test_a_student_of_both_views_of_a_pair_takes_two_passes_an_image_and_epoch():
    pairs = DIGITS.model_copy(update={"views": 16, "of_both_views": frozenset({"mobilenet"})})
    assert pairs.figures.model_dump() | {"store_bytes": None} == {
        "teacher_passes": 16 * 1259 + 179 + 359,  # 20,682
        "passes_saved": (2 * 10 + 14 + 12) * 1259 - 20_682,
        "break_even_epochs": 17,  # of a student of one view
        "break_even_students": 2,  # 19,305 passes in the mean
        "store_bytes": None,
    }
    every = pairs.model_copy(update={"of_both_views": frozenset(DIGITS.epochs)})
    assert every.passes_saved == 2 * (10 + 14 + 12) * 1259 - 20_682
    assert every.break_even_epochs == 9


@pytest.mark.parametrize(
    ("section", "own", "sees_both"),
    [
        ({}, None, True),
        ({"paired_views": "weak_to_strong"}, None, False),
        ({"paired_views": "weak_to_strong"}, {"temperature": 2.0}, False),
        ({"paired_views": "weak_to_strong"}, {"paired_views": "both"}, True),
        ({"paired_views": "weak_to_strong"}, {"paired_views": None}, True),
        ({"paired_views": "weak_to_strong"}, {"method": "dkd"}, True),
        ({}, {"method": "dkd", "paired_views": "weak_to_strong"}, False),
    ],
)
def test_the_views_that_a_student_sees_are_those_of_its_training(folder, section, own, sees_both):
    student = PARAMS["students"]["small"] | ({} if own is None else {"distillation": own})
    params = PARAMS | {"distillation": section, "students": {"small": student}}
    write_params(folder, params)
    assert (load_distillation(own, "small").paired_views == "both") == sees_both
    curves = pd.DataFrame({"role": ["distilled"] * 3, "student": ["small"] * 3})
    for policy, passes in (
        ("crop_flip", 30),
        ("weak=crop_flip;strong=none", 60 if sees_both else 30),
    ):
        index = StoreIndex(policy=policy, **STORED)
        assert cache_economics(index, curves, {"small": 1}).online_passes == passes


def test_each_seed_of_a_student_takes_its_epochs_and_a_baseline_takes_no_pass():
    epochs = [("distilled", "a")] * 3 + [("baseline", "a")] * 3 + [("distilled", "b")] * 5
    curves = pd.DataFrame(epochs, columns=["role", "student"])
    economics = cache_economics(StoreIndex(policy="-", **STORED), curves, {"a": 4, "b": 1})
    assert economics.online_passes == (4 * 3 + 5) * 10


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
        "saved. Caching takes fewer passes once one student trains for 9 epochs, or as long as "
        "the average student here."
    )
    short = DIGITS.model_copy(update={"epochs": {"a": 2, "b": 3}})
    assert "would have taken 6,295: the cache took 4,315 more." in cache_sentence(short.figures)
    assert "or once 4 students train as long as the average one here." in cache_sentence(
        short.figures
    )
    one = CacheFigures(
        teacher_passes=1,
        passes_saved=9,
        break_even_epochs=1,
        break_even_students=1,
        store_bytes=None,
    )
    assert "took 1 teacher pass, " in cache_sentence(one)
    assert "once one student trains for 1 epoch," in cache_sentence(one)


def test_time_in_the_teacher_is_passes_over_its_measured_rate_in_the_named_setting():
    cpu = costs(onnxruntime_1_thread=1000.0)
    assert list(cache_table(cpu)["time in the teacher"]) == ["11 s", "45 s", "35 s"]
    assert cost_sentences(cpu)[-1].endswith(
        "At the teacher's 1,000 images/s (onnxruntime 1.32.0 on a CPU, 1 thread, batches of 64) "
        "that would be 11 s and 45 s. The store takes about 252 kB."
    )
    both = costs(onnxruntime_1_thread=1000.0, pytorch_cuda=10_000.0)
    assert list(cache_table(both)["time in the teacher"]) == ["1.1 s", "4.5 s", "3.5 s"]
    assert "(PyTorch 2.15.0 on a GPU, batches of 64)" in cost_sentences(both)[-1]


def test_a_cache_that_took_more_passes_than_it_saved_says_so_in_its_table():
    short = DIGITS.model_copy(update={"epochs": {"a": 2, "b": 3}})
    table = cache_table(replace(costs(onnxruntime_1_thread=1000.0), economics=short))
    assert list(table.iloc[-1]) == ["more than a live teacher", "4,315", "4.3 s"]


def test_the_sentence_says_how_much_faster_or_slower_each_file_is_than_the_teacher():
    speed, timed, _ = cost_sentences(costs(onnxruntime_1_thread=1000.0))
    assert speed == (
        "One image in onnxruntime 1.32.0 on a CPU, 1 thread: teacher 5.00 ms, s 1.25 x slower "
        "(1.33 x slower to 1.25 x faster), s int8 2.5 x faster (2.25 to 2.75)."
    )
    assert timed == "All times were measured on a CPU (2 cores, Linux x86_64, onnxruntime 1.32.0)."


def test_one_files_speed_is_said_against_the_teacher_for_the_setting_that_is_asked_for():
    speed = costs(onnxruntime_1_thread=1000.0, pytorch_cuda=None).speed
    assert speed_of(speed, "s", "int8") == "2.5 x faster than the teacher (2.25 to 2.75)"
    assert speed_of(speed, "s").startswith("1.25 x slower than the teacher (")
    assert speed_of(speed, "other") == "not measured"


def test_a_teacher_without_a_file_has_passes_and_no_time():
    without = costs(onnxruntime_1_thread=None)
    assert list(cache_table(without)) == ["", "teacher passes"]
    speed, _, cache = cost_sentences(without)
    assert "images/s" not in cache
    assert speed.endswith(
        " There is no ratio to the teacher, which was not timed: it is imported logits."
    )


def test_a_duration_is_shown_in_the_unit_that_fits():
    durations = {9.94: "9.9 s", 9.96: "10 s", -35: "-35 s", 120: "2.0 min", 3.6e6: "1,000 h"}
    assert {seconds: duration(seconds) for seconds in durations} == durations
