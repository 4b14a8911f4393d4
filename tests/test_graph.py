"""The cache boundary is the module boundary."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from import_closure import ROOT, closure

from pipeline.params.views import ViewsParams

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
FAMILY = {
    "teacher": "${teacher.family}",
    "soft_targets": "${teacher.family}",
    "baseline": "${item.family}",
    "student": "${item.family}",
    "robustness_teacher": "${teacher.family}",
    "robustness": "${item.family}",
    "export": "${item.family}",
}
EVERY_FAMILY = {"speed"}  # stages that load networks of several: they depend on the folder
STUDENT_SIDE = {
    "pipeline/charts.py",
    "pipeline/check.py",
    "pipeline/comparison.py",
    "pipeline/corruptions.py",
    "pipeline/costs.py",
    "pipeline/distillation.py",
    "pipeline/economics.py",
    "pipeline/exported.py",
    "pipeline/exporting.py",
    "pipeline/losses.py",
    "pipeline/measures.py",
    "pipeline/mend.py",
    "pipeline/predict.py",
    "pipeline/replay.py",
    "pipeline/report.py",
    "pipeline/report_parts.py",
    "pipeline/report_robustness.py",
    "pipeline/report_style.py",
    "pipeline/robust_accuracy.py",
    "pipeline/speed.py",
    "pipeline/statistics.py",
    "pipeline/store.py",
    "pipeline/students.py",
    "pipeline/summary.py",
    "pipeline/training.py",
    "pipeline/params/distillation.py",
    "pipeline/params/students.py",
    "pipeline/params/training.py",
    "pipeline/stages/baseline.py",
    "pipeline/stages/compare.py",
    "pipeline/stages/export.py",
    "pipeline/stages/robustness.py",
    "pipeline/stages/speed.py",
    "pipeline/stages/student.py",
}


def definition(stage: str) -> dict:
    return STAGES[stage].get("do", STAGES[stage])


def module_of(stage: str) -> str:
    """The module that its command runs."""
    return re.match(r"exec python -m (pipeline\.stages\.\w+)", definition(stage)["cmd"])[1]


def code_dependencies(stage: str) -> set[str]:
    return {path for path in definition(stage)["deps"] if path.startswith("pipeline/")}


def expected_dependencies(stage: str) -> set[str]:
    files = closure(module_of(stage))
    if "pipeline/checkpoint.py" in files:  # which imports the family by its name
        files |= (
            {"pipeline/networks"}
            if stage in EVERY_FAMILY
            else {"pipeline/networks/__init__.py", f"pipeline/networks/{FAMILY[stage]}.py"}
        )
    return files


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_files_that_it_imports(stage):
    assert code_dependencies(stage) == expected_dependencies(stage)


@pytest.mark.parametrize("stage", ["prepare", "teacher", "soft_targets"])
def test_the_teachers_side_imports_nothing_of_the_students_side(stage):
    assert not closure(f"pipeline.stages.{stage}") & STUDENT_SIDE


def test_every_file_is_on_one_side_of_the_cache_boundary():
    teachers_side = set().union(
        *(closure(f"pipeline.stages.{stage}") for stage in ("prepare", "teacher", "soft_targets"))
    )
    families = {str(p.relative_to(ROOT)) for p in (ROOT / "pipeline/networks").glob("*.py")}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "pipeline").rglob("*.py")}
    assert files == teachers_side | families | STUDENT_SIDE


@pytest.mark.parametrize(
    "family", [p.stem for p in (ROOT / "pipeline/networks").glob("*.py") if p.stem != "__init__"]
)
def test_a_family_imports_nothing_that_its_stages_do_not_depend_on(family):
    files = closure(f"pipeline.networks.{family}")
    for stage in {*FAMILY, *EVERY_FAMILY}:
        foreign = files - closure(module_of(stage))
        assert foreign == {"pipeline/networks/__init__.py", f"pipeline/networks/{family}.py"}


def test_a_baseline_depends_on_every_key_of_views_but_the_count():
    named = {key for key in STAGES["baseline"]["do"]["params"] if key.startswith("views.")}
    assert named == {f"views.{key}" for key in ViewsParams.model_fields} - {"views.count"}


def test_stages_never_import_each_other():
    for stage in STAGES:
        module = module_of(stage)
        imported = {path for path in closure(module) if "/stages/" in path}
        assert imported == {"pipeline/stages/__init__.py", f"{module.replace('.', '/')}.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").rglob("__init__.py")))
def test_no_package_init_holds_code(path: Path):
    assert ast.parse(path.read_text("utf-8")).body == []


@pytest.mark.parametrize(
    "module",
    [
        *("losses", "rand_augment", "resampling", "measures", "statistics", "charts"),
        *("corruptions", "economics", "speed"),
    ],
)
def test_pure_files_import_nothing_of_ours(module):
    assert closure(f"pipeline.{module}") == {"pipeline/__init__.py", f"pipeline/{module}.py"}


def test_the_view_plan_imports_only_what_moves_pixels():
    assert closure("pipeline.augment") == {
        "pipeline/__init__.py",
        *(f"pipeline/{module}.py" for module in ("augment", "rand_augment", "resampling")),
    }


def test_only_the_writer_opens_hdf5_for_writing():
    for path in (ROOT / "pipeline").rglob("*.py"):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "h5py.File"
        ]
        modes = {ast.unparse(call.args[1]) for call in calls}
        assert modes <= ({"'w'"} if path.name == "soft_targets.py" else {"'r'"}), path
