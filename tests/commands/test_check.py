"""`check` accepts params.yaml without needless keys, and gives the line of those that DVC needs."""

import shutil
from copy import deepcopy
from pathlib import Path

import pytest
from conftest import PARAMS, write_images, write_params
from dvc.dependency.param import MissingParamsError, ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from import_closure import ROOT

from pipeline.commands import check


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
