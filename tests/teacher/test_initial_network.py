"""The input of a teacher where params.yaml leaves it open, and what its training starts from."""

import pytest
import torch
from conftest import PARAMS, change_params, run_stage
from own_family import FAMILY, families_here

from pipeline.data.prepared.dataset import open_dataset
from pipeline.networks import cifar_resnet
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section
from pipeline.teacher.initial_network import build_initial_network
from pipeline.teacher.params import TeacherParams


def test_the_input_size_is_by_default_that_of_the_prepared_images(project):
    """As docs/parameters.md says, for a checkpoint as for a teacher in training."""
    torch.save(cifar_resnet.build("resnet8", 3, 3).state_dict(), "mine.pth")
    change_params("views", image_size=8)
    for weights in ("train", "checkpoint"):
        change_params("teacher", weights=weights, checkpoint="mine.pth")
        _, spec = build_initial_network(load_section(TeacherParams, "teacher"), open_dataset())
        assert spec.input.size == 16


def states_of_one_epoch() -> list[str]:
    training = PARAMS["teacher"]["training"] | {"epochs": 1}
    change_params("teacher", training=training, minimum_accuracy=0.01)
    run_stage("teacher")
    return [path.name for path in TEACHER.scratch.glob("*.state")]


@pytest.mark.parametrize(
    "network",
    [
        "resnet14",
        {"name": "resnet8", "input_size": 12},
        {"name": "resnet8", "mean": [0.4] * 3},
        {"name": "resnet8", "std": [0.4] * 3},
    ],
    ids=str,
)
def test_another_network_or_input_is_trained_anew(project, capsys, network):
    (before,) = states_of_one_epoch()
    change_params("teacher", network=network)
    (after,) = states_of_one_epoch()
    assert "resumes" not in capsys.readouterr().out
    assert after != before


PUBLISHED = """
import torch

def pretrained_state(network, **_):
    return torch.load("published.pt"), []
"""


def test_other_published_weights_are_fine_tuned_anew(project, capsys):
    change_params("teacher", family="published", network="small", weights="pretrained")
    with families_here(published=FAMILY + PUBLISHED):
        from pipeline.networks import published  # noqa: PLC0415  (it is there from here on)

        found = []
        for _ in range(2):
            torch.save(published.build("small", 3, 3).state_dict(), "published.pt")
            found += states_of_one_epoch()
    assert "resumes" not in capsys.readouterr().out
    assert len(set(found)) == 2
