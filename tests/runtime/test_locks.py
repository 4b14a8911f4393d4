"""A stage that another process runs is refused, whatever the stage."""

import pytest
from conftest import run_stage

from pipeline.runtime import locks
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER, ModelOutputs

STUDENT, BASELINE = ModelOutputs("distilled", "small"), ModelOutputs("baseline", "small")
#: The arguments of each stage, by the folder that it locks.
STAGES = {
    TEACHER.scratch: ("teacher",),
    STUDENT.scratch: ("student", "small"),
    STUDENT.scratch / "2": ("student", "small", "--seed", "2"),
    BASELINE.scratch: ("baseline", "small"),
    BASELINE.scratch / "2": ("baseline", "small", "--seed", "2"),
    STUDENT.int8_scratch: ("int8_training", "small"),
}
NAMED = {
    "export_teacher": ("export", "--teacher"),
    "export@small": ("export", "small"),
    "robustness_teacher": ("robustness", "--teacher"),
    "robustness@small": ("robustness", "small"),
    "speed": ("speed",),
    "compare": ("compare",),
}
STAGES |= {locks.FOLDER / name: arguments for name, arguments in NAMED.items()}


@pytest.mark.parametrize("folder", STAGES, ids=str)
def test_a_second_run_of_a_stage_is_refused_while_the_first_has_not_ended(
    project, monkeypatch, folder
):
    monkeypatch.setattr(locks, "_PATIENCE", 0)
    refusal = f"another run of this stage has locked `{folder}`"
    with locks.exclusive(folder), pytest.raises(UserError, match=refusal):
        run_stage(*STAGES[folder])
