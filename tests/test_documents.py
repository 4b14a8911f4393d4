"""The documents agree with the code."""

import hashlib
import importlib
import importlib.util
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import run_stage, write_params
from import_closure import ROOT
from PIL import Image
from pydantic_core import PydanticUndefined
from safetensors.torch import save_file

from pipeline.comparison.figures import Figures
from pipeline.comparison.measurement.corruptions import PUBLISHED, SEVERITIES
from pipeline.comparison.measurement.latency import Speeds
from pipeline.comparison.report.console import console_text
from pipeline.comparison.report.decision_card import decision_card
from pipeline.data.prepared.dataset import open_dataset
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.torchvision_catalog import SETS
from pipeline.distillation.params import METHODS
from pipeline.export.params import ExportParams, Int8TrainingParams
from pipeline.models import checkpoint
from pipeline.models.params import NetworkParams, WeightsFile
from pipeline.models.spec import InputSpec, ModelSpec
from pipeline.runtime.errors import UserError
from pipeline.store.writing.params import SoftTargetsParams
from pipeline.students.params import StudentParams, TrainingSection
from pipeline.teacher import foreign_teacher
from pipeline.teacher.params import TeacherParams, TeacherTraining
from pipeline.views.params import MixParams, RandAugmentParams, ViewsParams

README = (ROOT / "README.md").read_text("utf-8")
LOSSES = (ROOT / "docs/losses.md").read_text("utf-8")
REFERENCE = (ROOT / "docs/parameters.md").read_text("utf-8")
MODELS = {
    "dataset": DatasetParams,
    "views": ViewsParams,
    "views.rand_augment": RandAugmentParams,
    "views.mix": MixParams,
    "teacher": TeacherParams,
    "network": NetworkParams,
    "network.weights": WeightsFile,
    "teacher.training": TeacherTraining,
    "soft_targets": SoftTargetsParams,
    "training": TrainingSection,
    "export": ExportParams,
    "export.int8_training": Int8TrainingParams,
    "students": StudentParams,
}


@pytest.mark.parametrize("section", MODELS)
def test_the_parameter_reference_names_every_key_with_its_default(section):
    text = REFERENCE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*?\| (.*?)\| [^|]*\|$", text, re.MULTILINE)
    documented = {key: yaml.safe_load(default.strip().strip("`")) for key, default in rows}
    declared = {
        key: None if field.default is PydanticUndefined else field.default
        for key, field in MODELS[section].model_fields.items()
    }
    assert documented == declared


def defaults_of_methods(column: str) -> dict[str, object]:
    """`1.5` nkd, dist; `0.2` wttm -> the default of each named method."""
    parts = (part.strip().partition("` ") for part in column.split(";"))
    return {
        name.strip(): yaml.safe_load(default.removeprefix("`"))
        for default, _, names in parts
        for name in names.split(",")
    }


def test_the_reference_names_every_methods_parameters_with_their_defaults():
    text = REFERENCE.partition("\n## distillation\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*?\| (.*?) \| [^|]*\|$", text, re.MULTILINE)
    documented = {key: defaults_of_methods(column) for key, column in rows if key != "method"}
    declared: dict[str, dict[str, object]] = {}
    for name, model in METHODS.items():
        for key, field in model.model_fields.items():
            if key != "method":
                declared.setdefault(key, {})[name] = field.default
    assert documented == declared


@pytest.mark.parametrize("method", METHODS)
def test_the_page_of_losses_gives_every_methods_defaults(method):
    (row,) = re.findall(rf"^\| {method} \| .* \| (.*) \| [^|]*\|$", LOSSES, re.MULTILINE)
    documented = {
        key: yaml.safe_load(default) for key, default in re.findall(r"(\w+) (\[.*?\]|[\d.]+)", row)
    }
    model = METHODS[method](method=method)
    # The page describes these in words.
    choices = {"method", "standardize", "sort_teacher", "tail", "paired_views"}
    assert documented == model.model_dump(exclude=choices)


def test_the_page_of_losses_says_which_methods_take_top_k_and_unlabelled_images():
    rows = re.findall(r"^\| `(\w+)` \| (\w+).*?\| (\w+).*?\|$", LOSSES, re.MULTILINE)
    assert {name: (top_k, unlabelled) for name, top_k, unlabelled in rows} == {
        name: (
            "refused" if model.needs_every_logit else "approximate",
            "refused" if model.needs_labels else "yes",
        )
        for name, model in METHODS.items()
    }


def test_the_reference_names_every_family_and_its_networks():
    rows = re.findall(
        r"^\| `(\w+)` \| (.*) \|$",
        REFERENCE.partition("## Families")[2].partition("## ")[0],
        re.MULTILINE,
    )
    rows = [row for row in rows if row[0] != "family"]  # the heading
    assert {family for family, _ in rows} == {
        path.stem for path in (ROOT / "pipeline/networks").glob("*.py") if path.stem != "__init__"
    }
    for family, text in rows:
        module = importlib.import_module(f"pipeline.networks.{family}")
        if hasattr(module, "NETWORKS"):
            assert set(re.findall(r"`(\w+)`", text)) == set(module.NETWORKS)


def test_the_reference_names_every_set_of_torchvisions():
    text = REFERENCE.partition("Datasets of `source: torchvision`")[2].partition("\n## ")[0]
    assert re.findall(r"`([A-Z]\w+)`", text) == list(SETS)


def test_the_reference_has_no_section_that_the_code_lacks():
    assert set(re.findall(r"^## (\S+)$", REFERENCE, re.MULTILINE)) == {
        *MODELS,
        "distillation",
        "Families",
    }


def test_the_readme_shows_the_table_of_the_committed_run():
    """Not of a later run on this machine: another processor gives other figures."""

    def committed(path: str) -> bytes:
        show = ["git", "show", f":{path}"]
        return subprocess.run(show, cwd=ROOT, check=True, capture_output=True).stdout

    figures = Figures.model_validate_json(committed("metrics/comparison.json"))
    speeds = Speeds.model_validate_json(committed("metrics/speed.json"))
    text = console_text(figures, decision_card(figures, speeds.settings))
    assert f"```text\n{text}\n```" in README


def test_the_page_on_comparing_gives_every_corruptions_strengths():
    page = (ROOT / "docs/comparing.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([\d., ]+) \| ([\d., ]+) \|$", page, re.MULTILINE)
    assert {name: columns for name, *columns in rows} == {
        name: [", ".join(f"{values[s - 1]:g}" for s in SEVERITIES) for values in sizes]
        for name, sizes in PUBLISHED.items()
    }


PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md"))


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_and_headings_that_the_documents_link_to_exist():
    links = {
        path: re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", path.read_text("utf-8")) for path in PAGES
    }
    assert links[ROOT / "README.md"]
    for path, of_page in links.items():
        for target, anchor in of_page:
            page = path.parent / target if target else path
            assert page.exists(), f"{path.name} links to {target}"
            assert not anchor or anchor in anchors(page), f"{path.name} links to {target}#{anchor}"


def test_commands_and_files_of_code_that_the_documents_name_exist():
    named = {}
    for path in PAGES:
        text = path.read_text("utf-8")
        commands = re.findall(r"\b((?:pipeline|benchmarks|soak)\.[\w.]*\w)", text)
        files = re.findall(r"\b((?:pipeline|benchmarks|soak|tests)/[\w/]+\.py)\b", text)
        named[path] = {*files, *(f"{command.replace('.', '/')}.py" for command in commands)}
    readme, contributing = named[ROOT / "README.md"], named[ROOT / "CONTRIBUTING.md"]
    assert "pipeline/commands/check.py" in readme  # by its command
    assert "tests/test_graph.py" in contributing
    for path, names in named.items():
        for name in names - {"pipeline/networks/mine.py"}:  # a reader's
            assert (ROOT / name).is_file(), f"{path.name} names {name}"


def example_module(name: str) -> ModuleType:
    path = ROOT / f"docs/examples/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_family_builds_and_refuses_an_unknown_name():
    example = example_module("option_a_resnet")
    network = example.build("resnet32", num_classes=10, in_channels=3)
    # He et al. 2016, table 6: 0.46 M parameters.
    assert sum(p.numel() for p in network.parameters()) == 464_154
    with pytest.raises(UserError, match="no network `resnet23`; did you mean `resnet"):
        example.build("resnet23", num_classes=10, in_channels=3)


def test_the_example_ensemble_averages_the_logits_of_its_members(tmp_path, monkeypatch):
    example = example_module("ensemble")
    monkeypatch.setitem(sys.modules, "pipeline.networks.ensemble", example)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = ("squeezenet1_1", "shufflenet_v2_x0_5")
    members = [torchvision.models.get_model(name, num_classes=3).eval() for name in names]
    torch.save(members[0].state_dict(), "first.pth")
    save_file(members[1].state_dict(), "second.safetensors")
    example.pack(["first.pth", "second.safetensors"], "packed.safetensors")
    spec = InputSpec(3, 32, [0.5] * 3, [0.2] * 3)
    description = ModelSpec("ensemble", "+".join(names), {}, ["a", "b", "c"], spec)
    ensemble, _ = foreign_teacher.load_foreign(description, Path("packed.safetensors"))
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        expected = (members[0](images) + members[1](images)) / 2
        torch.testing.assert_close(ensemble.eval()(images), expected)
        checkpoint.save(tmp_path, ensemble, description)
        again, _ = checkpoint.load(tmp_path, produced_by="-")
        torch.testing.assert_close(again.eval()(images), expected)


def test_prepare_reads_the_archive_of_the_cifar_example(project, monkeypatch):
    """torchvision reads batches in the authors' format; of the 4 and 2 training images of the two
    classes, the first 3 and 2 by name are packed."""
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 32, 32), np.uint8)
    labels = [0, 1, 0, 0, 1, 0, 1, 0, 1]
    names = [f"{'ab'[label]}_s_{9 - number:06d}.png" for number, label in enumerate(labels)]
    folder = project / "data/raw/cifar/cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name, part):
        pixels = images[part].reshape(-1, 3072)
        return write(name, {"data": pixels, "labels": labels[part], "filenames": names[part]})

    published = torchvision.datasets.CIFAR10
    batches = [batch("data_batch_1", slice(0, 4)), batch("data_batch_2", slice(4, 6))]
    monkeypatch.setattr(published, "train_list", batches)
    monkeypatch.setattr(published, "test_list", [batch("test_batch", slice(6, 9))])
    name, md5 = write("batches.meta", {"label_names": ["apple", "bear"]})
    meta = {"filename": name, "key": "label_names", "md5": md5}
    monkeypatch.setattr(published, "meta", meta)
    monkeypatch.setattr(sys, "argv", ["cifar_archive", "CIFAR10", "cifar.tar.gz", "3"])
    example_module("cifar_archive").main()
    params = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    params["dataset"] |= {"root": "cifar.tar.gz", "image_size": 32, "validation_fraction": 0.4}
    write_params(project, params)
    run_stage("prepare")
    dataset = open_dataset()
    assert dataset.class_names == ["apple", "bear"]
    found = {
        sample_id: (pixels, label)
        for split in dataset.splits.values()
        for sample_id, pixels, label in zip(
            split.sample_ids, split.images, split.labels, strict=True
        )
    }
    for number in set(range(9)) - {0}:  # the last of its class by name
        part = "train" if number < 6 else "test"
        pixels, label = found.pop(f"{part}/{['apple', 'bear'][labels[number]]}/{names[number]}")
        assert np.array_equal(pixels, images[number])
        assert label == labels[number]
    assert not found


@pytest.mark.parametrize("storage", ["exported", "encoded_project"])
def test_the_example_writes_test_images_as_predict_reads_them(
    storage, request, tmp_path, monkeypatch
):
    request.getfixturevalue(storage)
    monkeypatch.setattr(sys, "argv", ["write_test_images", str(tmp_path / "samples"), "3"])
    example_module("write_test_images").main()
    dataset, files = open_dataset(), sorted((tmp_path / "samples").iterdir())
    test = dataset.splits["test"]
    names = [dataset.class_names[label] for label in test.labels[:3]]
    assert [path.stem for path in files] == [f"{n}_{name}" for n, name in enumerate(names)]
    for sample, path in enumerate(files):
        if dataset.encoded:
            assert path.read_bytes() == test.content(sample)
        else:
            pixels = np.array(Image.open(path)).transpose(2, 0, 1)
            assert np.array_equal(pixels, test.images[sample])
