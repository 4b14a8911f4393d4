"""MobileNetV2 for 32-pixel images (Sandler et al. 2018, arXiv:1801.04381).

As in the distillation literature's tables (Tian et al. 2020, arXiv:1910.10699): expansion 6, half
the width, ReLU, the stem at stride 2, and the second stage at stride 1: 16 x 16 down to 2 x 2.
"""

from torch import Tensor, nn

from pipeline.runtime.errors import look_up

_STEM, _LAST = 32, 1280
#: (expansion, channels, blocks, stride of the first) of each stage.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
#: Name -> factor on the width.
NETWORKS = {"mobilenet_v2": 0.5, "mobilenet_v2_full": 1.0}


def build(network: str, num_classes: int, in_channels: int) -> nn.Module:
    factor = look_up("cifar_mobilenet_v2", network, NETWORKS)
    return MobileNetV2(factor, num_classes, in_channels)


def convolution(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
    ]


class InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.adds_input = stride == 1 and in_channels == channels
        self.layers = nn.Sequential(
            *convolution(in_channels, hidden, 1),
            nn.ReLU(),
            *convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU(),
            *convolution(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds_input else self.layers(x)


class MobileNetV2(nn.Module):
    def __init__(self, factor: float, num_classes: int, in_channels: int):
        super().__init__()
        width = int(_STEM * factor)
        layers = [*convolution(in_channels, width, 3, stride=2), nn.ReLU()]
        for expansion, channels, blocks, first_stride in _STAGES:
            for block in range(blocks):
                stride = 1 if block else first_stride
                layers.append(InvertedResidual(width, int(channels * factor), stride, expansion))
                width = int(channels * factor)
        self.features = nn.Sequential(*layers, *convolution(width, _LAST, 1), nn.ReLU())
        self.fc = nn.Linear(_LAST, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, num_classes]
        return self.fc(self.features(x).mean((2, 3)))
