"""Residual networks for 32-pixel images (He et al. 2016, arXiv:1512.03385, section 4.2).

With projection shortcuts and the widths of the distillation literature's tables: `resnet8` ...
`resnet110` have 16, 32 and 64 channels; `resnet8x4` and `resnet32x4` have 64, 128 and 256
(Tian et al. 2020, arXiv:1910.10699). Inputs of other sizes work: the last pooling is global.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.runtime.errors import look_up

_WIDTHS = [16, 16, 32, 64]
_WIDTHS_X4 = [32, 64, 128, 256]

#: Name -> (depth = 6n + 2, widths of the stem and the three stages).
NETWORKS: dict[str, tuple[int, list[int]]] = {
    **{f"resnet{depth}": (depth, _WIDTHS) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": (depth, _WIDTHS_X4) for depth in (8, 32)},
}


def build(network: str, num_classes: int, in_channels: int) -> nn.Module:
    return ResNet(*look_up("cifar_resnet", network, NETWORKS), num_classes, in_channels)


def current_state(network: str, state: Mapping[str, Tensor], *_: int) -> dict[str, Tensor]:
    """Rename the tensors of the literature's checkpoints, which number the stages."""
    blocks = (NETWORKS[network][0] - 2) // 6  # of a stage

    def numbered(block: re.Match[str]) -> str:
        return f"blocks.{(int(block[1]) - 1) * blocks + int(block[2])}"

    def renamed(name: str) -> str:
        name = re.sub(r"^layer(\d)\.(\d+)", numbered, name)
        return re.sub(r"^(conv|bn)1\.", r"\1.", name).replace(".downsample.", ".shortcut.")

    return {renamed(name): value for name, value in state.items()}


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, depth: int, widths: list[int], num_classes: int, in_channels: int):
        super().__init__()
        blocks = (depth - 2) // 6
        stem, *stages = widths
        self.conv = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(stem)
        layers, width = [], stem
        for stage, channels in enumerate(stages):
            for block in range(blocks):
                layers.append(Block(width, channels, stride=2 if stage and not block else 1))
                width = channels
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, num_classes]
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))
