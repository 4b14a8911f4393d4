"""Every recipe runs from its first stage to its last, with its networks, views, store, losses and
schedule, for two epochs of a few images; fresh weights replace downloads and checkpoints."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import opened, run_stage, write_images, write_params
from import_closure import ROOT
from safetensors.torch import save_file
from torch import nn

import pipeline.networks
from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import params
from pipeline.models.spec import InputSpec, ModelSpec, build, model_spec
from pipeline.runtime.params import load_section, read_params
from pipeline.teacher import foreign_teacher
from pipeline.teacher.params import TeacherParams

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def rehearsal(recipe: Path) -> dict:
    """The recipe's parameters, changed to two epochs and two views of the images in `images`."""
    params = read_params(recipe)
    params["dataset"] |= {"source": "image_folder", "root": "images", "validation_fraction": 0.2}
    params["dataset"].setdefault("test_fraction", 0.1)
    params["dataset"].pop("name", None)
    params["views"]["count"] = 2
    if "k" in params["soft_targets"]:
        params["soft_targets"]["k"] = 2
    few = {"epochs": 2, "batch_size": 4, "warmup_epochs": 0, "milestones": [1]}
    sections = [params["teacher"].get("training", {}), params["training"]]
    for section in [*sections, *(student["training"] for student in params["students"].values())]:
        section |= {key: value for key, value in few.items() if key in section}
        if "freeze_epochs" in section:
            section["freeze_epochs"] = min(section["freeze_epochs"], 2)
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
    path, name = Path(teacher.checkpoint), teacher.network.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if teacher.family == "onnx":
        export_small_network(path, name)
    elif teacher.weights == "checkpoint":
        description = model_spec(teacher.family, teacher.network, open_dataset())
        torch.save(build(description).state_dict(), path)
    elif teacher.weights == "pretrained":
        config = timm.get_pretrained_cfg(name)
        whole = timm.create_model(name, num_classes=config.num_classes)
        state = {key: value.contiguous() for key, value in whole.state_dict().items()}
        save_file(state, hub / f"timm_{name}.safetensors")


def export_small_network(path: Path, name: str) -> None:
    """Export a small network of 3 classes, by the lines of the recipe, or as CLIP."""
    if name == "clip":
        module = example("clip_zero_shot")
        tower = torchvision.models.squeezenet1_1(num_classes=16)
        module.export(module.ZeroShot(tower, torch.randn(3, 16), 100.0), 224, path)
        return
    torch.onnx.export(
        torchvision.models.mobilenet_v3_small(num_classes=3).eval(),
        (torch.zeros(2, 3, 224, 224),),
        path,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
    )


def publish_for_students(params: dict, hub: Path) -> None:
    """Write random weights where torchvision's published ones are read from."""
    for student in params["students"].values():
        network = student["network"]
        if isinstance(network, dict) and network.get("weights") == "pretrained":
            url = torchvision.models.get_model_weights(network["name"]).DEFAULT.url
            whole = torchvision.models.get_model(network["name"], weights=None)
            torch.save(whole.state_dict(), hub / Path(url).name)


def example(name: str) -> ModuleType:
    """Import a file of docs/examples."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_zero_shot_file_gives_scaled_cosines_and_is_a_teacher(folder):
    module = example("clip_zero_shot")
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.GELU(), nn.Flatten(), nn.Linear(16, 6))
    texts, images = torch.randn(3, 6), torch.randn(5, 3, 16, 16)
    path = folder / "models/imported/clip.onnx"
    module.export(module.ZeroShot(tower, texts, 100.0), 16, path)
    description = ModelSpec(
        "onnx", "clip", {}, ["a", "b", "c"], InputSpec(3, 16, [0.5] * 3, [1] * 3)
    )
    network, _ = foreign_teacher.load_foreign(description, path)
    with torch.inference_mode():
        expected = 100 * nn.functional.cosine_similarity(tower(images)[:, None], texts[None], dim=2)
        torch.testing.assert_close(network(images), expected, atol=1e-3, rtol=0)
    assert module.texts_of(["n01440764", "great_tit"]) == ["tench", "great tit"]


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
    hub = folder / "hub/hub/checkpoints"
    hub.mkdir(parents=True)
    write_fresh_weights(load_section(TeacherParams, "teacher"), hub)
    publish_for_students(params, hub)
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
