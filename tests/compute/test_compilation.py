"""Compilation is tried once, and a failure leaves no trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from import_closure import ROOT
from torch import nn

from pipeline.compute import device


class TwoGraphs(nn.Module):
    """A network whose first graph draws random numbers and moves statistics."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
        self.last = nn.Linear(4, 2)

    def forward(self, inputs):
        features = self.first(inputs)
        torch._dynamo.graph_break()
        return self.last(features)


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(device, "_pays_to_compile", lambda *_: True)
    monkeypatch.setattr(device.Compiled, "works", True)
    torch._dynamo.reset()


def trained() -> tuple[list[torch.Tensor], nn.Module, nn.Module]:
    """Gradients, buffers and the next random number after two steps; the network, and the called
    one."""
    torch.manual_seed(0)
    network = TwoGraphs()
    called = device.compile_long_runs(network, torch.device("cpu"), 1)
    for _ in range(2):
        called(torch.rand(8, 3)).square().sum().backward()
    state = [parameter.grad for parameter in network.parameters()]
    return [*state, *network.buffers(), torch.rand(1)], network, called


def test_a_compiler_that_fails_half_way_leaves_no_trace_and_is_asked_once(
    always, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(device, "_pays_to_compile", lambda *_: False)
        expected, _, _ = trained()
    graphs = []

    def second_fails(graph, inputs):
        graphs.append(graph)
        if len(graphs) == 2:
            raise RuntimeError("no second graph")
        return graph

    monkeypatch.setattr(device, "_COMPILER", second_fails)
    for _ in range(2):
        found, network, called = trained()
        assert all(map(torch.equal, found, expected))
    assert called is network  # the second time nothing is tried
    assert len(graphs) == 2
    assert capsys.readouterr().out.count("torch.compile cannot work here: not used") == 1


def test_what_is_compiled_after_a_failure_is_called_as_it_is(always, monkeypatch):
    called = device.compile_long_runs(nn.Linear(3, 2), torch.device("cpu"), 1)
    monkeypatch.setattr(device.Compiled, "works", False)
    monkeypatch.setattr(device, "_COMPILER", lambda *_: pytest.fail("compiled"))
    assert torch.equal(called(torch.ones(1, 3)), called.called(torch.ones(1, 3)))


@pytest.mark.slow
def test_without_a_c_compiler_inductor_is_left_out(tmp_path):
    """In a process of its own, because inductor remembers that there is no compiler."""
    code = (
        "from test_compilation import device, trained\n"
        "device._pays_to_compile = lambda *_: True\n"
        "assert all(values.isfinite().all() for values in trained()[0])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line = process.stdout
    assert "torch.compile cannot work here: not used (" in line
    assert "no-such-compiler" in line
    assert line.count("\n") == 1


def test_too_little_memory_is_not_taken_for_a_missing_compiler(always, monkeypatch):
    def short_of_memory(graph, inputs):
        return lambda *_: torch.empty(10**15)

    monkeypatch.setattr(device, "_COMPILER", short_of_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        trained()
