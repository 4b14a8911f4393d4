"""A Python that cannot run the project is named in one message."""

import ast
import subprocess
import sys

import pytest
from import_closure import ROOT

from pipeline.runtime import interpreter

STARTED = [*ROOT.glob("pipeline/stages/*.py"), *ROOT.glob("pipeline/commands/*.py")]


def test_a_python_without_the_packages_is_named_in_one_message(tmp_path):
    bare = [sys.executable, "-S", "-m", "pipeline.stages.teacher"]  # -S: no installed package
    result = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the package `")
    assert f"is missing in {sys.executable} (Python 3." in line
    assert "`. .venv/bin/activate`" in line or "`make --always-make setup`" in line


def test_an_old_python_is_refused_before_it_reads_anything_else(monkeypatch):
    source = (ROOT / "pipeline/runtime/interpreter.py").read_text("utf-8")
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    monkeypatch.setattr(sys, "prefix", "/usr")
    with pytest.raises(SystemExit, match=r"\(Python 3.9.18\) runs .*expected Python 3.11 or newer"):
        exec(compile(source, "interpreter.py", "exec"), {"__name__": "-"})
    tree = ast.parse((ROOT / "pipeline/runtime/command.py").read_text("utf-8"))
    ours = [n for n in tree.body if isinstance(n, ast.ImportFrom) and "pipeline" in n.module]
    assert ours[0].names[0].name == "interpreter"


@pytest.mark.parametrize("path", STARTED, ids=lambda path: path.stem)
def test_an_old_python_reads_every_script_as_far_as_the_message(path):
    for file in (path, ROOT / "pipeline/runtime/command.py", ROOT / interpreter.__file__):
        ast.parse(file.read_text("utf-8"), feature_version=(3, 8))


def test_the_makefile_and_the_package_expect_the_same_python():
    oldest = ".".join(map(str, interpreter.OLDEST))
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    expected = f"sys.version_info < {interpreter.OLDEST}"
    assert expected in (ROOT / "Makefile").read_text("utf-8")
