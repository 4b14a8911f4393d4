"""`check` accepts params.yaml without needless keys, gives the line of those that DVC needs, and
reads the files that params.yaml names."""

import io
import re
import shutil
import tarfile
import zipfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PARAMS, change_params, write_images, write_params
from dvc.dependency.param import MissingParamsError, ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from import_closure import ROOT
from safetensors.torch import save

from pipeline.commands import check, check_networks
from pipeline.networks import cifar_resnet
from pipeline.runtime.files import sha256_of_file
from soak.hostile_inputs import write_onnx


@pytest.fixture
def params(folder) -> dict:
    """Of images with three splits; their folder, and dvc.yaml, are in the current folder."""
    for split in ("train", "val", "test"):
        write_images(folder / "images", per_class=1, split=split)
    shutil.copy(ROOT / "dvc.yaml", folder)
    return deepcopy(PARAMS)


def problems_of(params: dict) -> list[str]:
    write_params(Path(), params)
    return check.problems()


def without(params: dict, *keys: str) -> dict:
    for key in keys:
        *sections, last = key.split(".")
        section = params
        for name in sections:
            section = section[name]
        del section[last]
    return params


def let_dvc_read_all_parameters() -> None:
    """As before a stage runs."""
    repo = Repo.init(no_scm=True)
    for stage in repo.index.stages:
        for dependency in stage.deps:
            if isinstance(dependency, ParamsDependency):
                dependency.get_hash()


def test_no_input_lies_in_an_output_of_any_stage(params):
    outputs = set()
    for name, entry in yaml.safe_load(Path("dvc.yaml").read_text())["stages"].items():
        stage = entry.get("do", entry)
        outputs |= {out.replace("${key}", name) for out in stage.get("outs", [])}
    assert len(outputs) > 20
    for output in sorted(outputs):
        Path(output).mkdir(parents=True, exist_ok=True)
        (problem,) = problems_of(params | {"dataset": params["dataset"] | {"root": output}})
        assert "and stages write to" in problem, output


def test_neither_check_nor_dvc_needs_keys_that_nothing_reads(params):
    for weights in ("checkpoint", "pretrained", "logits"):
        teacher = params["teacher"] | {"weights": weights, "family": "torchvision"}
        del teacher["training"]
        if weights == "logits":
            teacher |= {"family": "logits", "network": "any"}
        check.TeacherParams.model_validate(teacher)
    params["teacher"] = teacher | {"family": "torchvision", "weights": "pretrained"}
    without(params, "dataset.test_fraction", "dataset.validation_fraction")
    assert problems_of(params) == []
    let_dvc_read_all_parameters()


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("teacher.checkpoint", "checkpoint: models/imported/none"),
        ("dataset.root", "root: data/raw/none"),
        ("students.small.training", "training: {}"),
        ("students.small.distillation", "distillation: {}"),
    ],
)
def test_of_a_key_that_dvc_needs_check_gives_the_line(params, key, line):
    (problem,) = problems_of(without(params, key))
    assert problem.startswith(f"`params.yaml: {key}` is missing. Add `{line}`")
    with pytest.raises((MissingParamsError, DvcException), match=key):
        let_dvc_read_all_parameters()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_share_is_asked_for_where_the_dataset_lacks_the_split(params, split):
    shutil.rmtree("images/test" if split == "test" else "images/val")
    (problem,) = problems_of(without(params, f"dataset.{split}_fraction"))
    assert problem == (
        f"`params.yaml: dataset.{split}_fraction` is missing, but the dataset has no {split} "
        "split; expected the share of the training images to split off. Add "
        f"`{split}_fraction: 0.1`, for example."
    )


@pytest.mark.parametrize(
    ("dataset", "problem"),
    [
        ({"source": "mnist_5k"}, "test_fraction is missing, but mnist_5k has no test split"),
        ({"source": "torchvision", "name": "Imagenette"}, "but Imagenette has no test split"),
        ({"source": "torchvision", "name": "DTD"}, None),
    ],
)
def test_a_share_is_asked_for_by_the_sources_own_splits(params, dataset, problem):
    params["dataset"] |= dataset
    found = "\n".join(problems_of(without(params, "dataset.test_fraction")))
    assert problem in found if problem else not found


def test_a_teacher_that_is_trained_needs_its_training(params):
    (problem,) = problems_of(without(params, "teacher.training"))
    assert "`params.yaml: teacher`: training is missing, but weights is `train`: add it" in problem


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
HTML = b"<!DOCTYPE html><title>Sign in</title>"
#: What was found in a file's place, and what check says that it is.
WRONG = {b"": "empty", LFS: "a pointer of Git LFS", HTML: "a web page \\(HTML, `Sign in`"}


def resnet8(num_classes: int = 3) -> dict[str, torch.Tensor]:
    return cifar_resnet.build("resnet8", num_classes, 3).state_dict()


def saved(state: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def teacher_of(name: str, content: bytes, **values: object) -> str:
    """What check says about a teacher that is this file."""
    Path(name).write_bytes(content)
    params = deepcopy(PARAMS)
    del params["teacher"]["training"]
    params["teacher"] |= {"weights": "checkpoint", "checkpoint": name} | values
    assert problems_of(params) == []
    return "\n".join(check_networks.problems())


def test_a_teachers_checkpoint_is_read_before_anything_runs(params):
    pth, safetensors = saved(resnet8()), save(resnet8())
    assert teacher_of("mine.pth", pth) == teacher_of("mine.safetensors", safetensors) == ""
    cases = {
        ("mine.pth", pth[:-500]): "is a zip archive without its end: it is cut short",
        ("mine.safetensors", safetensors[:-9]): "is not a checkpoint that can be read",
        ("mine.pth", saved(cifar_resnet.build("resnet14", 3, 3).state_dict())): "does not fit",
        ("mine.pth", saved(resnet8(5))): "fits the network, but has 5 outputs, and .* 3 classes",
        **{("mine.pth", content): f"is {kind}" for content, kind in WRONG.items()},
    }
    for (name, content), message in cases.items():
        assert re.match(f"`{name}` {message}", teacher_of(name, content)), message


def test_an_onnx_file_is_read_before_anything_runs(params):
    write_onnx(Path("mine.onnx"))
    onnx, mine = Path("mine.onnx").read_bytes(), {"family": "onnx", "network": "mine"}
    assert teacher_of("mine.onnx", onnx, **mine) == ""
    cases = {onnx[:-99]: "or is cut short", LFS: WRONG[LFS], HTML: WRONG[HTML], b"": "has no graph"}
    for content, message in cases.items():
        problem = teacher_of("mine.onnx", content, **mine)
        assert re.match(f"`mine.onnx`: it is not an ONNX file.*{message}", problem)


def test_the_classes_of_a_tar_are_not_needed_to_read_a_checkpoint(params):
    with tarfile.open("images.tar", "w") as archive:
        archive.add("images")
    params["dataset"]["root"] = "images.tar"
    network = cifar_resnet.build("resnet8", 5, 3)
    torch.save(network.state_dict(), "mine.pth")
    params["teacher"] |= {"weights": "checkpoint", "checkpoint": "mine.pth"}
    assert problems_of(params) + check_networks.problems() == []
    Path("mine.pth").write_bytes(HTML)
    (problem,) = check_networks.problems()
    assert problem.startswith("`mine.pth` is a web page")


def test_the_weights_that_a_student_starts_from_are_read_before_anything_runs(params):
    for content, message in {saved(resnet8()): "", HTML: "`start.pth` is a web page"}.items():
        Path("start.pth").write_bytes(content)
        weights = {"path": "start.pth", "sha256": sha256_of_file("start.pth")}
        params["students"]["small"]["network"] = {"name": "resnet8", "weights": weights}
        assert problems_of(params) == []
        assert "\n".join(check_networks.problems()).startswith(message)
        assert bool(message) == bool(check_networks.problems())


def test_a_store_of_logits_is_read_by_its_headers(project):
    change_params("teacher", weights="logits", family="logits", network="any", checkpoint="mine")
    shutil.copytree("data/soft_targets", "mine")
    assert check.problems() + check_networks.problems() == []
    shard = Path("mine/train_view00001_sample000000000.h5")
    content = shard.read_bytes()
    for wrong, message in {
        content[:-300]: "is damaged",
        HTML: "is damaged",
        None: "absent",
    }.items():
        shard.write_bytes(wrong) if wrong else shard.unlink()
        (problem,) = check_networks.problems()
        assert re.match(f"`{shard}` .*{message}.* Copy the store again", problem)


def test_an_archive_of_images_is_read_by_its_beginning_and_its_end(params):
    with tarfile.open("whole.tar", "w") as tar, zipfile.ZipFile("whole.zip", "w") as packed:
        for path in sorted(Path("images").rglob("*.png")):
            tar.add(path)
            packed.write(path)
    cases = [
        (
            "cut.tar",
            Path("whole.tar").read_bytes()[:-11000],
            "without its end mark: it is cut short",
        ),
        ("cut.zip", Path("whole.zip").read_bytes()[:-50], "without its end: it is cut short"),
        *(
            (f"wrong{end}", content, kind)
            for end in (".tar.gz", ".zip")
            for content, kind in WRONG.items()
        ),
    ]
    for name, content, message in cases:
        Path(name).write_bytes(content)
        params["dataset"]["root"] = name
        (problem,) = problems_of(params)
        assert re.match(f"`{name}` \\(`dataset.root`\\) .*{message}", problem)
    for name in ("whole.tar", "whole.zip"):
        params["dataset"]["root"] = name
        assert problems_of(params) == []


def test_epochs_that_show_each_cached_view_too_often_are_remarked(params):
    params["views"] |= {"policy": "crop", "count": 2}

    def remarks(epochs: int) -> list[str]:
        params["training"]["epochs"] = epochs
        assert problems_of(params) == []
        return check.remarks()

    assert remarks(40) == []
    (remark,) = remarks(41)
    assert "student `small` sees each view about 20 times (41 epochs, `views.count: 2`)" in remark
    assert "`views.count: 3` shows each at most 14 times" in remark
    assert "`views.count: 8` shows each at most 50 times" in remarks(400)[0]
    params["views"]["count"] = 8
    assert remarks(400) == []
    params["views"] |= {"policy": "none", "count": 1}  # there are no more views
    assert remarks(41) == []


def test_views_that_show_much_less_than_the_images_are_remarked(params):
    params["views"] |= {"image_size": 28}
    params["dataset"] |= {"storage": "encoded", "image_size": 256}
    assert problems_of(params) == []
    (remark,) = check.remarks()
    assert "`views.image_size` is 28, and `dataset.image_size` is 256" in remark
    params["views"]["image_size"] = 224
    assert problems_of(params) == []
    assert check.remarks() == []


@pytest.mark.parametrize("distillation", [{"method": "dkd"}, {"sort_teacher": True}])
def test_a_method_that_needs_labels_which_images_lack_is_refused_before_the_teacher_runs(
    params, distillation
):
    root = Path("images/train")
    write_images(root.parent, per_class=3)
    params["distillation"] = distillation
    for labels_per_class, expected in ((3, 0), (1, 6), (None, 0)):
        params["dataset"]["labels_per_class"] = labels_per_class
        found = problems_of(params)
        assert len(found) == (expected > 0)
        assert all(f"{expected} of 9 training images have none" in line for line in found)
    image = next(root.rglob("*.png"))
    shutil.copytree(image.parent, root.parent / "unlabeled")
    (problem,) = problems_of(params)
    assert "3 of 12 training images have none" in problem
    shutil.make_archive("images", "zip", "images")
    params["dataset"]["root"] = "images.zip"
    assert problems_of(params) == [problem]


def test_a_student_that_standardises_with_the_weights_of_the_section_is_remarked(params):
    params["distillation"] = {"method": "kd", "temperature": 4.0}
    params["students"]["small"]["distillation"] = own = {"standardize": True}
    assert problems_of(params) == []
    (remark,) = check.remarks()
    assert "has `standardize`, with `temperature: 4.0` of the section" in remark
    assert "its authors have `temperature: 2.0`" in remark
    own["temperature"] = 3.0
    assert problems_of(params) == []
    assert check.remarks() == []


@pytest.mark.parametrize(
    ("method", "key", "awaited", "in_proportion"),
    [("dkd", "warmup_epochs", 20, 1), ("sld", "student_teaches_after", 150, 8)],
)
def test_a_training_that_ends_before_its_methods_schedule_is_remarked(
    params, method, key, awaited, in_proportion
):
    params["training"]["epochs"] = 12
    params["views"]["count"] = 12
    params["distillation"] = {"method": method}
    assert problems_of(params) == []
    (remark,) = check.remarks()
    assert f"student `small` trains for 12 epochs, and `distillation.{key}` is {awaited}" in remark
    assert f"`{key}: {in_proportion}`" in remark
    last = 12 if key == "warmup_epochs" else 11  # the student teaches itself in the 12th
    params["distillation"][key] = last + 1
    assert problems_of(params) == []
    assert len(check.remarks()) == 1
    params["distillation"][key] = last
    assert problems_of(params) == []
    assert check.remarks() == []
    params["training"]["epochs"] = 1
    assert problems_of(params) == []
    assert f"for 1 epoch, and `distillation.{key}` is {last}: " in check.remarks()[0]
    assert f"`{key}: 0`" in check.remarks()[0]
