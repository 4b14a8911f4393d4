"""A clone trains from a store that another clone pushed, without images or teacher."""

import hashlib
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from clone import Clone, committed, stages_run
from conftest import run_stage, write_params
from import_closure import ROOT

FROM_THE_REMOTE = ("dvc", "repro", "--pull", "--allow-missing")
IMAGES = "data/prepared/train_images.npy"
WEIGHTS = "models/teacher/weights.safetensors"
SHARD = "data/soft_targets/train_view00001_sample000000000.h5"


RELIABILITY = (ROOT / "docs/reliability.md").read_text("utf-8")


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def origin(remote: Path, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which everything has run, pushed to the remote."""
    origin = committed(tmp_path_factory)
    with open(origin.root / ".gitignore", "a", encoding="utf-8") as file:
        file.write("/images\n")  # as data/raw/ is
    origin.dvc("remote", "add", "--default", "shared", str(remote))
    origin.commit("finished")
    origin.dvc("push")
    return origin


@pytest.fixture
def other(origin: Clone, remote: Path, tmp_path: Path) -> Clone:
    """A `git clone` of it with another student and a copy of the remote."""
    shutil.copytree(remote, tmp_path / "remote")
    other = Clone(tmp_path / "other")
    other.params = deepcopy(origin.params)
    subprocess.run(["git", "clone", "--quiet", str(origin.root), str(other.root)], check=True)
    other.dvc("remote", "modify", "--local", "shared", "url", str(tmp_path / "remote"))
    add_a_student(other)
    return other


def add_a_student(clone: Clone) -> None:
    clone.params["students"]["new"] = deepcopy(clone.params["students"]["small"])
    clone.params["students"]["new"]["training"] = {"seeds": 3}
    write_params(clone.root, clone.params)


def repro(clone: Clone, *stages: str) -> subprocess.CompletedProcess[str]:
    return clone.dvc_here(*FROM_THE_REMOTE[1:], *stages)


def in_the_remote(clone: Clone, name: str) -> Path:
    """The path in the clone's remote of one of the origin's files."""
    origin = clone.run("git", "remote", "get-url", "origin").stdout.strip()
    digest = hashlib.md5((Path(origin) / name).read_bytes()).hexdigest()
    path = clone.root.with_name("remote") / "files/md5" / digest[:2] / digest[2:]
    path.chmod(0o644)
    return path


def test_a_clone_trains_a_new_student_without_the_images_the_teacher_or_other_students(
    origin, other, monkeypatch
):
    result = repro(other, "student@new")
    assert result.returncode == 0, result.stdout + result.stderr
    assert stages_run(result.stdout) == {"student@new"}
    models = {str(path.relative_to(other.root)) for path in (other.root / "models").rglob("*.*")}
    assert models == {
        "models/imported/none/.gitkeep",
        "models/students/new/family.py",
        "models/students/new/network.json",
        "models/students/new/weights.safetensors",
        "models/teacher/network.json",
    }
    twin = origin.twin(other.root.with_name("twin"))
    add_a_student(twin)
    monkeypatch.chdir(twin.root)
    run_stage("student", "new")
    for name in ("models/students/new/weights.safetensors", "predictions/students/new.safetensors"):
        assert (other.root / name).read_bytes() == (twin.root / name).read_bytes()

    other.dvc("pull", "--allow-missing")
    result = repro(other, "compare")
    assert result.returncode == 0, result.stdout + result.stderr
    of_new = {f"{stage}@new" for stage in ("baseline", "int8_training", "export", "robustness")}
    assert stages_run(result.stdout) == {*of_new, "speed", "compare"}
    assert not stages_run(repro(other, "compare").stdout)


def test_the_page_on_sharing_has_these_commands():
    page = (ROOT / "docs/sharing.md").read_text("utf-8")
    assert f"\n{' '.join(FROM_THE_REMOTE)} student@" in page
    assert "\ndvc pull --allow-missing" in page
    assert "\ndvc push" in page


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (Path.unlink, SHARD, "failed to download"),
        (flip, IMAGES, "`data/prepared` is damaged"),
        (shorten, IMAGES, "`data/prepared/train_images.npy` cannot be read"),
        (flip, SHARD, "is damaged: its logits do not match their checksum"),
        (shorten, SHARD, "is damaged"),
    ],
)
def test_no_student_trains_on_what_a_remote_lost_or_damaged(other, damage, name, message):
    damage(in_the_remote(other, name))
    result = repro(other, "student@new")
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "student@new" not in other.lock()["stages"]


#: DVC that kills itself when its index holds the first of the outputs to fetch.
CUT_OFF = """
import os, signal, sys
from dvc.cli import main
from dvc_data.index import DataIndex

commit, commits = DataIndex.commit, []

def commit_and_die(index):
    commit(index)
    commits.append(index)
    if len(commits) == 2:  # the first commit is of the project's index
        os.kill(os.getpid(), signal.SIGKILL)

DataIndex.commit = commit_and_die
main(sys.argv[1:])
"""


def left_out(origin: Clone, other: Clone) -> set[str]:
    """The files that the remote holds and the other clone lacks."""
    folders = ("data", "models/teacher", "predictions", "reports")
    files = [path for folder in folders for path in (origin.root / folder).rglob("*.*")]
    places = [path.relative_to(origin.root) for path in files]
    return {
        str(place)
        for place in places
        if not (other.root / place).exists()
        or (other.root / place).read_bytes() != (origin.root / place).read_bytes()
    }


def test_what_a_killed_pull_leaves_out_is_named_and_the_documented_remedy_restores_it(
    origin, other
):
    pull = ("pull", "--allow-missing")
    killed = other.run(sys.executable, "-c", CUT_OFF, *pull)
    assert killed.returncode == -signal.SIGKILL
    other.dvc(*pull)  # it prints no warning
    assert WEIGHTS in left_out(origin, other)

    result = repro(other, "export_teacher")
    assert stages_run(result.stdout) == {"export_teacher"}
    for name in ("models/teacher/network.json", WEIGHTS):
        assert f"`{name}` is absent" in result.stderr
        assert f"`dvc pull {name}` if a remote holds it" in result.stderr
        other.dvc("pull", name)
        result = repro(other, "export_teacher")
    assert result.returncode == 0, result.stderr
    assert left_out(origin, other)

    # A kill during a copy leaves this.
    (other.root / "data/prepared/.cut.tmp").write_bytes(b"cut")
    assert "unsaved" in other.dvc_here(*pull).stderr
    assert "rm -rf .venv/dvc/repo/*/index\n      dvc pull --allow-missing --force" in RELIABILITY
    for index in (other.root / ".venv/dvc/repo").glob("*/index"):
        shutil.rmtree(index)
    other.dvc(*pull, "--force")
    assert not left_out(origin, other)


@pytest.mark.slow
def test_a_truncated_file_in_the_clone_is_refused_and_restored_from_its_cache(other):
    assert repro(other, "student@new").returncode == 0
    whole = {name: (other.root / name).read_bytes() for name in (IMAGES, SHARD)}
    for name, content in whole.items():
        shorten(other.root / name)
        result = other.run(sys.executable, "-m", "pipeline.stages.student", "new")
        assert result.returncode != 0
        assert f"`{name}`" in result.stderr
        other.dvc("checkout", "--force", "prepare", "soft_targets")
        assert (other.root / name).read_bytes() == content
