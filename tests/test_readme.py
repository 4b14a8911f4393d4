"""The README's commands work in a clean clone. They take minutes, so they are marked slow."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from import_closure import ROOT


def run(command: str, folder: Path) -> str:
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": f"{folder}/.venv/bin{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_clean_clone_runs_and_swaps_a_student_as_the_readme_says(tmp_path):
    run(f"git clone --quiet {ROOT} clone", tmp_path)
    clone = tmp_path / "clone"
    assert "teacher: test accuracy" in run("make repro", clone)
    assert "Running stage" not in run("make repro", clone)
    readme = (clone / "README.md").read_text("utf-8")
    entry = re.search(r"^      resnet20:\n(?:        .*\n)+", readme, re.MULTILINE)[0]
    params = clone / "params.yaml"
    unindented = re.sub(r"^    ", "", entry, flags=re.MULTILINE)
    params.write_text(params.read_text("utf-8").rstrip() + "\n" + unindented, "utf-8")
    output = run("dvc repro", clone)
    assert set(re.findall(r"Running stage '(.+?)'", output)) == {
        "baseline@resnet20",
        "student@resnet20",
        "robustness@resnet20",
        "speed",
        "export@resnet20",
        "compare",
    }
    assert "resnet20" in run("dvc metrics diff", clone)


DATA = ROOT.parent / "shared/data"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"CIFAR-10 and its checkpoint are not at {DATA}")
def test_a_foreign_teacher_scores_what_its_authors_checkpoint_scores(tmp_path):
    run(f"git clone --quiet {ROOT} clone", tmp_path)
    clone = tmp_path / "clone"
    shutil.copy(DATA / "cifar10_part.tar.gz", clone / "data/raw/cifar10.tar.gz")
    shutil.copy(DATA / "checkpoints/resnet32-d509ac18.th", clone / "models/imported")
    shutil.copy(clone / "docs/examples/option_a_resnet.py", clone / "pipeline/networks")
    shutil.copy(clone / "recipes/cifar10_foreign_teacher.yaml", clone / "params.yaml")
    run(f"{sys.executable} -m pipeline.commands.check", clone)
    run(f"PATH={Path(sys.executable).parent}:$PATH dvc repro teacher", clone)
    metrics = json.loads((clone / "metrics/teacher.json").read_text("utf-8"))
    assert metrics["test_accuracy"] == 0.9263


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"CIFAR-100's archive is not at {DATA}")
def test_the_whole_of_cifar100_is_prepared_from_its_archive_in_little_memory(tmp_path):
    run(f"git clone --quiet {ROOT} clone", tmp_path)
    clone = tmp_path / "clone"
    shutil.copy(DATA / "cifar100.tar.gz", clone / "data/raw")
    shutil.copy(clone / "recipes/cifar100_laptop.yaml", clone / "params.yaml")
    run(f"{sys.executable} -m pipeline.commands.check", clone)
    measured = "from benchmarks.harness import memory_bytes; "
    measured += "from pipeline.stages.prepare import main; main()"
    # Not getrusage's, which includes the peak of the parent process.
    peak = 'print(memory_bytes("VmHWM"))'
    output = run(f"{sys.executable} -c '{measured}; {peak}'", clone).splitlines()
    assert output[-2].startswith(
        "data/prepared: 45,000 train, 5,000 validation, 10,000 test images of 100 classes"
    )
    assert int(output[-1]) < 2**30
