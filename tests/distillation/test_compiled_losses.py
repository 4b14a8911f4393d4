"""torch.compile takes every method as one graph, and keeps its values."""

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.compute import device
from pipeline.distillation.objective import method_loss
from pipeline.distillation.params import METHODS


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_method_has_the_values_and_gradients_of_the_method(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(device, "_pays_to_compile", lambda *_: True)
    torch._dynamo.reset()
    counters.clear()
    params = METHODS[name](method=name)
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(64, 100) for _ in range(2))
    student.requires_grad_()
    named = {"labels": torch.randint(100, (64,))} if params.needs_labels else {}
    pairs = (torch.stack([student, student.flip(0)]), [teacher, teacher.flip(0)])

    def computed(method) -> list[torch.Tensor]:
        loss = method(*(pairs if params.needs_pairs else (student, teacher)), **named)
        return [loss.detach(), *torch.autograd.grad(loss, student)]

    method = method_loss(params, "paired_" if params.needs_pairs else "")
    compiled = device.compile_long_runs(method, torch.device("cpu"), 1)
    found = computed(compiled)
    assert isinstance(compiled, device.Compiled)
    assert device.Compiled.works
    for values, expected in zip(found, computed(method), strict=True):
        assert (values - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert all(map(torch.equal, computed(compiled), found))
    assert counters["stats"]["unique_graphs"] == 1  # neither broken nor compiled again
