"""Learning rates, parameter groups, clipping and averages are those of the definitions."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from pipeline.networks import cifar_resnet
from pipeline.students.params import TrainingParams
from pipeline.training.optimisation import Optimisation, learning_rate_factor

#: The recipes of Tian et al. 2020 (arXiv:1910.10699) and of the distillation benchmarks after it.
CIFAR_100 = {
    **{"epochs": 240, "batch_size": 64, "optimizer": "sgd", "learning_rate": 0.05},
    **{"schedule": "step", "milestones": [150, 180, 210], "decay_factor": 0.1},
    **{"momentum": 0.9, "nesterov": False, "weight_decay": 5e-4},
}
ADAMW = {
    **{"epochs": 300, "batch_size": 1024, "optimizer": "adamw", "learning_rate": 1e-3},
    **{"warmup_epochs": 20, "weight_decay": 0.05, "weight_decay_exclusions": "norm_and_bias"},
    **{"gradient_clip_norm": 5.0, "ema_decay": 0.9999},
}


def params(recipe: dict, **changes: object) -> TrainingParams:
    return TrainingParams(**recipe | changes, seed=0)


def rates(recipe: TrainingParams, steps_per_epoch: int) -> list[float]:
    """The learning rate of each step, as the optimiser has it."""
    layer = nn.Linear(1, 1)
    optimisation = Optimisation(layer, recipe, steps_per_epoch)
    found = []
    for _ in range(recipe.epochs * steps_per_epoch):
        found.append(optimisation.optimizer.param_groups[0]["lr"])
        optimisation.step(layer(torch.ones(1, 1)).sum())
    return found


def rates_of_torch(recipe: TrainingParams, make: Callable) -> list[float]:
    """The learning rate of each of torch's steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], recipe.learning_rate)
    schedule, found = make(optimizer), []
    for _ in range(recipe.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_step_schedule_is_that_of_torch_and_milestones_are_the_last_epochs_before_it_falls():
    recipe, steps = params(CIFAR_100), 3
    expected = rates_of_torch(
        recipe, lambda optimizer: MultiStepLR(optimizer, recipe.milestones, recipe.decay_factor)
    )
    found = rates(recipe, steps)
    np.testing.assert_allclose(found, np.repeat(expected, steps), rtol=1e-12)
    assert found[steps * 150 - 1 : steps * 150 + 1] == pytest.approx([0.05, 0.005])


def test_the_cosine_schedule_is_that_of_torch():
    recipe = params(ADAMW, epochs=100, warmup_epochs=0)
    expected = rates_of_torch(recipe, lambda optimizer: CosineAnnealingLR(optimizer, 100))
    np.testing.assert_allclose(rates(recipe, 1), expected, rtol=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step"])
def test_the_warm_up_rises_linearly_to_the_peak_whatever_comes_after(schedule):
    milestones = {"milestones": [6]} if schedule == "step" else {}
    recipe = params(ADAMW, epochs=11, warmup_epochs=1, schedule=schedule, **milestones)
    factors = [learning_rate_factor(step, recipe, 10) for step in range(110)]
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    assert factors[10] == 1
    expected = {"cosine": (0.5, 0.000247), "constant": (1, 1), "step": (0.1, 0.1)}[schedule]
    assert (factors[60], factors[109]) == pytest.approx(expected, rel=1e-2)


def test_recipes_of_the_literature_reach_torch_as_they_are_written():
    network = cifar_resnet.build("resnet8", 100, 3)
    (group,) = Optimisation(network, params(CIFAR_100), 1).optimizer.param_groups
    settings = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    assert [group[key] for key in settings] == [0.05, 0.9, 0, 5e-4, False]
    assert len(group["params"]) == len(list(network.parameters()))
    adamw = Optimisation(network, params(ADAMW, warmup_epochs=0), 1).optimizer
    assert isinstance(adamw, torch.optim.AdamW)
    assert [group["lr"] for group in adamw.param_groups] == [1e-3, 1e-3]


def test_sgd_is_with_nesterov_momentum_unless_told_otherwise():
    plain = {"epochs": 1, "batch_size": 2, "optimizer": "sgd", "learning_rate": 1.0, "seed": 0}
    for momentum, nesterov in ((0.9, True), (0.0, False)):
        recipe = TrainingParams(**plain, momentum=momentum)
        (group,) = Optimisation(nn.Linear(1, 1), recipe, 1).optimizer.param_groups
        assert (group["momentum"], group["nesterov"]) == (momentum, nesterov)


def test_norms_and_biases_can_be_excluded_from_weight_decay():
    network = cifar_resnet.build("resnet8", 100, 3)
    decayed, others = Optimisation(network, params(ADAMW), 1).optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {names[id(parameter)] for parameter in others["params"]}
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    expected = {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")} | {"fc.bias"}
    assert found == expected
    assert {names[id(parameter)] for parameter in decayed["params"]} == set(names.values()) - found


@pytest.mark.parametrize("limit", [0.5, 50.0])
def test_gradients_are_clipped_by_their_norm_all_together(limit):
    layer = nn.Linear(3, 2)
    recipe = params(
        CIFAR_100, momentum=0.0, weight_decay=0.0, learning_rate=1.0, gradient_clip_norm=limit
    )
    before = torch.cat([p.detach().flatten().clone() for p in layer.parameters()])
    features = torch.tensor([[1.0, -2.0, 3.0]])
    Optimisation(layer, recipe, 1).step(layer(features).sum())
    after = torch.cat([p.detach().flatten() for p in layer.parameters()])
    gradient = torch.tensor([1.0, -2, 3, 1, -2, 3, 1, 1])  # norm sqrt(30)
    expected = before - gradient * min(1, limit / 30**0.5)
    torch.testing.assert_close(after, expected)


def trained(recipe: TrainingParams, steps: int) -> tuple[Optimisation, nn.Module, list]:
    """Some steps of a layer and a batch norm, and the network after each."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimisation = Optimisation(network, recipe, steps)
    states = [copy.deepcopy(network)]
    for _ in range(steps):
        optimisation.step(network(torch.randn(8, 3)).square().mean())
        states.append(copy.deepcopy(network))
    return optimisation, network, states


def test_the_average_of_weights_and_statistics_is_the_one_computed_by_hand():
    recipe = params(ADAMW, ema_decay=0.3, warmup_epochs=0, learning_rate=0.1)
    optimisation, network, states = trained(recipe, 5)
    decays = [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]  # (1 + t) / (10 + t), at most ema_decay
    for name, average in optimisation.evaluated.state_dict().items():
        first, *values = [state.state_dict()[name].double() for state in states]
        expected = first
        for decay, value in zip(decays, values, strict=True):
            expected = decay * expected + (1 - decay) * value
        if average.is_floating_point():
            torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(average, network.state_dict()[name])


def test_a_short_training_is_not_lost_in_its_average():
    rows = torch.from_numpy(load_digits().data).float() / 16
    labels = torch.from_numpy(load_digits().target)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    recipe = params(ADAMW, epochs=1, warmup_epochs=0, learning_rate=0.01, ema_decay=0.9999)
    optimisation = Optimisation(network, recipe, 160)
    for step in range(160):
        batch = torch.arange(step * 32, step * 32 + 32) % 1200
        optimisation.step(nn.functional.cross_entropy(network(rows[batch]), labels[batch]))
    average = optimisation.evaluated.eval()
    accuracy = (average(rows[1200:]).argmax(1) == labels[1200:]).float().mean().item()
    assert accuracy > 0.85


def test_without_an_average_the_network_itself_is_measured():
    optimisation, network, _ = trained(params(CIFAR_100), 1)
    assert optimisation.evaluated is network


@pytest.mark.parametrize(
    ("network", "undecayed"),
    [
        ("vit_b_16", {"class_token", "encoder.pos_embedding"}),
        ("swin_t", "relative_position_bias_table"),
        ("convnext_tiny", "layer_scale"),
        ("resnet18", set()),
    ],
)
def test_only_what_multiplies_features_has_weight_decay(network, undecayed):
    with torch.device("meta"):
        module = torchvision.models.get_model(network)
    optimizer = Optimisation(module, params(ADAMW, ema_decay=None), 1).optimizer
    plain = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert optimizer.param_groups[1]["weight_decay"] == 0
    found = {name for name, p in module.named_parameters() if id(p) in plain and p.ndim > 1}
    if isinstance(undecayed, str):
        undecayed = {name for name, _ in module.named_parameters() if name.endswith(undecayed)}
        assert undecayed
    assert found == undecayed
    assert all(id(p) in plain for p in module.parameters() if p.ndim <= 1)


def test_norms_of_several_dimensions_are_not_decayed_and_computed_and_recurrent_weights_are():
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    network = nn.Sequential(nn.LayerNorm([2, 4]), nn.RMSNorm([2, 4]), linear, nn.LSTM(3, 2))
    optimizer = Optimisation(network, params(ADAMW, ema_decay=None), 1).optimizer
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in decayed}
    assert names == {"2.parametrizations.weight.original", "3.weight_ih_l0", "3.weight_hh_l0"}


def test_what_a_network_declares_to_have_no_weight_decay_has_none():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    network[1].no_weight_decay = lambda: {"weight"}
    groups = Optimisation(network, params(ADAMW), 1).optimizer.param_groups
    assert [[*p.shape] for p in groups[0]["params"]] == [[4, 3]]


def test_an_optimisation_goes_on_from_its_state():
    recipe = params(ADAMW, epochs=3, warmup_epochs=1, ema_decay=0.9)
    through, network, _ = trained(recipe, 4)
    state = copy.deepcopy(through.state_dict())
    other = copy.deepcopy(network)
    resumed = Optimisation(other, recipe, 4)
    resumed.load_state_dict(state)
    for step in range(8):
        features = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        through.step(network(features).square().mean())
        resumed.step(other(features).square().mean())
    for a, b in ((network, other), (through.evaluated, resumed.evaluated)):
        for ours, theirs in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recipe", [CIFAR_100, ADAMW])
def test_optimisers_on_the_cpu_are_not_the_fused_ones_which_round_otherwise(recipe):
    optimisation = Optimisation(nn.Linear(2, 2), params(recipe), 1)
    assert not any(group["fused"] for group in optimisation.optimizer.param_groups)
