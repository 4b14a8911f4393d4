"""A student with its own `resize_ratio` and `interpolation` is measured and exported with them.

torchvision's transforms are the witness of what its network sees.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARAMS, change_params, run_module, run_stage
from PIL import Image
from safetensors.numpy import load_file
from torchvision.transforms import v2

from pipeline.data.prepared.dataset import AnySplit, EncodedSplit, open_dataset
from pipeline.export.model_card import read_card
from pipeline.models import checkpoint
from pipeline.runtime.outputs import ExportedFile, ExportOutputs, ModelOutputs

#: The file takes whole images of 20 pixels if they are encoded, and sees the middle 16.
NETWORK = {"name": "resnet8", "resize_ratio": 1.25, "interpolation": "bicubic"}
ROLES = ("distilled", "baseline")
FILES = [ExportedFile(r, "small", p) for p in ("float32", "int8") for r in ROLES]


@pytest.fixture(params=["project", "encoded_project"])
def retrained(request: pytest.FixtureRequest) -> Path:
    """A project whose student and baseline were trained and exported with NETWORK."""
    folder = request.getfixturevalue(request.param)
    change_params("students", small=PARAMS["students"]["small"] | {"network": NETWORK})
    change_params("export", precision="int8", int8_training={"epochs": 1}, largest_loss=100)
    for stage in ("student", "baseline", "int8_training", "export", "robustness"):
        run_stage(stage, "small")
    return folder


def witness(split: AnySplit, sample: int) -> torch.Tensor:
    """[3, 16, 16] of a test image by torchvision: resized, cut, in [0, 1]."""
    if isinstance(split, EncodedSplit):
        image = Image.open(io.BytesIO(split.content(sample))).convert("RGB")
    else:
        image = Image.fromarray(split.images[sample].transpose(1, 2, 0))
    bicubic = v2.InterpolationMode.BICUBIC
    transforms = [v2.Resize(20, bicubic, antialias=True), v2.CenterCrop(16), v2.PILToTensor()]
    return v2.Compose(transforms)(image) / 255


def test_everything_after_the_training_sees_the_pixels_of_torchvisions_transforms(
    retrained, capsys
):
    test = open_dataset().splits["test"]
    images = torch.stack([witness(test, sample) for sample in range(len(test))])
    of_files = load_file(ExportOutputs("small").predictions)
    for role in ROLES:
        model = ModelOutputs(role, "small")
        network, spec = checkpoint.load(model.model, produced_by="-")
        mean, std = (torch.tensor(v)[:, None, None] for v in (spec.input.mean, spec.input.std))
        with torch.inference_mode():
            expected = network.eval()((images - mean) / std).numpy()
        logits = load_file(model.predictions)["test"]
        print(np.abs(logits - expected).max(), np.ptp(expected, 0).max())
        print(np.abs(of_files[f"{role}.float32.test"] - logits).max())
        print(np.abs(of_files[f"{role}.int8.test"] - logits).max())
    cards = [read_card(file.card, produced_by="-") for file in FILES]
    print([(c.input.image_size, c.preprocessing) for c in cards])
    capsys.readouterr()
    files = [f"images/{sample_id}" for sample_id in test.sample_ids]
    run_module("pipeline.commands.predict", str(FILES[0].path), *files, "--json", "--top", "3")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
