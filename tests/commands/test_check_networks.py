"""`check` builds every network, and says in one line what is wrong with one."""

import re
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from conftest import PARAMS, change_params, run_stage, write_images, write_params
from import_closure import ROOT
from own_family import RETURNED, changed, families_here, problem_of_family
from stage_process import start_module

from pipeline.commands import check, check_networks


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            changed("import nn", "import NN"),
            "family `mine` cannot be imported: pipeline/networks/mine.py, line 2: ImportError: "
            "cannot import name 'NN' from 'torch'",
        ),
        (
            "raise SystemExit('not here')",
            "family `mine` cannot be imported: pipeline/networks/mine.py, line 1: SystemExit: not "
            "here. Correct the file.",
        ),
        (
            changed("return Own(num_classes, in_channels)", "return None"),
            "`build` of pipeline/networks/mine.py returns NoneType for network `small`; expected a "
            "torch.nn.Module.",
        ),
        (
            changed("def build(network, num_classes, in_channels)", "def build(num_classes)"),
            "network `small` of family `mine` does not take the options {}: too many positional "
            "arguments. `build(num_classes)` of pipeline/networks/mine.py is called as `build("
            "network, num_classes, in_channels, **options)`.",
        ),
        (
            changed("def forward", "def forwards"),
            "network `small` fails on 3 x 16 x 16 pixels: NotImplementedError: Module [Own] is "
            'missing the required "forward" function.',
        ),
        (
            changed(
                RETURNED, "return self.head(self.features(x)[..., 0, 0].view(4, -1).view(1, -1))"
            ),
            "network `small` fails in evaluation, on images [2, 3, 16, 16]: "
            "pipeline/networks/mine.py, line 14: RuntimeError: ",
        ),
        (
            changed(RETURNED, "return self.forward(x)"),
            "network `small` fails on 3 x 16 x 16 pixels: pipeline/networks/mine.py, line 14: "
            "RecursionError: maximum recursion depth exceeded",
        ),
        (
            changed(RETURNED, RETURNED + ".detach()"),
            "network `small` has no gradient: RuntimeError: element 0 of tensors does not require "
            "grad",
        ),
    ],
)
def test_a_mistake_in_an_own_network_is_one_line_that_names_it(folder, code, message):
    problem = problem_of_family(code)
    assert problem.startswith(message)
    assert "\n" not in problem


def test_a_network_gets_images_as_a_training_shows_them(folder):
    """Channels last in memory, which `view` cannot take."""
    problem = problem_of_family(
        changed(RETURNED, "return self.head(self.features(x).view(len(x), -1)[:, :4])")
    )
    assert "pipeline/networks/mine.py, line 14: RuntimeError: view size is not" in problem


def test_a_network_that_divides_by_an_images_contrast_is_right(folder):
    code = changed("self.features(x)", "self.features(x / x.std((1, 2, 3), keepdim=True))")
    assert problem_of_family(code) is None


@pytest.mark.parametrize(
    "line",
    ["import my_blocks", "from .my_blocks import nn", "from pipeline.networks import logits"],
)
def test_a_family_that_imports_code_that_dvc_does_not_watch_is_refused(folder, line):
    code = changed("from torch import nn", f"from torch import nn\n{line}")
    Path("my_blocks.py").touch()
    problem = problem_of_family(code, my_blocks="from torch import nn")
    assert re.match(r"pipeline/networks/mine.py imports `\S+`, which DVC does not watch", problem)


def test_misspelt_networks_and_options_are_named_at_every_place_that_has_them(folder):
    write_images(folder / "images", per_class=3)
    params = deepcopy(PARAMS)
    params["teacher"]["network"] = "resnet7"
    network = {"name": "resnet8", "options": {"widht": 2}}
    small = params["students"]["small"]
    params["students"] = {"right": small} | {name: small | {"network": network} for name in "ab"}
    published = {"name": "resnet8", "weights": "pretrained"}
    params["students"]["published"] = small | {"network": published}
    write_params(folder, params)
    assert not check.problems()
    teacher, *students, published = check_networks.problems()
    assert "students.published.network`: family `cifar_resnet` has no pretrained w" in published
    assert teacher.startswith(
        "`params.yaml: teacher.network`: family `cifar_resnet` has no network `resnet7`; did you "
        "mean `resnet"
    )
    assert students == [
        f"`params.yaml: students.{name}.network`: network `resnet8` of family `cifar_resnet` does "
        "not take the options {'widht': 2}: got an unexpected keyword argument 'widht'. "
        "`build(network: str, num_classes: int, in_channels: int)` of "
        "pipeline/networks/cifar_resnet.py is called as `build(network, num_classes, in_channels, "
        "**options)`."
        for name in "ab"
    ]


def test_the_template_is_a_network_that_check_accepts_and_both_trainings_take(project):
    entry = {"family": "mine", "network": {"name": "small", "options": {"dropout": 0.1}}}
    change_params("students", mine=PARAMS["students"]["small"] | entry)
    template = (ROOT / "docs/examples/own_network.py").read_text("utf-8")
    assert yaml.safe_load(template.partition("params.yaml:\n")[2].partition("\nand")[0]) == {
        "students": {"mine": entry | {"training": {}, "distillation": {}}}
    }
    with families_here(mine=template):
        assert check.problems() + check_networks.problems() == []
        for stage in ("baseline", "student"):
            run_stage(stage, "mine")
    assert Path("models/students/mine/family.py").read_text("utf-8") == template


def test_a_student_that_starts_from_a_network_gets_its_input(project):
    start = {"path": "models/students/small", "sha256": "0" * 64}
    change_params("views", image_size=32)
    change_params(
        "students",
        **{
            name: PARAMS["students"]["small"] | {"network": {"name": "resnet8", "weights": weights}}
            for name, weights in (("fresh", "scratch"), ("further", start))
        },
    )
    sizes = [
        check_networks.described_network(f"students.{name}")[0].input.size
        for name in ("fresh", "further")
    ]
    assert sizes == [32, 16]


@pytest.mark.slow
def test_check_ends_with_the_code_and_the_lines_of_the_networks(folder):
    write_images(folder / "images", per_class=3)
    small = PARAMS["students"]["small"] | {"network": "resnet9"}
    write_params(folder, PARAMS | {"students": {"small": small}})
    process = start_module("pipeline.commands.check")
    stdout, stderr = process.communicate()
    assert process.returncode == 1
    assert stdout == ""
    assert stderr.startswith("error: `params.yaml: students.small.network`: family `cifar_resnet` ")
    assert stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os\nos.kill(os.getpid(), 9)", "was ended by SIGKILL; expected"),
        ("import os\nos._exit(3)", "ended with code 3 and said nothing; expected"),
    ],
)
def test_check_says_how_the_process_of_the_networks_ended(folder, code, message):
    write_images(folder / "images", per_class=3)
    params = PARAMS | {"teacher": PARAMS["teacher"] | {"family": "mine"}}
    write_params(folder, params)
    shutil.copytree(ROOT / "pipeline", "pipeline")
    Path("pipeline/networks/mine.py").write_text(code, "utf-8")
    process = start_module("pipeline.commands.check", PYTHONPATH=str(folder))
    assert f"builds the networks {message}" in process.communicate()[1]
    assert process.returncode == 1
