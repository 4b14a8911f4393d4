"""`distillation.temperature: {first: ..., last: ...}`: T over the epochs of a training."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import change_params, run_stage, write_params
from torch.nn.functional import kl_div, log_softmax

from pipeline.commands.check import problems
from pipeline.distillation.objective import loss_over_epochs, student_loss
from pipeline.distillation.params import KD, METHODS, TemperatureSchedule
from pipeline.int8_training.training_run import continued_loss
from pipeline.store.format.encodings import decode, encode
from pipeline.students.loop import TrainingBatch

CPU = torch.device("cpu")
SCHEDULE = {"first": 8.0, "last": 1.0}
WITH_TEMPERATURE = [
    name
    for name, model in METHODS.items()
    if "temperature" in model.model_fields and not model.needs_pairs
]


def batch_of(epoch: int) -> TrainingBatch:
    return TrainingBatch(epoch, 0, np.arange(6), torch.arange(6) % 4)


def logits_and_targets(classes: int = 10) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(0)
    student, teacher = 3 * rng.standard_normal((2, 6, classes)).astype(np.float32)
    return torch.from_numpy(student), teacher


def test_temperature_falls_along_half_a_cosine_and_stays_at_the_last():
    schedule = TemperatureSchedule(**SCHEDULE)
    found = [schedule.at(epoch, 5) for epoch in range(1, 8)]
    # 1 + 7 · (1 + cos x) / 2 for x = 0, 45, 90, 135, 180 degrees
    half = 7 / 2 / math.sqrt(2)
    assert found == pytest.approx([8, 4.5 + half, 4.5, 4.5 - half, 1, 1, 1], rel=1e-12)
    assert schedule.at(1, 1) == 8
    rising = TemperatureSchedule(first=1.0, last=8.0)
    assert [rising.at(epoch, 3) for epoch in (1, 2, 3)] == pytest.approx([1, 4.5, 8])


def test_each_epoch_has_kl_at_its_own_temperature():
    student, teacher = logits_and_targets()
    params = KD(temperature=SCHEDULE, soft_label_weight=1.0, hard_label_weight=0.0)
    loss = loss_over_epochs(params, lambda _: lambda *_: (teacher, None), CPU, 3)
    for epoch, t in ((1, 8.0), (2, 4.5), (3, 1.0), (2, 4.5)):
        rows = [log_softmax(logits / t, 1) for logits in (student, torch.from_numpy(teacher))]
        expected = t**2 * kl_div(*rows, reduction="batchmean", log_target=True)
        found = loss(student, batch_of(epoch))
        assert found.item() == pytest.approx(expected.item(), rel=1e-6), epoch


@pytest.mark.parametrize("method", WITH_TEMPERATURE)
def test_every_method_with_a_temperature_takes_a_schedule(method):
    student, teacher = logits_and_targets()
    targets = lambda *_: (teacher, None)  # noqa: E731
    loss = loss_over_epochs(
        METHODS[method](method=method, temperature=SCHEDULE), lambda _: targets, CPU, 3
    )
    found = [loss(student, batch_of(epoch)).item() for epoch in (1, 2, 3)]
    plain = [METHODS[method](method=method, temperature=t) for t in (8.0, 4.5, 1.0)]
    each = zip((1, 2, 3), plain, strict=True)
    assert found == [
        student_loss(params, targets, CPU)(student, batch_of(e)).item() for e, params in each
    ]
    assert len(set(found)) == 3


def test_rows_of_top_k_are_decoded_at_the_temperature_of_the_epoch():
    student, teacher = logits_and_targets(classes=40)
    labels = np.arange(6) % 4
    arrays = encode(teacher, labels, "top_k", 5)

    def at(temperature):
        return lambda *_: decode(arrays, labels, 40, temperature=temperature)

    loss = loss_over_epochs(KD(temperature=SCHEDULE), at, CPU, 3)
    found = [loss(student, batch_of(epoch)).item() for epoch in (1, 2, 3)]
    plain = [student_loss(KD(temperature=t), at(t), CPU) for t in (8.0, 4.5, 1.0)]
    assert found == [loss(student, batch_of(1)).item() for loss in plain]
    other_rows = student_loss(KD(temperature=4.5), at(8.0), CPU)
    assert found[1] != other_rows(student, batch_of(2)).item()


def test_a_training_for_int8_continues_at_the_last_temperature():
    student, teacher = logits_and_targets()
    targets = lambda *_: (teacher, None)  # noqa: E731
    loss = continued_loss(
        loss_over_epochs(KD(temperature=SCHEDULE), lambda _: targets, CPU, 40), 40
    )
    at_last = student_loss(KD(temperature=1.0), targets, CPU)
    for epoch in (1, 2):
        batch = batch_of(epoch)
        expected = at_last(student, replace(batch, epoch=40 + epoch))
        assert loss(student, batch).item() == expected.item()


def test_check_says_what_a_schedule_lacks(project):
    whole = r"expected a number, or `{first: 8.0, last: 1.0}`"
    for value, message in (
        ({"first": 8.0}, f"`: it is {{'first': 8.0}}; {whole}."),
        ({**SCHEDULE, "end": 2.0}, whole),
        ([8.0, 1.0], f"`: it is [8.0, 1.0]; {whole}."),
        ({"first": 8.0, "last": 0.0}, ".last` is 0.0; expected greater than 0."),
        (-1.0, "` is -1.0; expected greater than 0."),
        (SCHEDULE, ""),
    ):
        change_params("distillation", temperature=value)
        found = "\n".join(problems())
        assert ("`params.yaml: distillation.temperature" in found) == bool(message)
        assert message in found


def test_a_student_trains_by_a_schedule_and_another_overrides_it_with_a_number(project):
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["training"]["epochs"] = 2
    history, found = Path("metrics/history/students/small.csv"), []
    for section, own in ((8.0, {}), (SCHEDULE, {}), (SCHEDULE, {"temperature": 8.0})):
        params["distillation"]["temperature"] = section
        params["students"]["small"]["distillation"] = own
        write_params(Path(), params)
        run_stage("student", "small")
        found.append(history.read_text().splitlines())
    plain, scheduled, overridden = found
    assert plain == overridden
    assert scheduled[1] == plain[1]  # the first epoch, at T = 8
    assert scheduled[2] != plain[2]
