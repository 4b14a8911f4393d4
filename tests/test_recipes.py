"""Every recipe runs from its first stage to its last, with its networks, views, store, losses and
schedule, for two epochs of a few images; fresh weights replace downloads and checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import opened, run_stage, write_images, write_params
from import_closure import ROOT
from safetensors.torch import save_file

import pipeline.networks
from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import params
from pipeline.models.spec import build, family_module, model_spec
from pipeline.runtime.params import load_section, read_params
from pipeline.teacher.params import TeacherParams

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def rehearsal(recipe: Path) -> dict:
    """The recipe's parameters, changed to two epochs and two views of the images in `images`."""
    params = read_params(recipe)
    params["dataset"] |= {"source": "image_folder", "root": "images", "validation_fraction": 0.2}
    params["dataset"].pop("name", None)
    params["views"]["count"] = 2
    if "k" in params["soft_targets"]:
        params["soft_targets"]["k"] = 2
    few = {"epochs": 2, "batch_size": 4, "warmup_epochs": 0, "milestones": [1]}
    sections = [params["teacher"]["training"], params["training"]]
    for section in [*sections, *(student["training"] for student in params["students"].values())]:
        section |= {key: value for key, value in few.items() if key in section}
    return params


@pytest.fixture
def families(tmp_path, monkeypatch):
    """The families, and the one of docs/examples that a recipe uses."""
    folder = tmp_path / "networks"
    shutil.copytree(params.FAMILIES, folder)
    shutil.copy(ROOT / "docs/examples/option_a_resnet.py", folder)
    monkeypatch.setattr(params, "FAMILIES", folder)
    monkeypatch.setattr(pipeline.networks, "__path__", [str(folder)])


def write_fresh_weights(teacher: TeacherParams, hub: Path) -> None:
    """Write random weights of the teacher's network to the place where the stage reads them."""
    name = teacher.network.name
    if teacher.weights == "checkpoint":
        description = model_spec(teacher.family, teacher.network, open_dataset())
        path = Path(teacher.checkpoint)
        path.parent.mkdir(parents=True)
        torch.save(build(description).state_dict(), path)
    elif teacher.weights == "pretrained":
        whole = family_module(teacher.family).build(name, 1000, 3)
        path = hub / "hub/checkpoints" / f"timm_{name}.safetensors"
        path.parent.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in whole.state_dict().items()}, path)


@pytest.mark.slow
@pytest.mark.usefixtures("families")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_to_its_comparison(folder, monkeypatch, recipe):
    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    params = rehearsal(recipe)
    write_images(folder / "images", per_class=8, size=params["dataset"]["image_size"])
    write_params(folder, params)
    run_stage("prepare")
    torch.manual_seed(0)
    write_fresh_weights(load_section(TeacherParams, "teacher"), folder / "hub")
    run_stage("teacher")
    run_stage("soft_targets")
    logits = opened().gather(1, np.arange(6)).logits.astype(np.float32)
    assert logits.std(0).max() > 0  # the logits depend on the image
    for name in params["students"]:
        run_stage("baseline", name)
        run_stage("student", name)
    for models in ("--teacher", *params["students"]):
        run_stage("export", models)
        run_stage("robustness", models)
    run_stage("speed")
    run_stage("compare")
    compared = json.loads(Path("metrics/comparison.json").read_text("utf-8"))
    assert set(compared["students"]) == set(params["students"])
