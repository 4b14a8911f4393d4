"""Progress in a log, without a terminal."""

import re

from pipeline.runtime.progress import bar_or_lines


def test_a_log_has_a_line_for_every_tenth_of_the_items(capsys):
    assert list(bar_or_lines(range(250), "shard")) == list(range(250))
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.fullmatch(r"  shard +(\d+)/250 +[\d.]+ s", line)[1]) for line in lines] == [
        25 * tenth for tenth in range(1, 11)
    ]


def test_few_items_have_a_line_each_and_an_empty_list_has_no_line(capsys):
    assert list(bar_or_lines("abc", "shard")) == list("abc")
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert list(bar_or_lines([], "shard")) == []
    assert capsys.readouterr().out == ""
