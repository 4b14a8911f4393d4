"""Combine several networks of torchvision into one teacher, by the mean of their logits.

The mean of logits is, up to a constant, the logarithm of the geometric mean of the members'
probabilities (one of two ways in Hinton et al. 2015, arXiv:1503.02531, section 3).

To use it, copy this file to pipeline/networks/, put the members' state dicts into one file,

    python docs/examples/ensemble.py first.pth second.pth models/imported/ensemble.safetensors

and name the members, in the same order:

    teacher:
      family: ensemble
      network: resnet50+resnet50+mobilenet_v3_large
      weights: checkpoint
      checkpoint: models/imported/ensemble.safetensors

All members get the same input: the same size, mean and standard deviation.
"""

import sys

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def build(network: str, num_classes: int, in_channels: int) -> nn.Module:
    assert in_channels == 3, "these members take RGB images"
    return Ensemble(
        [
            torchvision.models.get_model(name, weights=None, num_classes=num_classes)
            for name in network.split("+")
        ]
    )


class Ensemble(nn.Module):
    def __init__(self, members: list[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        return torch.stack([member(x) for member in self.members]).mean(0)


def pack(paths: list[str], target: str) -> None:
    """Write bare state dicts (.pth, .safetensors) as one: member i's keys begin with
    `members.i.`."""
    packed = {}
    for number, path in enumerate(paths):
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        packed |= {f"members.{number}.{key}": value.clone() for key, value in state.items()}
    save_file(packed, target)


if __name__ == "__main__":
    pack(sys.argv[1:-1], sys.argv[-1])
