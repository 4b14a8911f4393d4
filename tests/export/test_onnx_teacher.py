"""A teacher that is an ONNX file gets a file of its own: its graph after the preprocessing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.export.running.onnx_model import ExportedNetwork, OnnxMetadata
from pipeline.export.to_onnx import OPSET, NotExportable, to_onnx
from pipeline.models.evaluation import predict
from pipeline.models.spec import InputSpec, ModelSpec, build
from pipeline.networks import cifar_resnet
from pipeline.networks.onnx import read_file

CLASSES = list("abcde")
slow = pytest.mark.slow


class Teacher(nn.Module):
    """A network as other frameworks export it."""

    def __init__(self, *, softmax: bool, channels_last: bool):
        super().__init__()
        torch.manual_seed(0)
        self.network = cifar_resnet.build("resnet8", len(CLASSES), 3).eval()
        self.softmax, self.channels_last = softmax, channels_last

    def forward(self, images: Tensor) -> Tensor:
        images = images.permute(0, 3, 1, 2) if self.channels_last else images
        logits = self.network(images.float())
        return logits.softmax(1) if self.softmax else logits


def teacher_file(
    opset: int, softmax: bool, channels_last: bool, dtype: torch.dtype, batch: str | None
) -> dict[str, Tensor]:
    example = torch.zeros(2, *((16, 16, 3) if channels_last else (3, 16, 16))).to(dtype)
    torch.onnx.export(
        Teacher(softmax=softmax, channels_last=channels_last),
        (example,),
        "teacher.onnx",
        input_names=["x"],
        output_names=["y"],
        opset_version=opset,
        dynamo=False,
        dynamic_axes={"x": {0: batch}, "y": {0: batch}} if batch else None,
    )
    return read_file(Path("teacher.onnx"))


def exported(
    state: dict[str, Tensor], options: dict[str, str]
) -> tuple[ExportedNetwork, np.ndarray]:
    """The file that is exported, and the teacher's own logits of the same 20-pixel images."""
    spec = InputSpec(3, 16, [0.4] * 3, [0.2] * 3)
    network = build(ModelSpec("onnx", "mine", options, CLASSES, spec), state)
    metadata = OnnxMetadata(
        name="teacher",
        role="teacher",
        precision="float32",
        fingerprint="-",
        class_names=CLASSES,
        opset=OPSET,
        channels=3,
        image_size=20,
        reading={"storage": "pixels", "image_size": 20},
    )
    file = ExportedNetwork(to_onnx(network, spec, metadata), "-", 1)
    return file, predict(network, spec, torch.from_numpy(IMAGES), clean=True).numpy()


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 20, 20), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore")  # of torch's older exporter
@pytest.mark.parametrize(
    ("opset", "softmax", "channels_last", "dtype", "options"),
    [
        pytest.param(11, False, False, torch.float32, {"channels": "bgr"}, marks=slow),
        (13, True, True, torch.float32, {"layout": "nhwc"}),
        pytest.param(20, False, False, torch.float16, {}, marks=slow),
        pytest.param(18, False, False, torch.uint8, {}, marks=slow),
    ],
)
def test_its_file_takes_pixels_and_gives_the_teachers_logits(
    folder, opset, softmax, channels_last, dtype, options
):
    state = teacher_file(opset, softmax, channels_last, dtype, "n")
    file, expected = exported(state, options)
    assert np.abs(file.logits(IMAGES) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    assert file.metadata.opset == max(opset, OPSET)


@pytest.mark.filterwarnings("ignore")
def test_a_teacher_that_takes_a_fixed_number_of_images_has_no_file_and_says_why(folder):
    state = teacher_file(17, False, False, torch.float32, None)
    with pytest.raises(NotExportable, match="the teacher cannot .* its file takes 2 images at a"):
        exported(state, {})
