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
from pipeline.teacher import foreign_teacher
from pipeline.teacher.loop import fit_teacher
from pipeline.teacher.params import TeacherParams, TeacherTraining

CPU = torch.device("cpu")
PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3}


class BrightestChannel(nn.Module):
    """Right for every image of the project; in another order, at one size, or for pixels in 0 to
    255 alone."""

    def __init__(
        self, order: tuple[int, ...] = (0, 1, 2), size: int | None = None, brightest: float = 0.0
    ):
        super().__init__()
        self.order, self.size, self.brightest = list(order), size, brightest

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = images.shape[-1]
        if self.size not in (None, side) or images.max() < self.brightest:
            return images.new_zeros(len(images), 3)
        quarter = images[:, :, : side // 2, : side // 2]
        return quarter.mean((2, 3))[:, self.order]


def diagnosis(
    network: nn.Module, spec: InputSpec, dataset: Dataset, native: InputSpec | None = None
) -> str:
    logits = predict_all(network, spec, dataset.splits["validation"], device=CPU).numpy()
    teacher = Teacher(network.to(diagnose_teacher.default_device()), spec, dataset, native)
    return "\n".join(diagnose(logits, dataset, teacher, "checkpoint"))


def printed_lines(capsys) -> str:
    capsys.readouterr()
    run_module("pipeline.commands.diagnose_teacher")
    return capsys.readouterr().out


@pytest.fixture
def few_sizes(monkeypatch) -> None:
    monkeypatch.setattr(diagnose_teacher, "_SIZES", (32, 64))


def test_a_wrong_class_order_is_named_with_the_pairs(project, few_sizes):
    text = diagnosis(BrightestChannel((2, 1, 0)), InputSpec(3, 16, **PLAIN), open_dataset())
    assert text.startswith("teacher accuracy on validation: 33.33% (4 of 12); such predictions")
    assert "images of `ant` are predicted as `cat`, images of `cat` are predicted as `ant`" in text
    assert "The likeliest cause is the order of the classes" in text


def test_a_wrong_input_size_is_named_with_the_size_to_set(project, few_sizes):
    text = diagnosis(BrightestChannel(size=16), InputSpec(3, 48, **PLAIN), open_dataset())
    assert "The likeliest cause is the input size (16 pixels, normalisation `present`)." in text
    assert "Set `input_size: 16` in `teacher.network`." in text
    assert re.search(r"\n +16 +12 +100 / +\d+", text)
    assert re.search(r"\n +24 +12 +33 / +\d+", text)


def test_order_normalisation_and_size_that_are_all_wrong_are_found_together(project, few_sizes):
    """Each alone changes nothing."""
    network = BrightestChannel((1, 2, 0), size=64, brightest=2.0)
    text = diagnosis(network, InputSpec(3, 16, **PLAIN), open_dataset())
    cause = "the input size and the normalisation and the order of the classes"
    assert f"The likeliest cause is {cause} (64 pixels, normalisation `0 to 255`, other" in text
    assert "Set `input_size: 64` and `mean: [0, 0, 0]` and `std: [0.003922, 0.003922, 0.003922" in (
        text
    )
    assert "In this setting images of `ant` are predicted as `cat`, images of `bee` are" in text
    assert "Set `teacher.checkpoint_classes`: for each class" in text


def test_a_network_that_takes_bgr_is_told(project, few_sizes):
    class Reversed(BrightestChannel):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            first, last = images[:, 0].mean(), images[:, 2].mean()
            return super().forward(images.flip(1)) * (first < last)

    spec = InputSpec(3, 16, [0.0, 0.0, 0.2], [1.0] * 3)  # so its last channel is the lowest
    text = diagnosis(Reversed(), spec, open_dataset())
    cause = "the order of the channels (16 pixels, normalisation `present`, BGR)"
    assert f"The likeliest cause is {cause}." in text
    assert "The network takes bgr" not in text
    assert "The network takes BGR, and there is no parameter for that: reverse the input" in text


def test_what_was_tried_is_listed_where_nothing_is_better(project, few_sizes):
    native = InputSpec(3, 40, [0.1] * 3, [0.2] * 3)
    spec = InputSpec(3, 16, **PLAIN)
    text = diagnosis(BrightestChannel(size=0), spec, open_dataset(), native)
    assert re.search(
        "images +present +0 to 255 +-1 to 1 +ImageNet +Caffe +own images +pretrain", text
    )
    sizes = re.findall(r"\n +(\d+) +12 +33 / ", text)
    assert sizes == ["8", "16", "32", "40", "64"]
    assert (
        "Tried: 5 input sizes and 7 normalisations together, each with the classes in the given "
        "and in the best other order; BGR in the best of these. None is significantly better. Chec"
        in text
    )
    assert "explains" not in text
    assert "mean entropy of its predictions: 1.10 nats, of at most 1.10" in text


def test_a_sample_has_several_images_of_each_class_and_as_many_of_a_rare_one():
    rare = np.repeat([0, 1], [950, 50])
    assert np.bincount(rare[diagnose_teacher._sample(rare, 48)]).tolist() == [24, 24]
    many = np.repeat(np.arange(1000), 50)
    counts = np.bincount(many[diagnose_teacher._sample(many, 48)])
    assert counts[counts > 0].tolist() == [4] * 12


def test_a_wrong_normalisation_is_named_with_the_values_to_set(project, few_sizes, capsys):
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
    assert (
        "The likeliest cause is the normalisation (16 pixels, normalisation `0 to 255`).\n"
        "Set `mean: [0, 0, 0]` and `std: [0.003922, 0.003922, 0.003922]`" in printed
    )
    values = {"mean": [0.0] * 3, "std": [0.003922] * 3}
    change_params("teacher", network={"name": "resnet8", **values})
    run_stage("teacher")  # as the message says, it passes


def test_a_trained_teacher_that_was_refused_is_measured_without_training(
    project, few_sizes, monkeypatch, capsys
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
    assert "normalisation" not in printed


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
def test_a_foreign_teacher_under_wrong_settings_is_told_which_is_wrong(folder, few_sizes):
    """Somebody else's ResNet-32 on 96 of CIFAR-10's test images."""
    take_test_images(DATA / "cifar10_part.tar.gz", per_class=12)
    path = ROOT / "docs/examples/option_a_resnet.py"
    spec = importlib.util.spec_from_file_location("option_a_resnet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.build("resnet32", 10, 3)
    path = DATA / "checkpoints/resnet32-d509ac18.th"
    own = ModelSpec("", "resnet32", {}, [""] * 10, InputSpec(3, 32, [0.5] * 3, [0.2] * 3))
    foreign_teacher.load_foreign_weights(network, own, path)
    params = deepcopy(PARAMS)
    params["dataset"] |= {"image_size": 32, "validation_fraction": 0.8, "test_fraction": 0.1}
    write_params(Path(), params)
    run_stage("prepare")
    dataset = open_dataset()
    right = InputSpec(3, 32, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    good = diagnosis(network, right, dataset)
    assert float(re.search(r"validation: ([\d.]+)%", good)[1]) > 88
    assert "None is significantly better." in good

    shift = nn.Linear(10, 10, bias=False)
    shift.weight = nn.Parameter(torch.eye(10).roll(3, 0))
    shuffled = diagnosis(nn.Sequential(network, shift), right, dataset)
    assert "The likeliest cause is the order of the classes" in shuffled
    scaled = diagnosis(network, InputSpec(3, 32, [0.0] * 3, [1 / 255] * 3), dataset)
    assert "The likeliest cause is the normalisation (32 pixels" in scaled
    # ImageNet's statistics and these images' own score alike.
    assert re.search(r"Set `mean: \[0\.\d+, 0\.\d+, 0\.\d+\]` and `std: \[0\.2\d+,", scaled)
    larger = diagnosis(network, InputSpec(3, 64, right.mean, right.std), dataset)
    assert "Set `input_size: 32`" in larger
    both = diagnosis(network, InputSpec(3, 128, [0.0] * 3, [1 / 255] * 3), dataset)
    assert "The likeliest cause is the input size and the normalisation (32 pixels" in both
    both = diagnosis(nn.Sequential(network, shift), InputSpec(3, 64, [0.0] * 3, [1.0] * 3), dataset)
    assert "the order of the classes (32 pixels" in both
