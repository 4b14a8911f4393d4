"""Progress on a terminal and in a log."""

import re

from pipeline.runtime.progress import bar_or_tenths


def test_a_log_has_a_line_for_every_tenth_of_the_work(capsys):
    assert list(bar_or_tenths(range(250), "shard")) == list(range(250))
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.fullmatch(r"  shard +(\d+)/250 +[\d.]+ s", line)[1]) for line in lines] == [
        25 * tenth for tenth in range(1, 11)
    ]


def test_few_items_have_a_line_each_and_none_have_none(capsys):
    assert list(bar_or_tenths("abc", "shard")) == list("abc")
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert list(bar_or_tenths([], "shard")) == []
    assert capsys.readouterr().out == ""
