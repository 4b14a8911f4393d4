"""ShuffleNetV2 for 32-pixel images (Ma et al. 2018, arXiv:1807.11164).

As in the distillation literature's tables (Tian et al. 2020, arXiv:1910.10699): width 1, a 1 x 1
stem at full size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.runtime.errors import look_up

_STEM, _LAST = 24, 1024
_STAGES = ((116, 4), (232, 8), (464, 4))  # (channels, blocks)

NETWORKS = {"shufflenet_v2": _STAGES}


def build(network: str, num_classes: int, in_channels: int) -> nn.Module:
    return ShuffleNetV2(look_up("cifar_shufflenet_v2", network, NETWORKS), num_classes, in_channels)


def pointwise(in_channels: int, channels: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, channels, 1, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]


def depthwise(channels: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return [convolution, nn.BatchNorm2d(channels)]


class Block(nn.Module):
    """Half of the channels bypass the layers; at stride 2 both branches take all channels."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        half = channels // 2
        self.past = None
        if stride == 2:
            self.past = nn.Sequential(*depthwise(in_channels, 2), *pointwise(in_channels, half))
        entering = in_channels if stride == 2 else half
        self.layers = nn.Sequential(
            *pointwise(entering, half), *depthwise(half, stride), *pointwise(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        past, through = x.chunk(2, 1) if self.past is None else (self.past(x), x)
        return F.channel_shuffle(torch.cat([past, self.layers(through)], 1), 2)


class ShuffleNetV2(nn.Module):
    def __init__(self, stages: tuple[tuple[int, int], ...], num_classes: int, in_channels: int):
        super().__init__()
        layers, width = pointwise(in_channels, _STEM), _STEM
        for channels, blocks in stages:
            for block in range(blocks):
                layers.append(Block(width, channels, stride=1 if block else 2))
                width = channels
        self.features = nn.Sequential(*layers, *pointwise(width, _LAST))
        self.fc = nn.Linear(_LAST, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, num_classes]
        return self.fc(self.features(x).mean((2, 3)))
