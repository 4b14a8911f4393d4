"""The preprocessing inside an exported file, in operations on which all engines agree."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.spec import InputSpec


class Preprocessing(nn.Module):
    """`InputSpec.apply_clean` of square images of `side` pixels.

    A resizing that shrinks or is bicubic becomes two matrix products. OpenVINO 2026.4 ignores
    `antialias` and `exclude_outside` of ONNX's Resize: if it shrinks, all pixels are others; if it
    is bicubic, those near the edges.
    """

    def __init__(self, spec: InputSpec, side: int):
        super().__init__()
        self.spec, self.resizes = spec, False
        self.mode, target = spec.interpolation or "bilinear", spec.resized_side
        if target == side or (self.mode == "bilinear" and target > side):
            return
        self.resizes = True
        # Resizing is linear: unit vectors give the weights, in float32 as PyTorch computes them.
        units = torch.eye(side)[None, None]
        weights = F.interpolate(units, (target, side), mode=self.mode, antialias=True)[0, 0]
        self.register_buffer("rows", weights, persistent=False)  # [target, side]
        self.register_buffer("columns", weights.T.contiguous(), persistent=False)

    def forward(self, image: Tensor) -> Tensor:  # [B, C, S, S] uint8 -> [B, C, size, size] float32
        if self.resizes:
            image = self.rows @ (image.float() @ self.columns)
            image = image.clamp(0, 255) if self.mode == "bicubic" else image
        return self.spec.apply_clean(image)
