"""A captured network is compared with the network itself; whatever fails leaves no trace.

No CUDA graph can be made without a GPU. Here the capture fails as it does on such a machine, or it
records the operations on the CPU, or another callable stands for it.
"""

import copy
import random

import pytest
import torch
from recorded_graphs import Graph, record_graphs
from torch import nn
from torch.func import functional_call

from benchmarks import loops
from pipeline.compute.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.training import cuda_graph
from pipeline.training.cuda_graph import CapturedNetwork, capture_long_runs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VIEWS = loops.training_views(loops.noise(4, 8, 2), CPU)


@pytest.fixture(autouse=True)
def first_attempt(monkeypatch):
    monkeypatch.setattr(CapturedNetwork, "works", True)


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))


def trained(network: nn.Module, called: nn.Module) -> list[torch.Tensor]:
    """Logits, gradients, buffers and the next random number after three steps of two shapes."""
    torch.manual_seed(1)
    logits = []
    for size in (8, 5, 8):
        logits.append(called(torch.rand(size, 3)))
        logits[-1].square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    return [*logits, *gradients, *network.buffers(), torch.rand(1)]


def captured(network: nn.Module) -> list[torch.Tensor]:
    return trained(network, CapturedNetwork(network))


def expected() -> list[torch.Tensor]:
    network = make_network()
    return trained(network, network)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_where_no_graph_can_be_made_one_line_says_so_and_nothing_else_changes(capsys):
    assert all(map(torch.equal, captured(make_network()), expected()))
    line = capsys.readouterr().out
    assert line.startswith("  a CUDA graph cannot work here: not used (")
    assert line.count("\n") == 1
    network = make_network()
    assert capture_long_runs(network, VIEWS, CUDA, 10**6, SINGLE_PROCESS) is network  # once


def capture_into(replayed: list[int], refused: int = 0):
    """A capture whose replays add the number of their inputs; it fails for `refused` inputs."""

    def capture(network, captured):
        if len(captured) == refused:
            raise RuntimeError("no room")

        def replay(inputs):
            assert inputs.shape == captured.shape  # a graph has one shape
            replayed.append(len(inputs))
            return network(inputs)

        return replay

    return capture


def test_the_first_two_shapes_are_replayed_and_a_third_passes_through(monkeypatch, capsys):
    monkeypatch.setattr(cuda_graph, "_captured", capture_into(replayed := []))
    network, alone = make_network(), make_network()
    called = CapturedNetwork(network)
    assert all(map(torch.equal, trained(network, called), trained(alone, alone)))
    assert replayed == [8, 8, 8, 5, 5, 5, 8]  # of each shape two to compare, then the steps
    rows = torch.rand(3, 3)
    torch.manual_seed(2)
    third = called(rows)
    torch.manual_seed(2)
    assert torch.equal(third, alone(rows))
    assert replayed[7:] == []
    assert capsys.readouterr().out == ""


def test_a_shape_that_cannot_be_captured_leaves_the_first_one_replayed(monkeypatch, capsys):
    monkeypatch.setattr(cuda_graph, "_captured", capture_into(replayed := [], refused=5))
    assert all(map(torch.equal, captured(make_network()), expected()))
    assert replayed == [8, 8, 8, 8]  # the third step, after the failure, too
    assert capsys.readouterr().out.count("not used (RuntimeError: no room)") == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_a_replayed_training_is_that_of_the_network_to_the_last_bit(monkeypatch, capsys, autocast):
    """Convolutions, statistics, random numbers, an optimiser, frozen weights; two shapes."""
    record_graphs(monkeypatch)
    calls = []

    def train(wrap) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(),
            nn.LazyLinear(5),
        )  # fmt: skip
        network(torch.rand(2, 3, 8, 8))
        network[0].bias.requires_grad_(False)
        network.register_forward_hook(lambda *_: calls.append(1))
        called = wrap(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for size in (8, 8, 5, 8, 8):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = called(torch.rand(size, 3, 8, 8))
            loss = logits.float().logsumexp(1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *network.state_dict().values()]

    alone = train(lambda network: network)
    calls.clear()
    assert all(map(torch.equal, train(CapturedNetwork), alone))
    assert capsys.readouterr().out == ""
    assert len(calls) == 2 * (4 + 3 + 1)  # of each shape: to compare, to warm up, to capture


def test_a_graph_whose_replay_does_nothing_is_found_out(monkeypatch, capsys):
    record_graphs(monkeypatch)
    monkeypatch.setattr(Graph, "replay", lambda _: None)
    assert all(map(torch.equal, captured(make_network()), expected()))
    assert "not used (a replay differs from the network by " in capsys.readouterr().out


def of_a_copy(network, captured):
    twin = copy.deepcopy(network)
    return lambda inputs: functional_call(twin, dict(network.named_parameters()), inputs)


def with_own_random_numbers(network, captured):
    def replay(inputs):
        torch.manual_seed(7)
        return network(inputs)

    return replay


def with_other_gradients(network, captured):
    def replay(inputs):
        logits = network(inputs)
        return logits + (logits - logits.detach())

    return replay


#: A replay with one fault that a CUDA graph could have.
FAULTS = {
    "inputs of the capture": lambda network, captured: lambda inputs: network(captured),
    "statistics that stand still": of_a_copy,
    "random numbers of the capture": with_own_random_numbers,
    "other gradients": with_other_gradients,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_replay_that_differs_is_dropped_before_it_counts(monkeypatch, capsys, fault):
    monkeypatch.setattr(cuda_graph, "_captured", FAULTS[fault])
    assert all(map(torch.equal, captured(make_network()), expected()))
    assert "not used (a replay differs from the network by " in capsys.readouterr().out


class ReplacesItsBuffer(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, inputs):
        self.mean = self.mean + inputs.detach().mean(0)
        return super().forward(inputs)


class DrawsOnTheHost(nn.Linear):
    def forward(self, inputs):
        return random.random() * super().forward(inputs)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (ReplacesItsBuffer(), "the network replaces its buffers"),
        (DrawsOnTheHost(3, 2), "equal inputs and random numbers give other logits"),
    ],
)
def test_a_network_that_no_graph_could_repeat_is_not_captured(monkeypatch, capsys, network, reason):
    monkeypatch.setattr(cuda_graph, "_captured", lambda *_: pytest.fail("captured"))
    CapturedNetwork(network)(inputs := torch.rand(8, 3))
    if isinstance(network, ReplacesItsBuffer):
        assert torch.equal(network.mean, inputs.mean(0))  # of one pass
    assert f"not used ({reason})" in capsys.readouterr().out


def test_a_replay_may_differ_as_much_as_two_passes_of_an_inexact_network():
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.125])
    inexact = [one], [other]
    assert cuda_graph._difference([torch.tensor([1.5, 2.0])], *inexact) is None
    for wrong in (1.51, float("nan"), float("inf")):
        assert "differs" in cuda_graph._difference([torch.tensor([wrong, 2.0])], *inexact)
    assert "differs" in cuda_graph._difference([torch.tensor([1.0, 2.0001])], [one], [one])


@pytest.mark.parametrize(
    ("device", "steps", "ranks", "is_captured"),
    [(CUDA, 1000, 1, True), (CUDA, 999, 1, False), (CPU, 10**6, 1, False), (CUDA, 1000, 2, False)],
)
def test_a_long_run_of_one_process_on_a_gpu_is_captured(device, steps, ranks, is_captured):
    network, group = make_network(), ProcessGroup(0, ranks)
    called = capture_long_runs(network, VIEWS, device, steps, group)
    assert isinstance(called, CapturedNetwork) == is_captured
    assert capture_long_runs(network, None, device, steps, group) is network  # encoded images
