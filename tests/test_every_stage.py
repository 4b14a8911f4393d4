"""What every stage refuses: damaged data, and inputs that change while it runs."""

from pathlib import Path

import numpy as np
import pytest
from conftest import change_params, run_stage

from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import PREPARED, STORE
from pipeline.runtime.stage_inputs import StageInputs

TRAINS_FOR_INT8 = "int8_training that trains"
#: The arguments of each stage.
STAGES = {
    "prepare": ("prepare",),
    "teacher": ("teacher",),
    "soft_targets": ("soft_targets",),
    "baseline": ("baseline", "small"),
    "student": ("student", "small"),
    "int8_training": ("int8_training", "small"),
    TRAINS_FOR_INT8: ("int8_training", "small"),
    "export_teacher": ("export", "--teacher"),
    "export": ("export", "small"),
    "robustness_teacher": ("robustness", "--teacher"),
    "robustness": ("robustness", "small"),
    "speed": ("speed",),
    "compare": ("compare",),
}
READ_NO_IMAGES = ("prepare", "speed", "int8_training")
#: They compare their inputs before they keep a finished training, too.
KEEP_A_TRAINING = ("teacher", "baseline", "student")


@pytest.fixture
def stage(project: Path, request: pytest.FixtureRequest) -> str:
    if request.param == TRAINS_FOR_INT8:
        change_params("export", precision="int8", int8_training={"epochs": 1})
    return request.param


@pytest.mark.parametrize("stage", [it for it in STAGES if it not in READ_NO_IMAGES], indirect=True)
def test_damaged_images_are_refused(stage):
    images = np.load(PREPARED / "train_images.npy", mmap_mode="r+")
    images[-1, -1, -1, -1] ^= 1
    images.flush()
    with pytest.raises(UserError, match="^`data/prepared` is damaged: "):
        run_stage(*STAGES[stage])


@pytest.mark.parametrize("stage", ["student", TRAINS_FOR_INT8], indirect=True)
def test_damaged_soft_targets_are_refused(stage):
    shard = STORE / "train_view00001_sample000000000.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # of a logit
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"`{shard}` is damaged: its logits do not match"):
        run_stage(*STAGES[stage])


def times_of_outputs() -> dict[Path, int]:
    """When each file was last written, but for those that a training updates after each epoch."""
    files = {path for path in Path().rglob("*") if path.is_file()}
    updated = {
        path for folder in (".scratch", "metrics/history") for path in Path(folder).rglob("*")
    }
    return {path: path.stat().st_mtime_ns for path in files - updated}


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_a_stage_whose_inputs_change_while_it_runs_writes_no_output(stage, monkeypatch):
    before, comparisons = times_of_outputs(), []

    def find_a_change(_: StageInputs) -> None:
        comparisons.append(1)
        if len(comparisons) == 1 + (stage in KEEP_A_TRAINING):
            raise UserError("changed")

    monkeypatch.setattr(StageInputs, "check", find_a_change)
    with pytest.raises(UserError, match="^changed$"):
        run_stage(*STAGES[stage])
    assert times_of_outputs() == before
