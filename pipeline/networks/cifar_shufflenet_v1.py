"""ShuffleNet for 32-pixel images (Zhang et al. 2018, arXiv:1707.01083).

As in the distillation literature's tables (Tian et al. 2020, arXiv:1910.10699): 3 groups, stages of
240, 480 and 960 channels, a 1 x 1 stem at full size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.runtime.errors import look_up

_GROUPS, _STEM = 3, 24
_STAGES = ((240, 4), (480, 8), (960, 4))  # (channels, blocks)

NETWORKS = {"shufflenet_v1": _STAGES}


def build(network: str, num_classes: int, in_channels: int) -> nn.Module:
    return ShuffleNet(look_up("cifar_shufflenet_v1", network, NETWORKS), num_classes, in_channels)


class Block(nn.Module):
    """Stride 2 concatenates the pooled input to the residual; stride 1 adds the input to it."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        residual = channels - in_channels if stride == 2 else channels
        hidden = residual // 4
        # The stem has too few channels to split.
        self.groups = 1 if in_channels == _STEM else _GROUPS
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, residual, 1, groups=_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(residual)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.channel_shuffle(residual, self.groups)
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        if self.pool is not None:
            return F.relu(torch.cat([residual, self.pool(x)], 1))
        return F.relu(residual + x)


class ShuffleNet(nn.Module):
    def __init__(self, stages: tuple[tuple[int, int], ...], num_classes: int, in_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, _STEM, 1, bias=False)
        self.bn = nn.BatchNorm2d(_STEM)
        layers, width = [], _STEM
        for channels, blocks in stages:
            for block in range(blocks):
                layers.append(Block(width, channels, stride=1 if block else 2))
                width = channels
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, num_classes]
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))
