"""Progress in a log, without a terminal, and estimates of the time left."""

import time

import pytest

from pipeline.runtime.progress import EpochLog, bar
from pipeline.runtime.time_left import about, in_words


class Clock:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_a_log_has_at_most_a_line_a_minute_with_the_time_left(clock, capsys):
    for _ in bar(range(100), "shard"):
        clock.now += 25
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  shard: 3 of 100  about 40 minutes left"  # 97 of 25 s
    assert len(lines) == 33  # of 2,500 s; the first multiple of 25 s above a minute is 75 s
    assert lines[-1] == "  shard: 99 of 100  less than a minute left"


def test_work_of_seconds_has_no_line_and_items_without_a_number_have_no_time(clock, capsys):
    assert list(bar("abc", "shard")) == list("abc")
    assert list(bar([], "shard")) == []
    assert capsys.readouterr().out == ""
    for _ in bar(iter(range(3)), "image"):
        clock.now += 70
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"  image: {n}" for n in (1, 2, 3)]


def test_an_epochs_line_says_the_time_left_of_the_training_and_the_last_says_none(clock, capsys):
    log = EpochLog(12)
    for epoch, seconds in enumerate([300, *[120] * 11], 1):  # the first one compiles
        clock.now += seconds
        log.line(epoch, train_loss=0.5)
    left = [
        line.partition(" s")[2].strip() or line.split()[-1]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert left[:4] == [
        "about 55 minutes left",  # 11 of 300 s
        "about 35 minutes left",  # 10 of 210 s
        "about 18 minutes left",  # 9 of 120 s, the median
        "about 16 minutes left",
    ]
    assert left[-2:] == ["about 2 minutes left", "s"]


def test_within_an_epoch_the_time_left_is_that_of_the_whole_training(clock, capsys):
    log = EpochLog(4)
    for epoch in (1, 2):
        for _ in log.steps(range(10), epoch, 10):
            clock.now += 61
        log.line(epoch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  epoch 1: 1 of 10  about 40 minutes left"  # 39 of 40 steps
    assert lines[11].startswith("  epoch 2: 1 of 10  about 29 minutes left")  # 2.9 epochs of 610 s


def test_the_time_left_never_says_more_than_it_knows():
    assert [in_words(seconds) for seconds in (0, 90, 5_300, 5_400, 170_000, 200_000)] == [
        *("1 minute", "2 minutes", "88 minutes", "2 hours", "47 hours", "2 days")
    ]
    assert about(44) == "less than a minute"
    assert about(46) == "about 1 minute"
