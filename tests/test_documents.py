"""What the documents say is what the code does."""

import importlib.util
import json
import re
from types import ModuleType

import numpy as np
import pytest
import yaml
from conftest import run_stage, write_params
from import_closure import ROOT
from pydantic_core import PydanticUndefined

from pipeline.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.params.dataset import DatasetParams
from pipeline.params.distillation import DistillationParams
from pipeline.params.network import NetworkParams
from pipeline.params.soft_targets import SoftTargetsParams
from pipeline.params.students import StudentParams
from pipeline.params.teacher import TeacherParams, TeacherTraining
from pipeline.params.training import TrainingParams
from pipeline.params.views import MixParams, RandAugmentParams, ViewsParams
from pipeline.stages.compare import on_screen

README = (ROOT / "README.md").read_text("utf-8")
REFERENCE = (ROOT / "docs/parameters.md").read_text("utf-8")
MODELS = {
    "dataset": DatasetParams,
    "views": ViewsParams,
    "views.rand_augment": RandAugmentParams,
    "views.mix": MixParams,
    "teacher": TeacherParams,
    "network": NetworkParams,
    "teacher.training": TeacherTraining,
    "soft_targets": SoftTargetsParams,
    "training": TrainingParams,
    "distillation": DistillationParams,
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


def test_the_reference_has_no_section_that_the_code_lacks():
    assert set(re.findall(r"^## (\S+)$", REFERENCE, re.MULTILINE)) == set(MODELS)


def test_the_table_in_the_readme_is_that_of_the_committed_run():
    comparison = json.loads((ROOT / "metrics/comparison.json").read_text("utf-8"))
    shown = "\n".join(f"    {line}" for line in on_screen(comparison).splitlines())
    assert shown in README


def test_files_that_the_documents_link_to_exist():
    pages = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("benchmarks/**/*.md"))
    for path in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


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


def test_the_example_that_packs_cifar_writes_what_prepare_reads(project):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    labels, class_names = [0, 1] * 6, ["apple", "bear"]
    split = (images, labels, class_names)
    example_module("cifar_archive").write_archive("cifar.tar.gz", {"train": split, "test": split})
    params = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    params["dataset"] |= {"root": "cifar.tar.gz", "image_size": 32, "validation_fraction": 0.5}
    write_params(project, params)
    run_stage("prepare")
    dataset = open_dataset()
    test = dataset.splits["test"]
    assert dataset.class_names == class_names
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 6,
        "validation": 6,
        "test": 12,
    }
    for pixels, label, sample_id in zip(test.images, test.labels, test.sample_ids, strict=True):
        number = int(sample_id.split("/")[-1].removesuffix(".png"))
        assert np.array_equal(pixels, images[number].transpose(2, 0, 1))
        assert label == labels[number]
