"""A stage compares the files of code in a folder of code, the files that DVC compares."""

import os
from pathlib import Path

import pytest
from dvc.repo import Repo
from import_closure import ROOT

from pipeline.runtime.errors import UserError
from pipeline.runtime.stage_inputs import StageInputs

DVC_YAML = "stages:\n  measure:\n    cmd: measure\n    deps: [pipeline/networks]\n"


@pytest.fixture
def network(folder: Path) -> Path:
    """The only network of a project whose stage depends on the folder."""
    Path("dvc.yaml").write_text(DVC_YAML, "utf-8")
    Path("params.yaml").write_text("{}\n", "utf-8")
    path = Path("pipeline/networks/small.py")
    path.parent.mkdir(parents=True)
    path.write_text("def build():\n    pass\n", "utf-8")
    return path


def write(path: str | Path, text: str = "") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, "utf-8")


def test_code_that_is_changed_and_restored_does_not_refuse_a_result(network):
    inputs = StageInputs("measure")
    before = network.read_text("utf-8")
    network.write_text("broken", "utf-8")
    network.unlink()
    write(network, before)
    os.utime(network, (1, 1))
    inputs.check()


@pytest.mark.parametrize(
    "disturb",
    [
        lambda path: path.write_text("def build():\n    raise\n", "utf-8"),
        lambda path: path.unlink(),
        lambda path: write(path.with_name("other.py")),
        lambda path: write(path.parent / "deeper/other.py"),
        lambda path: write(path.with_name("classes.txt")),
    ],
    ids=["edited", "removed", "added", "added below", "text that code reads"],
)
def test_code_that_changes_while_a_stage_runs_refuses_its_result(network, disturb):
    inputs = StageInputs("measure")
    disturb(network)
    with pytest.raises(UserError, match="`pipeline/networks` changed while this stage ran"):
        inputs.check()


def test_dvc_and_the_stage_compare_the_same_files(network, monkeypatch):
    code = [
        "small.py",
        "deeper/other.py",
        "__init__.py",
        "classes.txt",
        "page.html",
        "style.css",
        "a.js",
    ]
    others = ["__pycache__/small.cpython-311.pyc", ".small.py.swp", "._small.py", "small.py~"]
    for name in [*code, *others, ".ipynb_checkpoints/small-checkpoint.py", "notes.md"]:
        write(network.parent / name)
    write(".dvcignore", (ROOT / ".dvcignore").read_text("utf-8"))
    Repo.init(no_scm=True)
    with Repo() as repo:
        seen = repo.dvcignore.find(repo.fs, str(Path("pipeline").absolute()))
    (hashes,) = StageInputs("measure")._states.values()
    assert {str(Path(path).relative_to(Path.cwd())) for path in seen} == set(hashes)
    assert set(hashes) == {str(network.parent / name) for name in code}
