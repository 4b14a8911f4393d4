"""The diagnosis of a refused teacher names the wrong setting, and what to set."""

import importlib.util
import re
import tarfile
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PARAMS, change_params, run_module, run_stage, write_params
from import_closure import ROOT
from torch import nn

from pipeline.commands import diagnose_teacher
from pipeline.commands.diagnose_teacher import Teacher, diagnose, load_teacher
from pipeline.data.prepared.dataset import Dataset, open_dataset
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict_all
from pipeline.models.spec import InputSpec, ModelSpec
from pipeline.networks import cifar_resnet
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section
from pipeline.teacher import foreign_checkpoint
from pipeline.teacher.loop import fit_teacher
from pipeline.teacher.params import TeacherParams, TeacherTraining

CPU = torch.device("cpu")
PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3}


class BrightestChannel(nn.Module):
    """Right for every image of the project; in another order, or at one size alone."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2), size: int | None = None):
        super().__init__()
        self.order, self.size = list(order), size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = images.shape[-1]
        if self.size not in (None, side):
            return images.new_zeros(len(images), 3)
        quarter = images[:, :, : side // 2, : side // 2]
        return quarter.mean((2, 3))[:, self.order]


def diagnosis(
    network: nn.Module, spec: InputSpec, dataset: Dataset, native: InputSpec | None = None
) -> str:
    logits = predict_all(network, spec, dataset.splits["validation"], device=CPU).numpy()
    teacher = Teacher(network.to(diagnose_teacher.default_device()), spec, dataset, native)
    return "\n".join(diagnose(logits, dataset, teacher, "Look elsewhere."))


def printed_lines(capsys) -> str:
    capsys.readouterr()
    run_module("pipeline.commands.diagnose_teacher")
    return capsys.readouterr().out


def test_a_wrong_class_order_is_named_with_the_first_pairs(project):
    text = diagnosis(BrightestChannel((2, 1, 0)), InputSpec(3, 16, **PLAIN), open_dataset())
    assert text.startswith("teacher accuracy on validation: 33.33% (4 of 12); the share of the")
    assert "  classes in the best other order: images of `ant` are predicted as `cat`" in text
    assert "`cat` are predicted as `ant` 100.00%" in text
    assert "The likeliest cause is the order of the classes" in text


def test_a_wrong_input_size_is_named_with_the_size_to_set(project):
    text = diagnosis(BrightestChannel(size=16), InputSpec(3, 48, **PLAIN), open_dataset())
    assert "  other input sizes: 16 pixels 100.00%; 24 pixels 33.33%" in text
    assert "The likeliest cause is the input size: set `input_size: 16`" in text


def test_the_input_of_the_pretraining_is_among_those_that_are_tried(project):
    native = InputSpec(3, 40, [0.1] * 3, [0.2] * 3)
    spec = InputSpec(3, 16, **PLAIN)
    text = diagnosis(BrightestChannel(size=0), spec, open_dataset(), native)
    assert "40 pixels (of its pretraining) 33.33%" in text
    assert "its pretraining's mean and std 33.33%" in text
    assert "No other order, normalisation or size explains a low accuracy. Look elsewhere." in text
    assert "mean entropy of its predictions: 1.10 nats, of at most 1.10" in text


def test_a_wrong_normalisation_is_named_with_the_values_to_set(project, capsys):
    torch.manual_seed(3)
    network = cifar_resnet.build("resnet8", 3, 3)
    training = TeacherTraining(epochs=8, batch_size=8, learning_rate=0.05, policy="none", seed=0)
    spec = InputSpec(3, 16, [0.0] * 3, [1 / 255] * 3)
    fit_teacher(network, spec, open_dataset(), training, CPU)
    torch.save(network.state_dict(), "mine.pth")
    change_params("teacher", weights="checkpoint", checkpoint="mine.pth")
    with pytest.raises(UserError, match="diagnose_teacher"):
        run_stage("teacher")
    printed = printed_lines(capsys)
    assert "pixels in 0 to 255 100.00%" in printed
    assert (
        "The likeliest cause is the normalisation: the teacher was trained on pixels in 0 to 255. "
        "Set `mean: [0, 0, 0]` and `std: [0.003922, 0.003922, 0.003922]`" in printed
    )
    values = {"mean": [0.0] * 3, "std": [0.003922] * 3}
    change_params("teacher", network={"name": "resnet8", **values})
    run_stage("teacher")  # as the message says, it passes


def test_a_trained_teacher_that_was_refused_is_measured_without_training(
    project, monkeypatch, capsys
):
    training = PARAMS["teacher"]["training"] | {"epochs": 1, "ema_decay": 0.97, "seed": 3}
    change_params("teacher", training=training, minimum_accuracy=1.0)
    with pytest.raises(UserError, match="finished training with these parameters"):
        printed_lines(capsys)  # it was never trained
    with pytest.raises(UserError) as refusal:
        run_stage("teacher")
    accuracy = str(refusal.value).partition(";")[0]
    assert printed_lines(capsys).startswith(accuracy)
    measured = load_teacher(load_section(TeacherParams, "teacher"), open_dataset()).network
    change_params("teacher", training=training | {"seed": 4})
    with pytest.raises(UserError, match="Run `dvc repro teacher` first"):
        printed_lines(capsys)
    change_params("teacher", training=training)
    monkeypatch.setattr("pipeline.teacher.accuracy_gate.check", lambda *_, **__: None)
    run_stage("teacher")
    assert "resumes after epoch 1 of 1" in capsys.readouterr().out  # the command left the state
    written, _ = checkpoint.load(TEACHER.model, produced_by="-")
    for key, value in written.state_dict().items():
        assert torch.equal(value, measured.state_dict()[key].cpu()), key


def test_imported_logits_are_tried_in_another_order_alone(project, monkeypatch, capsys):
    labels = open_dataset().splits["validation"].labels
    logits = np.eye(3, dtype=np.float32)[(labels + 1) % 3]
    source = SimpleNamespace(held_out={"validation": logits})
    family = SimpleNamespace(open_source=lambda path, dataset: source)
    monkeypatch.setattr(diagnose_teacher, "family_module", lambda name: family)
    change_params("teacher", family="logits", weights="logits")
    printed = printed_lines(capsys)
    assert "The likeliest cause is the names of the classes" in printed
    assert "normalisations" not in printed


DATA = ROOT.parent / "shared/data"


def take_test_images(archive_path: Path, per_class: int) -> None:
    """Extract the first of CIFAR-10's test images of each class as images/train."""
    with tarfile.open(archive_path) as archive:
        taken: dict[str, int] = {}
        for member in archive:
            split, *rest = member.name.strip("./").split("/")
            if split == "test" and len(rest) == 2 and taken.setdefault(rest[0], 0) < per_class:
                taken[rest[0]] += 1
                member.name = f"images/train/{rest[0]}/{rest[1]}"
                archive.extract(member, filter="data")


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"CIFAR-10 and its checkpoint are not at {DATA}")
def test_a_foreign_teacher_under_wrong_settings_is_told_which_is_wrong(folder):
    """Somebody else's ResNet-32 on 96 of CIFAR-10's test images."""
    take_test_images(DATA / "cifar10_part.tar.gz", per_class=12)
    path = ROOT / "docs/examples/option_a_resnet.py"
    spec = importlib.util.spec_from_file_location("option_a_resnet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.build("resnet32", 10, 3)
    path = DATA / "checkpoints/resnet32-d509ac18.th"
    own = ModelSpec("", "resnet32", {}, [""] * 10, InputSpec(3, 32, [0.5] * 3, [0.2] * 3))
    foreign_checkpoint.load_foreign_weights(network, own, path)
    params = deepcopy(PARAMS)
    params["dataset"] |= {"image_size": 32, "validation_fraction": 0.8, "test_fraction": 0.1}
    write_params(Path(), params)
    run_stage("prepare")
    dataset = open_dataset()
    right = InputSpec(3, 32, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    good = diagnosis(network, right, dataset)
    assert float(re.search(r"validation: ([\d.]+)%", good)[1]) > 88
    assert "No other order, normalisation or size explains" in good

    shift = nn.Linear(10, 10, bias=False)
    shift.weight = nn.Parameter(torch.eye(10).roll(3, 0))
    shuffled = diagnosis(nn.Sequential(network, shift), right, dataset)
    assert "The likeliest cause is the order of the classes" in shuffled
    scaled = diagnosis(network, InputSpec(3, 32, [0.0] * 3, [1 / 255] * 3), dataset)
    assert "The likeliest cause is the normalisation" in scaled
    # ImageNet's statistics and these images' own score alike.
    assert re.search(r"Set `mean: \[0\.\d+, 0\.\d+, 0\.\d+\]` and `std: \[0\.2\d+,", scaled)
    larger = diagnosis(network, InputSpec(3, 64, right.mean, right.std), dataset)
    assert "set `input_size: 32`" in larger
