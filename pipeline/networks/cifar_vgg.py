"""VGG networks for 32-pixel images (Simonyan and Zisserman 2015, arXiv:1409.1556).

With batch norm, a global pooling and one linear layer; `vgg8` has one convolution a stage. As in
the distillation literature (Tian et al. 2020, arXiv:1910.10699): three halvings at 32 pixels, a
fourth for inputs of 64 pixels and more.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from pipeline.runtime.errors import look_up

_WIDTHS = (64, 128, 256, 512, 512)

#: Name -> convolutions of each stage.
NETWORKS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


def build(network: str, num_classes: int, in_channels: int) -> nn.Module:
    return VGG(look_up("cifar_vgg", network, NETWORKS), num_classes, in_channels)


def current_state(_: str, state: Mapping[str, Tensor], *__: int) -> dict[str, Tensor]:
    """Rename the tensors of the literature's checkpoints."""

    def renamed(name: str) -> str:
        return re.sub(r"^block(\d)\.", r"stages.\1.", name).replace("classifier.", "fc.")

    return {renamed(name): value for name, value in state.items()}


class VGG(nn.Module):
    def __init__(self, convolutions: tuple[int, ...], num_classes: int, in_channels: int):
        super().__init__()
        self.stages, width = nn.ModuleList(), in_channels
        for count, channels in zip(convolutions, _WIDTHS, strict=True):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.BatchNorm2d(channels)]
                layers.append(nn.ReLU())
                width = channels
            self.stages.append(nn.Sequential(*layers))
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, num_classes]
        halvings = 4 if x.shape[-1] >= 64 else 3
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number < halvings:
                x = self.pool(x)
        return self.fc(x.mean((2, 3)))
