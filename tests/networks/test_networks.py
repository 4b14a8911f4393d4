"""The literature's networks have the literature's sizes."""

import importlib

import pytest
import torch
import torchvision

from pipeline.models.evaluation import count_parameters_and_macs
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import UserError

#: (family, network) -> millions of parameters and of multiply-accumulates, 100 classes, 32 pixels:
#: the tables of Tian et al. 2020 (arXiv:1910.10699) and the code that they come with.
SIZES = {
    ("cifar_resnet", "resnet20"): (0.278, 40.8),
    ("cifar_resnet", "resnet32"): (0.473, 69.1),
    ("cifar_resnet", "resnet56"): (0.862, 125.8),
    ("cifar_resnet", "resnet110"): (1.737, 253),
    ("cifar_resnet", "resnet8x4"): (1.234, 177),
    ("cifar_resnet", "resnet32x4"): (7.434, 1083),
    ("wide_resnet", "wrn_16_2"): (0.703, 101),
    ("wide_resnet", "wrn_40_1"): (0.570, 83),
    ("wide_resnet", "wrn_40_2"): (2.255, 328),
    ("cifar_vgg", "vgg8"): (3.965, 96),
    ("cifar_vgg", "vgg13"): (9.462, 285),
    ("cifar_mobilenet_v2", "mobilenet_v2"): (0.813, 6.5),
    ("cifar_shufflenet_v1", "shufflenet_v1"): (0.949, 38.7),
    ("cifar_shufflenet_v2", "shufflenet_v2"): (1.356, 44.5),
}


def family(name: str):
    return importlib.import_module(f"pipeline.networks.{name}")


@pytest.mark.parametrize(("name", "network"), SIZES)
def test_parameters_and_operations_are_those_of_the_literature(name, network):
    module = family(name).build(network, 100, 3)
    parameters, macs = SIZES[name, network]
    costs = count_parameters_and_macs(module, InputSpec(3, 32, [0] * 3, [1] * 3))
    assert round(costs["parameters"] / 1e6, 3) == parameters
    digits = 1 if macs < 100 and macs != int(macs) else 0
    assert costs["macs"] / 1e6 == pytest.approx(macs, abs=0.7 * 10**-digits)
    assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_mobilenet_v1_has_the_parameters_of_its_paper():
    module = family("mobilenet_v1").build("mobilenet_v1", 1000, 3)
    # Howard et al. 2017, table 8: 4.2 million.
    assert sum(p.numel() for p in module.parameters()) == 4_231_976
    assert module.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.parametrize("name", sorted({name for name, _ in SIZES} | {"mobilenet_v1"}))
def test_every_network_of_a_family_trains_on_grey_images_and_others_are_refused(name):
    module = family(name)
    for network in module.NETWORKS:
        if network in ("wrn_28_10", "resnet110", "resnet32x4", "vgg19", "vgg16"):
            continue  # the same code, only larger
        built = module.build(network, 5, 1)
        built(torch.randn(2, 1, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in built.parameters())
    with pytest.raises(UserError, match=rf"family `{name}` has no network `none`. Known: "):
        module.build("none", 5, 3)


@pytest.mark.parametrize("network", ["vit_b_16", "swin_t", "maxvit_t", "resnet18"])
def test_macs_are_those_that_torchvision_publishes(network):
    with torch.device("meta"):
        module = torchvision.models.get_model(network)
    published = torchvision.models.get_model_weights(network).DEFAULT.meta["_ops"]  # 1e9 MACs
    spec = InputSpec(3, 224, [0] * 3, [1] * 3)
    assert count_parameters_and_macs(module, spec)["macs"] / 1e9 == pytest.approx(
        published, rel=0.005
    )
    assert torch.backends.mha.get_fastpath_enabled()
