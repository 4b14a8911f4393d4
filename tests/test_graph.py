"""The cache boundary is the folder boundary."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from import_closure import ROOT, closure, packages_imported_by

from pipeline.views.params import ViewsParams

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
FAMILY = "pipeline/networks/${"  # how dvc.yaml names the one family of a stage
MODULES = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "pipeline").rglob("*.py")
    if path.name != "__init__.py"
}
#: Files of a listed folder that the stage does not import. None for a stage that takes long.
BROUGHT_ALONG = {
    "robustness": {
        *("pipeline/comparison/measurement/latency.py", "pipeline/views/params.py"),
        *("pipeline/comparison/measurement/statistics.py", "pipeline/compute/distributed.py"),
        *("pipeline/comparison/measurement/seeds.py", "pipeline/compute/provenance.py"),
    },
    "speed": {
        *("pipeline/models/evaluation.py", "pipeline/export/running/file_images.py"),
        *("pipeline/runtime/derived_random.py", "pipeline/runtime/progress.py"),
    },
    "compare": {
        *("pipeline/runtime/derived_random.py", "pipeline/runtime/progress.py"),
    },
    "export": {
        *("pipeline/compute/distributed.py", "pipeline/compute/provenance.py"),
        "pipeline/runtime/progress.py",
    },
}
EXPENSIVE = {"prepare", "teacher", "soft_targets", "baseline", "student", "int8_training"}
#: Each package with those that it may import. Whoever adds an arrow sees here what it runs again.
GROUND = {"runtime"}
DATA = {*GROUND, "data/prepared"}
MODELS = {*DATA, "compute", "views", "networks", "models"}
MAY_IMPORT = {
    "runtime": set(),
    "compute": GROUND,
    "data/prepared": GROUND,
    "data/sources": DATA,
    "views": {*DATA, "compute"},
    "networks": DATA,
    "models": {*DATA, "compute", "views"},
    "training": MODELS,
    "initial_weights": MODELS,
    "teacher": {*MODELS, "training", "initial_weights"},
    "store/format": {*DATA, "views"},
    "store/writing": {*MODELS, "store/format"},
    "store/importing": DATA,
    "store/reading": {*MODELS, "store/format"},
    "students": {*MODELS, "training", "initial_weights"},
    "seeds": {*GROUND, "compute", "students"},
    "distillation": {*GROUND, "compute", "views", "students"},
    "comparison": {*DATA, "comparison/measurement"},
    "comparison/measurement": DATA,
    "comparison/report": {*DATA, "comparison", "comparison/measurement"},
    "export": {*MODELS, "data/sources", "comparison/measurement", "export/running"},
    "export/running": {*DATA, "data/sources", "models", "views"},
    "plan": {*GROUND, "teacher"},  # the teacher's parameters
    "named_files": {
        *(*MODELS, "data/sources", "initial_weights", "store/format", "students", "teacher"),
    },
    "int8_training": {
        *(*MODELS, "training", "students", "distillation", "store/format", "store/reading"),
        "export",  # its parameters
    },
}
STUDENT_SIDE = (
    *("students", "seeds", "distillation", "store/reading", "comparison", "export", "commands"),
    *("int8_training", "stages/int8_training"),
    *(f"stages/{stage}" for stage in ("student", "baseline", "compare", "robustness", "speed")),
    "stages/export",
)


def definition(stage: str) -> dict:
    return STAGES[stage].get("do", STAGES[stage])


def module_of(stage: str) -> str:
    """The module that its command runs."""
    return re.match(r"exec python -m (pipeline\.stages\.\w+)", definition(stage)["cmd"])[1]


def code_dependencies(stage: str) -> set[str]:
    return {path for path in definition(stage)["deps"] if path.startswith("pipeline/")}


def listed(stage: str) -> set[str]:
    """The modules below the folders that the stage lists; its family, which varies, left out."""
    folders = {path for path in code_dependencies(stage) if not path.startswith(FAMILY)}
    assert all((ROOT / path).exists() for path in folders)
    return {file for file in MODULES if {file, *map(str, Path(file).parents)} & folders}


def modules(files: set[str]) -> set[str]:
    return files & MODULES  # without `__init__`, which holds no code


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_what_it_imports(stage):
    imported = modules(closure(module_of(stage)))
    assert imported <= listed(stage)
    assert listed(stage) - imported == BROUGHT_ALONG.get(stage.split("_teacher")[0], set())


def test_no_stage_that_takes_long_depends_on_a_file_that_it_does_not_import():
    assert not EXPENSIVE & BROUGHT_ALONG.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_builds_networks_depends_on_their_families(stage):
    families = {path for path in code_dependencies(stage) if "networks" in path}
    builds = "pipeline/models/spec.py" in closure(module_of(stage))
    assert len(families) == builds


@pytest.mark.parametrize("stage", ["prepare", "teacher", "soft_targets"])
def test_nothing_of_the_students_side_can_run_the_teacher(stage):
    of_students = tuple(f"pipeline/{folder}" for folder in STUDENT_SIDE)
    assert not [file for file in listed(stage) if file.startswith(of_students)]


def test_no_parameter_of_students_runs_the_teacher():
    params = {
        "prepare": ["dataset"],
        "teacher": ["teacher"],
        "soft_targets": ["views", "soft_targets"],
    }
    assert {stage: definition(stage)["params"] for stage in params} == params


def test_nothing_of_int8_training_and_of_the_export_can_run_another_training():
    for stage in EXPENSIVE - {"int8_training"}:
        later = ("pipeline/int8_training", "pipeline/export", "pipeline/stages/export")
        assert not [file for file in listed(stage) if file.startswith(later)]
        assert not [key for key in definition(stage).get("params", []) if "export" in key]
    reading = {
        stage for stage in STAGES if "models/int8/${key}" in definition(stage).get("deps", [])
    }
    assert reading <= {"export"}


def test_every_package_imports_only_what_it_may():
    found = packages_imported_by(MODULES)
    for package, allowed in MAY_IMPORT.items():
        assert found.get(package, set()) <= allowed, package
    assert found.keys() <= {*MAY_IMPORT, "stages", "commands"}


def test_no_package_imports_itself_by_way_of_others():
    def reached(package: str) -> set[str]:
        direct = MAY_IMPORT[package]
        return direct.union(*(reached(other) for other in direct))

    for package in MAY_IMPORT:  # a cycle would never end
        assert package not in reached(package)


@pytest.mark.parametrize("path", sorted(p for p in MODULES if "/networks/" in p))
def test_a_family_imports_nothing_that_its_stages_do_not_depend_on(path):
    imported = modules(closure(path.removesuffix(".py").replace("/", ".")))
    for stage in STAGES:
        if any("networks" in dependency for dependency in code_dependencies(stage)):
            assert imported <= listed(stage) | {path}


def test_a_baseline_depends_on_every_key_of_views_but_the_count():
    named = {key for key in STAGES["baseline"]["do"]["params"] if key.startswith("views.")}
    assert named == {f"views.{key}" for key in ViewsParams.model_fields} - {"views.count"}


@pytest.mark.parametrize("path", sorted(p for p in MODULES if "/stages/" in p or "/commands/" in p))
def test_no_stage_and_no_command_is_imported_by_another_file(path):
    module = path.removesuffix(".py").replace("/", ".")
    importing = [other for other in MODULES - {path} if path in closure_of_file(other)]
    assert not importing, module


def closure_of_file(path: str) -> set[str]:
    return closure(path.removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").rglob("__init__.py")))
def test_every_package_init_is_empty(path: Path):
    assert path.read_text("utf-8") == ""


def test_every_folder_of_code_is_a_package():
    folders = {(ROOT / path).parent for path in MODULES}
    assert all((folder / "__init__.py").is_file() for folder in folders)


PURE = [
    *("distillation/losses", "runtime/derived_random"),
    *("views/policy", "views/rand_augment", "views/resampling"),
    *("comparison/metrics", "comparison/measurement/statistics", "comparison/cache_economics"),
    *("comparison/measurement/corruptions", "comparison/measurement/latency"),
    "comparison/measurement/seeds",
    *("comparison/report/charts", "comparison/report/label_layout"),
]


@pytest.mark.parametrize("path", PURE)
def test_arithmetic_imports_nothing_of_ours_but_arithmetic(path):
    imported = modules(closure(f"pipeline.{path.replace('/', '.')}"))
    assert imported <= {f"pipeline/{pure}.py" for pure in PURE}


def test_parameters_are_checked_without_torch():
    owners = [file for file in sorted(MODULES) if file.endswith("/params.py")]
    lines = [f"import {file.removesuffix('.py').replace('/', '.')}" for file in owners]
    code = "\n".join(["import sys", *lines, "assert 'torch' not in sys.modules"])
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_the_writer_opens_hdf5_for_writing():
    for path in MODULES:
        calls = [
            node
            for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8")))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "h5py.File"
        ]
        modes = {ast.unparse(call.args[1]) for call in calls}
        assert modes <= ({"'w'"} if "/store/writing/" in path else {"'r'"}), path
