"""A teacher that knows little is stopped before the cache, and told why."""

import importlib.util
import re
import shutil
import tarfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARAMS, bytes_of, change_params, run_stage, write_params
from import_closure import ROOT
from PIL import Image
from torch import nn

from pipeline.data.prepared.dataset import Dataset, open_dataset
from pipeline.models import checkpoint
from pipeline.models.spec import InputSpec
from pipeline.networks import cifar_resnet
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.teacher import accuracy_gate, foreign_checkpoint
from pipeline.teacher.loop import fit_teacher
from pipeline.teacher.params import TeacherTraining

CPU = torch.device("cpu")


def bring(change=lambda network: None, **network: object) -> None:
    """The project's own good teacher as a checkpoint, changed, under other settings."""
    own, _ = checkpoint.load(TEACHER.model, produced_by="-")
    with torch.no_grad():
        change(own)
    torch.save(own.state_dict(), "mine.pth")
    teacher = deepcopy(PARAMS["teacher"])
    teacher |= {
        "network": {"name": "resnet8", **network},
        "weights": "checkpoint",
        "checkpoint": "mine.pth",
    }
    write_params(Path(), PARAMS | {"teacher": teacher})


def refusal_of_stage() -> str:
    """What the gate says; nothing of the teacher has changed."""
    metrics = Path("metrics/teacher.json")
    before = (
        bytes_of(TEACHER.model),
        metrics.read_bytes(),
        Path("predictions/teacher.safetensors").read_bytes(),
    )
    with pytest.raises(UserError) as refusal:
        run_stage("teacher")
    assert before == (
        bytes_of(TEACHER.model),
        metrics.read_bytes(),
        Path("predictions/teacher.safetensors").read_bytes(),
    )
    return str(refusal.value)


def reverse_classes(network: nn.Module) -> None:
    network.fc.weight.copy_(network.fc.weight.clone().flip(0))
    network.fc.bias.copy_(network.fc.bias.clone().flip(0))


def test_a_good_teacher_passes(project):
    bring()
    run_stage("teacher")
    assert checkpoint.load(TEACHER.model, produced_by="-")[1].network == "resnet8"


def test_a_wrong_class_order_is_named_with_the_first_pairs(project):
    bring(reverse_classes)
    message = refusal_of_stage()
    assert re.match(r"teacher accuracy on validation: 33.33% \(4 of 12\); expected", message)
    assert "classes in the best other order: images of `ant` are predicted as `cat`" in message
    assert "`cat` are predicted as `ant` 100.00%" in message
    assert (
        "The likeliest cause is the order of the classes: the teacher's logits must be in"
        in message
    )


def trained_with(spec: InputSpec) -> None:
    """mine.pth: a network trained on the project's images under another input."""
    torch.manual_seed(3)
    network = cifar_resnet.build("resnet8", 3, 3)
    training = TeacherTraining(epochs=8, batch_size=8, learning_rate=0.05, policy="none", seed=0)
    fit_teacher(network, spec, open_dataset(), training, CPU)
    torch.save(network.state_dict(), "mine.pth")


def test_a_wrong_normalisation_is_named_with_the_values_to_set(project):
    trained_with(InputSpec(3, 16, [0.0] * 3, [1 / 255] * 3))
    change_params("teacher", weights="checkpoint", checkpoint="mine.pth")
    message = refusal_of_stage()
    assert "pixels in 0 to 255 100.00%" in message
    assert (
        "The likeliest cause is the normalisation: the teacher was trained on pixels in 0 to 255. "
        "Set `mean: [0, 0, 0]` and `std: [0.003922, 0.003922, 0.003922]`" in message
    )
    network = {"name": "resnet8", "mean": [0.0] * 3, "std": [0.003922] * 3}
    change_params("teacher", network=network)
    run_stage("teacher")  # as the message says, it passes


def write_stripes(root: Path) -> None:
    """Classes that differ by scale alone: stripes 2, 4 and 8 pixels apart, anywhere."""
    for label, name in enumerate(("ant", "bee", "cat")):
        for index in range(20):
            rng = np.random.default_rng([label, index])
            period = 2 ** (label + 1)
            row = (np.arange(16) + rng.integers(period)) % period < period // 2
            pixels = np.where(row[:, None], 200, 30) + rng.integers(0, 30, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"{name}/{index:03d}.png")


def test_a_wrong_input_size_is_named_with_the_size_to_set(project):
    write_stripes(Path("images/train"))
    run_stage("prepare")
    change_params("teacher", training=PARAMS["teacher"]["training"] | {"epochs": 12})
    run_stage("teacher")
    bring(input_size=48)
    message = refusal_of_stage()
    assert "  other input sizes: 16 pixels 100.00%" in message
    assert "The likeliest cause is the input size: set `input_size: 16`" in message


def test_the_size_of_the_pretraining_is_among_those_that_are_tried(project):
    dataset = open_dataset()
    network, description = checkpoint.load(TEACHER.model, produced_by="-")
    native = InputSpec(3, 24, [0.1] * 3, [0.2] * 3)
    with pytest.raises(UserError) as refusal:
        check(network, description.input, dataset, torch.zeros(12, 3), pretrained_input=native)
    assert "24 pixels (of its pretraining)" in str(refusal.value)
    assert "its pretraining's mean and std" in str(refusal.value)


def check(network, spec, dataset, logits, **changed) -> None:
    settings = {
        "minimum_accuracy": None,
        "pretrained_input": None,
        "fallback_hint": "Look elsewhere.",
        "device": CPU,
    }
    accuracy_gate.check(network, spec, dataset, logits, **settings | changed)


def test_a_teacher_that_nothing_explains_gets_the_advice_for_its_kind(project):
    bring(lambda network: network.fc.weight.zero_())
    message = refusal_of_stage()
    assert "No other order, normalisation or size explains it. Check that" in message
    assert re.search(r"mean entropy of its predictions: \d\.\d\d nats, of at most 1\.10", message)


def test_a_teacher_below_the_users_minimum_is_stopped(project):
    def spoil(network: nn.Module) -> None:  # `cat` is never named
        network.fc.bias[2] = -1e3

    bring(spoil)
    change_params("teacher", minimum_accuracy=0.9)
    assert "expected `teacher.minimum_accuracy`, 90.00%, or more" in refusal_of_stage()
    change_params("teacher", minimum_accuracy=0.5)
    assert "expected significantly more than 33.33%" in refusal_of_stage()  # 8 of 12 may be chance
    bring()
    change_params("teacher", minimum_accuracy=1.0)
    run_stage("teacher")


def logits_that_get_right(labels, correct: int) -> torch.Tensor:
    answers = torch.from_numpy(labels).clone()
    answers[correct:] = (answers[correct:] + 1) % 3
    return nn.functional.one_hot(answers, 3).float()


@pytest.mark.parametrize(("correct", "passes"), [(9, False), (10, True)])
def test_clearly_better_is_a_binomial_test_at_one_in_a_thousand(project, correct, passes):
    # Of 12 guesses at 1/3, 9 or more are right with probability 0.0039, 10 or more with 0.0005.
    network, description = checkpoint.load(TEACHER.model, produced_by="-")
    dataset = open_dataset()
    logits = logits_that_get_right(dataset.splits["validation"].labels, correct)
    if passes:
        check(network, description.input, dataset, logits)
    else:
        with pytest.raises(UserError, match="9 of 12"):
            check(network, description.input, dataset, logits)


def test_where_validation_is_too_small_to_judge_the_gate_says_so(project, capsys):
    dataset = open_dataset()
    split = dataset.splits["validation"]
    few = Dataset(
        **{
            **vars(dataset),
            "splits": {
                "validation": type(split)(
                    split.images[:3], split.labels[:3], split.directory, split.name
                )
            },
        }
    )
    network, description = checkpoint.load(TEACHER.model, produced_by="-")
    check(network, description.input, few, logits_that_get_right(split.labels[:3], 3))
    assert "3 validation images of these classes are too few to tell" in capsys.readouterr().out


def test_a_permutation_is_not_found_in_answers_that_are_chance():
    rng = np.random.default_rng(0)
    labels, answers = np.arange(200) % 50, rng.integers(0, 50, 200)
    trial = accuracy_gate._in_another_order(answers, labels, [str(c) for c in range(50)])
    best_for_these = accuracy_gate._assignment(answers, labels, 50)
    assert (best_for_these[labels] == answers).sum() > 40
    assert trial.correct < 10


class Reordered(nn.Module):
    def __init__(self, order: list[int]):
        super().__init__()
        self.order = order

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, self.order]


DATA = ROOT.parent / "shared/data"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"CIFAR-10 and its checkpoint are not at {DATA}")
def test_a_foreign_teacher_under_wrong_settings_is_told_which_is_wrong(tmp_path, monkeypatch):
    """Somebody else's ResNet-32 on 96 of CIFAR-10's test images."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open(DATA / "cifar10_part.tar.gz") as archive:
        taken: dict[str, int] = {}
        for member in archive:
            split, *rest = member.name.strip("./").split("/")
            if split != "test" or len(rest) != 2:
                continue
            if taken.setdefault(rest[0], 0) < 12:
                taken[rest[0]] += 1
                member.name = f"images/train/{rest[0]}/{rest[1]}"
                archive.extract(member, filter="data")
            if len(taken) == 10 and min(taken.values()) == 12:
                break
    checkpoint_file = DATA / "checkpoints/resnet32-d509ac18.th"
    shutil.copy(checkpoint_file, "resnet32.th")
    path = ROOT / "docs/examples/option_a_resnet.py"
    spec = importlib.util.spec_from_file_location("option_a_resnet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.build("resnet32", 10, 3)
    foreign_checkpoint.load_foreign_weights(network, Path("resnet32.th"))
    params = deepcopy(PARAMS)
    params["dataset"] |= {"image_size": 32, "validation_fraction": 0.8, "test_fraction": 0.1}
    write_params(Path(), params)
    run_stage("prepare")
    dataset = open_dataset()
    labels = dataset.splits["validation"].labels
    right = InputSpec(3, 32, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def told(network: nn.Module, spec: InputSpec) -> str:
        answers = accuracy_gate.predict_all(network, spec, dataset.splits["validation"], device=CPU)
        with pytest.raises(UserError) as refusal:
            check(network, spec, dataset, answers, minimum_accuracy=0.85)
        return str(refusal.value)

    good = accuracy_gate.predict_all(network, right, dataset.splits["validation"], device=CPU)
    assert (good.argmax(1).numpy() == labels).mean() > 0.88
    check(network, right, dataset, good, minimum_accuracy=0.85)
    shuffled = nn.Sequential(network, Reordered([(c + 3) % 10 for c in range(10)]))
    assert "The likeliest cause is the order of the classes" in told(shuffled, right)
    scaled = InputSpec(3, 32, [0.0] * 3, [1 / 255] * 3)
    message = told(network, scaled)
    assert "The likeliest cause is the normalisation" in message
    # ImageNet's statistics and these images' own score alike.
    assert re.search(r"Set `mean: \[0\.\d+, 0\.\d+, 0\.\d+\]` and `std: \[0\.2\d+,", message)
    larger = InputSpec(3, 64, right.mean, right.std)
    assert "set `input_size: 32`" in told(network, larger)
