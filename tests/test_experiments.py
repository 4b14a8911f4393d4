"""Own data under DVC, and experiments with it, with the real DVC."""

import shutil
import subprocess
from pathlib import Path

from dvc.repo import Repo
from import_closure import ROOT

OWN = ["data/raw/pets.tar.gz", "models/imported/best.pt"]
IDENTITY = ["-c", "user.name=test", "-c", "user.email=test@example.org"]


def git(root: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", *IDENTITY, *arguments], cwd=root, text=True)


def test_what_dvc_add_tracks_is_pushed_and_a_clone_pulls_it_and_git_sees_no_other_file(
    tmp_path, monkeypatch
):
    """DVC looks for `.dvc` files by another reading of .gitignore than Git's."""
    root = tmp_path / "project"
    for name in (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name in (*OWN, "data/raw/loose/0.png", "data/prepared/a.npy", "models/teacher/b.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "without data")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.chdir(root)
    with Repo() as repo:
        repo.add(OWN)
        with repo.config.edit() as config:
            config["remote"]["shared"] = {"url": str(tmp_path / "remote")}
            config["core"]["remote"] = "shared"
        repo.push()
    untracked = git(root, "ls-files", "--others", "--exclude-standard").split()
    assert untracked == [f"{name}.dvc" for name in OWN]
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "with data")
    git(tmp_path, "clone", "--quiet", str(root), "clone")
    monkeypatch.chdir(tmp_path / "clone")
    with Repo() as repo:
        repo.pull()
    assert [Path(name).read_text() for name in OWN] == OWN
