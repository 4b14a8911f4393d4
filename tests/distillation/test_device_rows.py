"""Soft targets that a GPU keeps are those that would be copied to it for each batch."""

import numpy as np
import pytest
import torch

from pipeline.distillation import device_rows
from pipeline.distillation.device_rows import DeviceRows
from pipeline.distillation.objective import student_loss
from pipeline.distillation.params import KD
from pipeline.students.loop import TrainingBatch

CPU = torch.device("cpu")
VIEWS, SAMPLES, CLASSES = 3, 20, 7
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(VIEWS, SAMPLES, CLASSES)).astype(np.float16)
KEPT = RNG.random(LOGITS.shape) < 0.5


class Lookup:
    """A store's `gather`: dense, or with the kept classes of top_k."""

    def __init__(self, *, top_k: bool):
        self._top_k, self.asked = top_k, []

    def __call__(self, view: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        self.asked.append((view, len(samples)))
        rows = LOGITS[view, samples]
        return (rows.astype(np.float32), KEPT[view, samples]) if self._top_k else (rows, None)


@pytest.mark.parametrize("top_k", [False, True])
def test_kept_rows_equal_those_of_the_store_and_each_view_is_read_once(monkeypatch, top_k):
    monkeypatch.setattr(device_rows, "_COPIED", 8)  # in parts, the last one smaller
    lookup = Lookup(top_k=top_k)
    kept_rows, lookup.asked = DeviceRows(lookup, VIEWS, SAMPLES, CPU), []
    for view, samples in [(2, [19, 0, 0]), (0, [7, 8]), (2, [1]), (1, list(range(20)))]:
        found = kept_rows.gather(view, torch.tensor(samples))
        for tensor, expected in zip(found, Lookup(top_k=top_k)(view, samples), strict=True):
            assert (tensor is None) == (expected is None)
            if tensor is not None:
                assert tensor.dtype == torch.from_numpy(expected).dtype
                assert np.array_equal(tensor.numpy(), expected)
    assert lookup.asked == [(view, count) for view in (2, 0, 1) for count in (8, 8, 4)]


@pytest.mark.parametrize(
    ("free", "kept"), [(8 * LOGITS.nbytes, True), (8 * LOGITS.nbytes - 1, False)]
)
def test_rows_are_kept_if_they_take_an_eighth_of_a_gpus_free_memory_at_most(
    monkeypatch, free, kept
):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free, 10 * free))
    made = []
    monkeypatch.setattr(DeviceRows, "__init__", lambda self, *arguments: made.append(arguments))
    lookup = Lookup(top_k=False)
    found = DeviceRows.if_they_fit(lookup, VIEWS, SAMPLES, torch.device("cuda"))
    assert (found is not None) == kept == (len(made) == 1)
    assert DeviceRows.if_they_fit(lookup, VIEWS, SAMPLES, CPU) is None  # a CPU reads the store


@pytest.mark.parametrize("tail", ["spread", "bucket"])
def test_a_loss_from_kept_rows_is_that_from_copied_rows_to_the_last_bit(monkeypatch, tail):
    params = KD(temperature=4.0, soft_label_weight=0.9, hard_label_weight=0.1, tail=tail)
    samples = np.array([3, 19, 3, 0])
    rows = torch.from_numpy(samples)
    batch = TrainingBatch(1, 1, samples, torch.tensor([0, 1, 0, 6]), rows=rows)
    logits = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0))
    copied = student_loss(params, Lookup(top_k=True), CPU, (VIEWS, SAMPLES))(logits, batch)
    monkeypatch.setattr(DeviceRows, "if_they_fit", DeviceRows)
    lookup = Lookup(top_k=True)
    loss = student_loss(params, lookup, CPU, (VIEWS, SAMPLES))
    assert torch.equal(loss(logits, batch), copied)
    assert (1, SAMPLES) in lookup.asked
