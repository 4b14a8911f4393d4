"""Frozen epochs, frozen batch norm and the backbone's learning rate are what their names say."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.students.params import TrainingParams
from pipeline.training import optimisation
from pipeline.training.fine_tuning import FineTuning
from pipeline.training.optimisation import Optimisation

HEAD = {"head.weight", "head.bias"}
STEPS = 3  # of an epoch
SGD = {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}


class NormAct(nn.BatchNorm1d):
    """A batch norm with a layer in it, as timm has."""

    def __init__(self, features: int):
        super().__init__(features)
        self.act = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.act(super().forward(inputs))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), NormAct(8), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


def new_network() -> Network:
    torch.manual_seed(0)
    network = Network().double()
    network(torch.randn(32, 5, dtype=torch.float64))  # statistics of a pretraining
    return network


def recipe(optimiser: dict, **changes: object) -> TrainingParams:
    common = {"batch_size": 8, "seed": 0, "epochs": 4, "schedule": "constant"}
    return TrainingParams(**common | optimiser | changes)


def batch(epoch: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * epoch + step)
    inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (8,), generator=generator)


def train(
    network: Network,
    params: TrainingParams,
    epochs: int,
    wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> Optimisation:
    optimisation = Optimisation(network, params, STEPS, HEAD)
    fine_tuning = FineTuning(network, params, HEAD, wrap)
    for epoch in range(1, epochs + 1):
        forward = fine_tuning.begin_epoch(epoch)
        for step in range(STEPS):
            inputs, targets = batch(epoch, step)
            optimisation.step(F.cross_entropy(forward(inputs), targets))
    return optimisation


def assert_equal_states(found: nn.Module, expected: nn.Module) -> None:
    states = (found.state_dict(), expected.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("optimiser", [SGD, ADAMW])
def test_frozen_epochs_fit_a_linear_layer_to_the_features_of_the_pretraining(optimiser):
    network, expected = new_network(), new_network().eval()
    params = recipe(optimiser, freeze_epochs=2, gradient_clip_norm=0.2, ema_decay=0.5)
    average = train(network, params, epochs=2).evaluated

    settings = {"lr": params.learning_rate, "weight_decay": params.weight_decay}
    if optimiser is SGD:
        plain = torch.optim.SGD(expected.head.parameters(), momentum=0.9, nesterov=True, **settings)
    else:
        plain = torch.optim.AdamW(expected.head.parameters(), **settings)
    for epoch in (1, 2):
        for step in range(STEPS):
            inputs, targets = batch(epoch, step)
            plain.zero_grad()
            F.cross_entropy(expected.head(expected.body(inputs).detach()), targets).backward()
            nn.utils.clip_grad_norm_(expected.head.parameters(), 0.2)
            plain.step()
    torch.testing.assert_close(network.head.weight, expected.head.weight)
    assert not torch.equal(average.head.weight, network.head.weight)
    for frozen in (network.body, average.body):
        assert_equal_states(frozen, new_network().body)


@pytest.mark.parametrize("optimiser", [SGD, ADAMW])
def test_thawed_layers_begin_as_in_a_training_of_their_own(optimiser):
    network, params = new_network(), recipe(optimiser, freeze_epochs=2, freeze_batch_norm=True)
    network.body[2].p = 0.0
    train(network, params, epochs=4)

    expected = new_network().eval()
    settings = {"lr": params.learning_rate, "weight_decay": params.weight_decay}
    kind = torch.optim.AdamW
    if optimiser is SGD:
        kind, settings = torch.optim.SGD, settings | {"momentum": 0.9, "nesterov": True}
    plain = [kind(expected.head.parameters(), **settings)]
    for epoch in (1, 2, 3, 4):
        if epoch == 3:
            plain.append(kind(expected.body.parameters(), **settings))
        for step in range(STEPS):
            inputs, targets = batch(epoch, step)
            expected.zero_grad()
            F.cross_entropy(expected(inputs), targets).backward()
            for optimizer in plain:
                optimizer.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, msg=name)
    assert not torch.equal(network.body[0].weight, new_network().body[0].weight)


def test_what_a_network_never_trains_stays_frozen():
    network = new_network()
    network.body[0].bias.requires_grad_(False)
    train(network, recipe(SGD, freeze_epochs=1), epochs=2)
    assert torch.equal(network.body[0].bias, new_network().body[0].bias)
    assert not torch.equal(network.body[0].weight, new_network().body[0].weight)


def test_it_is_wrapped_again_only_if_other_parameters_begin_to_train():
    for freeze_epochs, expected in ((0, [1, 0, 0, 0]), (2, [1, 0, 1, 0]), (4, [1, 0, 0, 0])):
        params, wrapped = recipe(SGD, freeze_epochs=freeze_epochs), []
        fine_tuning = FineTuning(
            new_network(), params, HEAD, lambda it, w=wrapped: w.append(it) or it
        )
        counts = []
        for epoch in range(1, 5):
            wrapped.clear()
            fine_tuning.begin_epoch(epoch)
            counts.append(len(wrapped))
        assert counts == expected


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 0.0}])
def test_the_fused_optimizer_of_a_gpu_thaws_a_network_as_the_plain_one_does(monkeypatch, options):
    params = recipe(SGD, freeze_epochs=2, **options)
    plain, fused = new_network(), new_network()
    for network in (plain, fused):
        network.body[2].p = 0.0
    expected = train(plain, params, epochs=4)
    with monkeypatch.context() as patch:
        patch.setattr(optimisation, "_fused", lambda _: True)  # torch has it for CPUs, too
        found = train(fused, params, epochs=4)
    assert found.optimizer.param_groups[0]["fused"]
    assert not expected.optimizer.param_groups[0]["fused"]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, msg=name)


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("freeze_batch_norm", [False, True])
def test_a_compiled_network_is_frozen_and_thawed_alike(freeze_batch_norm):
    params = recipe(ADAMW, freeze_epochs=2, freeze_batch_norm=freeze_batch_norm)
    plain, compiled = new_network(), new_network()
    for network in (plain, compiled):
        network.body[2].p = 0.0
    train(plain, params, epochs=4)
    train(compiled, params, 4, lambda it: torch.compile(it, dynamic=False, backend="aot_eager"))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("exclusions", ["none", "norm_and_bias"])
def test_the_backbone_has_its_share_of_the_heads_learning_rate_at_every_step(exclusions):
    network = new_network()
    params = recipe(
        SGD,
        backbone_learning_rate_factor=0.1,
        weight_decay_exclusions=exclusions,
        schedule="cosine",
        warmup_epochs=1,
    )
    optimisation = Optimisation(network, params, STEPS, HEAD)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for step in range(4 * STEPS):
        found = {
            names[id(parameter)]: (group["lr"], group["weight_decay"])
            for group in optimisation.optimizer.param_groups
            for parameter in group["params"]
        }
        assert found.keys() == set(names.values())
        for name, (rate, decay) in found.items():
            share = 1 if name in HEAD else 0.1
            assert rate == pytest.approx(share * optimisation.learning_rate(step))
            excluded = exclusions == "norm_and_bias" and name not in (
                "head.weight",
                "body.0.weight",
            )
            assert decay == (0 if excluded else 0.01)
        optimisation.step(F.cross_entropy(network(batch(1, step)[0]), batch(1, step)[1]))
    assert optimisation.learning_rate(STEPS) == params.learning_rate


def test_an_optimisation_with_two_learning_rates_continues_from_its_state():
    params = recipe(
        ADAMW, backbone_learning_rate_factor=0.5, weight_decay_exclusions="norm_and_bias"
    )
    network = new_network()
    optimisation = train(network, params, epochs=1)
    other = copy.deepcopy(network)
    resumed = Optimisation(other, params, STEPS, HEAD)
    resumed.load_state_dict(copy.deepcopy(optimisation.state_dict()))
    for ours, theirs in ((network, optimisation), (other, resumed)):
        torch.manual_seed(1)
        for step in range(STEPS):
            inputs, targets = batch(2, step)
            theirs.step(F.cross_entropy(ours(inputs), targets))
    assert_equal_states(other, network)
