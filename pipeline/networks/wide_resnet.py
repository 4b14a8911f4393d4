"""Wide residual networks for 32-pixel images (Zagoruyko and Komodakis 2016, arXiv:1605.07146).

`wrn_40_2` has 40 layers and stages of 32, 64 and 128 channels, twice those of a plain ResNet.
Without dropout, as in the distillation literature's tables (Tian et al. 2020, arXiv:1910.10699).
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.runtime.errors import look_up

#: Name -> (depth = 6n + 4, factor on the width).
NETWORKS = {
    f"wrn_{depth}_{width}": (depth, width)
    for depth, width in ((16, 1), (16, 2), (28, 10), (40, 1), (40, 2))
}


def build(network: str, num_classes: int, in_channels: int) -> nn.Module:
    return WideResNet(*look_up("wide_resnet", network, NETWORKS), num_classes, in_channels)


def current_state(network: str, state: Mapping[str, Tensor], *_: int) -> dict[str, Tensor]:
    """Rename the tensors of the literature's checkpoints, which number the stages."""
    blocks = (NETWORKS[network][0] - 4) // 6  # of a stage

    def numbered(block: re.Match[str]) -> str:
        return f"blocks.{(int(block[1]) - 1) * blocks + int(block[2])}"

    def renamed(name: str) -> str:
        name = re.sub(r"^block(\d)\.layer\.(\d+)", numbered, name)
        return re.sub(r"^(conv|bn)1\.", r"\1.", name).replace(".convShortcut.", ".shortcut.")

    return {renamed(name): value for name, value in state.items()}


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        # A projection takes the activated input, the identity the input itself.
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    def __init__(self, depth: int, factor: int, num_classes: int, in_channels: int):
        super().__init__()
        blocks, width = (depth - 4) // 6, 16
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        layers = []
        for stage, channels in enumerate((16 * factor, 32 * factor, 64 * factor)):
            for block in range(blocks):
                layers.append(Block(width, channels, stride=2 if stage and not block else 1))
                width = channels
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, num_classes]
        x = F.relu(self.bn(self.blocks(self.conv(x))))
        return self.fc(x.mean((2, 3)))
