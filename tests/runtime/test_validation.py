"""A file that does not fit its model is refused by the names of its keys."""

import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from pipeline.runtime.errors import UserError
from pipeline.runtime.validation import Record, read_model


class Speed(Record):
    latency_ms: float
    runs: int | Literal["all"] = "all"


class Speeds(Record):
    networks: dict[str, Speed]
    order: list[int] = Field(default=[])


FAST = {"latency_ms": 1.5}


def refusal(content: object) -> list[str]:
    Path("x.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError) as error:
        read_model("x.json", Speeds, produced_by="dvc repro speed")
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"networks": {"a": {}}}, "`x.json: networks.a.latency_ms` is missing."),
        (
            {"networks": {"a": FAST | {"latency": 3}}},
            "`x.json: networks.a.latency` is unknown; did you mean `latency_ms`? "
            "Known: latency_ms, runs.",
        ),
        (
            {"networks": {"a": FAST | {"runs": "many"}}},
            "`x.json: networks.a.runs` is 'many'; expected a valid integer.",
        ),
        (
            {"networks": {}, "order": [1, "b"]},
            "`x.json: order.1` is 'b'; expected a valid integer.",
        ),
    ],
)
def test_a_problem_is_named_by_the_keys_of_the_file(folder, content, line):
    first, *_, last = refusal(content)
    assert first == line
    assert last == "Remove it and run `dvc repro speed`."


def test_a_file_with_many_problems_names_the_first_ten(folder):
    lines = refusal({"networks": {}, "order": ["a"] * 1000})
    assert len(lines) == 11
