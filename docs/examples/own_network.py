"""A template for networks of your own. Copy it, and replace the network:

    cp docs/examples/own_network.py pipeline/networks/mine.py

A file in pipeline/networks/ is a family. Name the family and one of its networks in params.yaml:

    students:
      mine:
        family: mine                                     # the file's name, without .py
        network: {name: small, options: {dropout: 0.1}}  # or `network: small`
        training: {}
        distillation: {}

and let `python -m pipeline.commands.check` build it and try it on random images.

The file may import installed packages, `pipeline.runtime` and `pipeline.data.prepared`. Code of
yours must be in this file: DVC watches no other file for this network.
"""

from torch import Tensor, nn

from pipeline.runtime.errors import look_up

#: Name -> channels of each stage. All of these can be `network` in params.yaml.
NETWORKS = {"small": (16, 32, 64), "large": (32, 64, 128)}


def build(network: str, num_classes: int, in_channels: int, dropout: float = 0.0) -> nn.Module:
    """Build a network with fresh weights. This function is all that a family must have.

    Args:
        network: the name in params.yaml.
        num_classes: how many logits to return for an image.
        in_channels: 3 for RGB, 1 for greyscale.
        dropout: an argument of your own; params.yaml sets it in `options`.
    """
    widths = look_up("mine", network, NETWORKS)  # refuses an unknown name
    return SmallNetwork(widths, num_classes, in_channels, dropout)


class SmallNetwork(nn.Module):
    """Three convolutions, each at half the size of the one before; images of any size."""

    def __init__(self, widths: tuple[int, ...], num_classes: int, in_channels: int, dropout: float):
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [
                nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] float32, resized and normalised -> [B, num_classes] raw logits.

        No softmax, in training and in evaluation; an image's logits do not depend on the batch.
        """
        return self.head(self.dropout(self.features(x).mean((2, 3))))
