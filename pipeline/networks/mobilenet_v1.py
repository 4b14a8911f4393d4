"""MobileNet for 224-pixel images (Howard et al. 2017, arXiv:1704.04861), full width."""

from torch import Tensor, nn

from pipeline.runtime.errors import look_up

_STEM = 32
#: (channels, depthwise separable convolutions, stride of the first) of each stage.
_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
NETWORKS = {"mobilenet_v1": _STAGES}


def build(network: str, num_classes: int, in_channels: int) -> nn.Module:
    return MobileNet(look_up("mobilenet_v1", network, NETWORKS), num_classes, in_channels)


def convolution(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    ]


class MobileNet(nn.Module):
    def __init__(
        self, stages: tuple[tuple[int, int, int], ...], num_classes: int, in_channels: int
    ):
        super().__init__()
        modules, width = convolution(in_channels, _STEM, 3, stride=2), _STEM
        for channels, convolutions, first_stride in stages:
            for number in range(convolutions):
                stride = 1 if number else first_stride
                modules += convolution(width, width, 3, stride, groups=width)
                modules += convolution(width, channels, 1)
                width = channels
        self.features = nn.Sequential(*modules)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, num_classes]
        return self.fc(self.features(x).mean((2, 3)))
