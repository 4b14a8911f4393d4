"""A network with its own `resize_ratio` and `interpolation` is measured and exported with them."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARAMS, change_params, run_module, run_stage
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torchvision.transforms import v2

from pipeline.commands.predict import student_input
from pipeline.data.prepared.dataset import AnySplit, EncodedSplit, open_dataset
from pipeline.data.sources.params import DatasetParams
from pipeline.export.model_card import read_card
from pipeline.export.params import ExportParams
from pipeline.export.running.onnx_model import ExportedNetwork, open_file
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict_all
from pipeline.models.spec import InputSpec
from pipeline.runtime.outputs import TEACHER, ExportedFile, ExportOutputs, ModelOutputs
from pipeline.runtime.params import load_section
from pipeline.stages.export import export_network, quantised
from pipeline.views.params import ViewsParams

CPU = torch.device("cpu")
ROLES = ("distilled", "baseline")
#: A network of 16 pixels resizes images to 20 and sees the middle.
OWN = {"resize_ratio": 1.25, "interpolation": "bicubic"}


def take_own_preprocessing(model: ModelOutputs) -> dict[str, torch.Tensor]:
    """Give a trained network this preprocessing; returns its logits of the held-out splits."""
    network, spec = checkpoint.load(model.model, produced_by="-")
    own = replace(spec, input=replace(spec.input, **OWN))
    checkpoint.save(model.model, network, own)
    splits = open_dataset().splits
    logits = {
        name: predict_all(network, own.input, splits[name], device=CPU)
        for name in ("validation", "test")
    }
    before = predict_all(network, spec.input, splits["test"], device=CPU)
    assert not torch.allclose(logits["test"], before, atol=0.01)
    save_file(logits, model.predictions)
    return logits


def predicted(file: Path, images: list[str], capsys: pytest.CaptureFixture) -> list[dict]:
    """By `predict`, each image's probability of each class, the most likely first."""
    capsys.readouterr()
    run_module("pipeline.commands.predict", str(file), *images, "--json", "--top", "3")
    rows = [json.loads(line)["classes"] for line in capsys.readouterr().out.splitlines()]
    return [{entry["class"]: entry["probability"] for entry in row} for row in rows]


def test_a_teacher_that_cuts_the_middle_out_of_images_is_a_file_that_does_so_itself(
    encoded_project, capsys
):
    """The file takes whole squares of 20 pixels, of which it sees 16."""
    logits, test = take_own_preprocessing(TEACHER), open_dataset().splits["test"]
    for stage in ("export", "robustness"):
        run_stage(stage, "--teacher")
    (file,) = ExportOutputs().files
    card = read_card(file.card, produced_by="-")
    assert (card.input.image_size, card.preprocessing.resize_ratio) == (20, 1)
    of_file = load_file(ExportOutputs().predictions)["teacher.float32.test"]
    np.testing.assert_allclose(of_file, logits["test"], atol=1e-3)
    assert load_file(ExportOutputs().corrupted_predictions)["image_size"].tolist() == [20]
    images = [f"images/{sample_id}" for sample_id in test.sample_ids]
    best = [next(iter(row)) for row in predicted(file.path, images, capsys)]
    assert best == [card.classes[i] for i in logits["test"].argmax(1)]


def test_so_is_a_student_and_its_int8_file_takes_the_same_images(encoded_project):
    model, views = ModelOutputs("baseline", "small"), load_section(ViewsParams, "views")
    expected, dataset = take_own_preprocessing(model), open_dataset()
    assert views.image_size == 16
    params = load_section(DatasetParams, "dataset")
    float32 = export_network(model, dataset.resized(16), params, None, graphs={})
    options = ExportParams(precision="int8", largest_loss=100, int8_training="none")
    int8 = quantised(float32, dataset.resized(16), views, options, graphs={})
    test = dataset.splits["test"]
    for file, tolerance in ((float32, 1e-3), (int8, 0.5)):
        reading = file.metadata.reading
        assert (file.card.input.image_size, reading.resize_ratio) == (20, 1)
        assert reading.interpolation == "bicubic"
        np.testing.assert_allclose(file.logits["test"], expected["test"], atol=tolerance)
    contents = [(Path("images") / sample_id).read_bytes() for sample_id in test.sample_ids]
    pixels = np.stack([student_input(content, float32.metadata) for content in contents])
    of_predict = ExportedNetwork(float32.content, "small.onnx", 1).logits(pixels)
    np.testing.assert_allclose(of_predict, expected["test"], atol=1e-3)


def witness(split: AnySplit, sample: int, resized: int = 20) -> torch.Tensor:
    """[3, 16, 16] in [0, 1] of a test image, by torchvision's transforms."""
    if isinstance(split, EncodedSplit):
        image = Image.open(io.BytesIO(split.content(sample))).convert("RGB")
    else:
        image = Image.fromarray(split.images[sample].transpose(1, 2, 0))
    resize = v2.Resize(resized, v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(16), v2.PILToTensor()])(image) / 255


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["project", "encoded_project"])
def test_from_training_to_comparison_a_student_sees_the_pixels_of_torchvisions_transforms(
    kind, request, capsys
):
    request.getfixturevalue(kind)
    network = {"name": "resnet8", **OWN}
    change_params("students", small=PARAMS["students"]["small"] | {"network": network})
    change_params("export", precision="int8", int8_training={"epochs": 1}, largest_loss=100)
    for stage in ("student", "baseline", "int8_training", "export", "robustness"):
        run_stage(stage, "small")
    for stage in ("speed", "compare"):
        run_stage(stage)
    test, of_files = open_dataset().splits["test"], load_file(ExportOutputs("small").predictions)
    images = torch.stack([witness(test, sample) for sample in range(len(test))])
    whole = torch.stack([witness(test, sample, 16) for sample in range(len(test))])
    side = 20 if kind == "encoded_project" else 16
    for role in ROLES:
        model, file = ModelOutputs(role, "small"), ExportedFile(role, "small")
        network, spec = checkpoint.load(model.model, produced_by="-")
        logits = load_file(model.predictions)["test"]
        witnessed = logits_of(network, spec.input, images)
        tolerance = 0.01 * np.ptp(witnessed, 0).max()
        np.testing.assert_allclose(logits, witnessed, atol=tolerance)
        assert np.abs(logits - logits_of(network, spec.input, whole)).max() > tolerance
        np.testing.assert_allclose(of_files[f"{role}.float32.test"], logits, atol=1e-4)
        files = [f"images/{sample_id}" for sample_id in test.sample_ids]
        probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
        for row, expected in zip(predicted(file.path, files, capsys), probabilities, strict=True):
            assert [row[name] for name in ("ant", "bee", "cat")] == pytest.approx(
                expected.tolist(), abs=1e-4
            )
        for each in (file, replace(file, precision="int8")):
            card = read_card(each.card, produced_by="-")
            assert card.input.image_size == side
            assert open_file(each.path, 1).metadata.image_size == side
    corrupted = load_file(ExportOutputs("small").corrupted_predictions)
    assert corrupted["image_size"].tolist() == [side]
    page = Path("reports/index.html").read_text("utf-8")
    assert f"of\n{side} pixels a side" in page


def logits_of(network: torch.nn.Module, spec: InputSpec, images: torch.Tensor) -> np.ndarray:
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    with torch.inference_mode():
        return network.eval()((images - mean) / std).numpy()
