"""What the documents say is what the code does."""

import importlib.util
import json
import re

import pytest
import yaml
from import_closure import ROOT
from pydantic_core import PydanticUndefined

from pipeline.errors import UserError
from pipeline.params.dataset import DatasetParams
from pipeline.params.distillation import DistillationParams
from pipeline.params.network import NetworkParams
from pipeline.params.soft_targets import SoftTargetsParams
from pipeline.params.students import StudentParams
from pipeline.params.teacher import TeacherParams, TeacherTraining
from pipeline.params.training import TrainingParams
from pipeline.params.views import ViewsParams
from pipeline.stages.compare import on_screen

README = (ROOT / "README.md").read_text("utf-8")
REFERENCE = (ROOT / "docs/parameters.md").read_text("utf-8")
MODELS = {
    "dataset": DatasetParams,
    "views": ViewsParams,
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
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_example_family_builds_and_refuses_an_unknown_name():
    path = ROOT / "docs/examples/option_a_resnet.py"
    spec = importlib.util.spec_from_file_location("option_a_resnet", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    network = example.build("resnet32", num_classes=10, in_channels=3)
    # He et al. 2016, table 6: 0.46 M parameters.
    assert sum(p.numel() for p in network.parameters()) == 464_154
    with pytest.raises(UserError, match="no network `resnet23`; did you mean `resnet"):
        example.build("resnet23", num_classes=10, in_channels=3)
