"""The input of a teacher, where params.yaml leaves it open."""

import torch
from conftest import change_params

from pipeline.data.prepared.dataset import open_dataset
from pipeline.networks import cifar_resnet
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
