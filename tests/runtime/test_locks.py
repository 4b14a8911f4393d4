"""A stage that another process runs is refused, whatever the stage."""

import pytest
from conftest import run_stage

from pipeline.runtime import locks
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import ModelOutputs

INT8 = ModelOutputs("distilled", "small").int8_scratch
STAGES = {
    "export_teacher": ("export", "--teacher"),
    "export@small": ("export", "small"),
    "robustness_teacher": ("robustness", "--teacher"),
    "robustness@small": ("robustness", "small"),
    "speed": ("speed",),
    "compare": ("compare",),
    INT8: ("int8_training", "small"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_of_a_stage_is_refused_while_the_first_has_not_ended(
    project, monkeypatch, stage
):
    monkeypatch.setattr(locks, "_PATIENCE", 0)
    folder = stage if stage == INT8 else locks.FOLDER / stage
    refusal = f"another run of this stage has locked `{folder}`"
    with locks.exclusive(folder), pytest.raises(UserError, match=refusal):
        run_stage(*STAGES[stage])
