"""A clone of this project with a small dataset, for real `dvc repro`."""

import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from conftest import PARAMS, run_every_stage, write_images, write_params
from dvc.repo import Repo
from import_closure import ROOT


def stages_run(output: str) -> set[str]:
    return set(re.findall(r"Running stage '(.+?)'", output))


#: Stages and outputs that contain times.
CLOCKED = {"speed", "compare", "metrics/speed.json", "reports/index.html", "reports/comparison.md"}


def timeless(content: dict) -> dict:
    """Outputs, or the stages of a lock, without those that contain times."""
    return {name: value for name, value in content.items() if name not in CLOCKED}


class Clone:
    """A project under DVC, with the parameters of the last `repro`."""

    def __init__(self, root: Path):
        self.root = root
        self.params = deepcopy(PARAMS)
        self.params["training"]["epochs"] = 1

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the clone, in this environment and with one thread."""
        return subprocess.run(
            command,
            cwd=self.root,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    def start(self, *command: str) -> subprocess.Popen[str]:
        """As `run`, without waiting; `stdout` also has standard error."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        site = {"DVC_SITE_CACHE_DIR": str(self.root / ".venv/dvc")}  # as `make setup` does
        return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | site

    def dvc(self, *arguments: str) -> str:
        """Run DVC; return what it printed."""
        result = self.run(sys.executable, "-m", "dvc", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def make_students(self, jobs: int) -> subprocess.CompletedProcess[str]:
        """Run `make students` with this environment's Python, without setting one up."""
        write_params(self.root, self.params)
        return self.run(
            "make",
            "--no-print-directory",
            "--assume-old",
            ".venv/.ready",
            "students",
            f"JOBS={jobs}",
        )

    def twin(self, root: Path | None = None) -> "Clone":
        """Copy the clone, with DVC's cache."""
        twin = Clone(root or self.root.with_name(f"{self.root.name}_twin"))
        shutil.copytree(self.root, twin.root)
        twin.params = deepcopy(self.params)
        return twin

    def repro(self, *targets: str) -> set[str]:
        """Run `dvc repro`; return the stages that ran, without those restored or skipped."""
        write_params(self.root, self.params)
        output = self.dvc("repro", *targets)
        self.restored = set(re.findall(r"Stage '(.+?)' is cached - skipping run", output))
        return stages_run(output)

    def invalidated(self) -> set[str]:
        """The stages whose dependencies or outputs are not those of the lock; what `dvc status`
        lists, without a process."""
        write_params(self.root, self.params)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._environment().items():
                patch.setenv(name, value)
            patch.chdir(self.root)
            with Repo() as repo:
                return set(repo.status())

    def commit(self, message: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        for command in (["add", "--all"], [*identity, "commit", "--quiet", "-m", message]):
            subprocess.run(["git", *command], cwd=self.root, check=True)

    def lock(self) -> dict:
        return yaml.safe_load((self.root / "dvc.lock").read_text("utf-8"))

    def outputs(self) -> dict[str, bytes]:
        folders = (
            "data/prepared",
            "data/soft_targets",
            "models",
            "predictions",
            "metrics",
            "reports",
        )
        files = [path for folder in folders for path in (self.root / folder).rglob("*.*")]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in files}


def cloned(root: Path) -> Clone:
    """Make a clone in the folder, in which nothing has run."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).splitlines():
        generated = name == "dvc.lock" or name.startswith("metrics/")
        if not generated and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    write_images(root / "images")
    return Clone(root)


def committed(root: Path) -> Clone:
    """Make a clone in the folder in which every stage has run in this process, with the lock and
    the cache that `dvc repro` leaves."""
    clone = cloned(root)
    clone.params = deepcopy(PARAMS)
    run_every_stage(root, clone.params)
    clone.dvc("commit", "--force")
    return clone
