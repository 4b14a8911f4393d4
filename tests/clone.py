"""A clone of this project with a small dataset, for real `dvc repro`."""

import contextlib
import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import pytest
import yaml
from conftest import PARAMS, built_once, clone_into, finish_clone, run_module, write_params
from dvc.cli import main as dvc_main
from dvc.output import Output
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError
from dvc.utils.serialize import _yaml
from stage_process import finish, fork, fork_command

from pipeline.runtime.errors import UserError


def stages_run(output: str) -> set[str]:
    return set(re.findall(r"Running stage '(.+?)'", output))


#: Stages and outputs that contain times.
CLOCKED = {"speed", "compare", "metrics/speed.json", "reports/index.html", "reports/comparison.md"}


def timeless(content: dict) -> dict:
    """Outputs, or the stages of a lock, without those that contain times."""
    return {name: value for name, value in content.items() if name not in CLOCKED}


_parsed = lru_cache(_yaml.parse_yaml)


def parse_yaml_once(text: str, path: str, typ: str = "safe") -> object:
    """Parse YAML as DVC does. For one status it parses each file for every stage; that takes most
    of its time."""
    return deepcopy(_parsed(text, path, typ))


@contextlib.contextmanager
def hashed_once() -> Iterator[None]:
    """Let DVC hash each path once while no file changes. For one status it hashes a folder for
    every stage that depends on it; that takes most of its time."""
    hashes: dict[tuple[str, bool], tuple] = {}

    def hashed(output: Output) -> tuple:
        key = output.fs_path, output.use_cache
        if key not in hashes:
            hashes[key] = original(output)
        return hashes[key]

    original = Output._get_hash_meta
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "_get_hash_meta", hashed)
        yield


def run_command_here(executable: str, command: str, **process: object) -> None:
    """Run a stage's command as DVC does, in this process, which has loaded torch."""
    _, _, _, module, *arguments = shlex.split(command)  # exec python -m
    try:
        run_module(module, *arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise StageCmdFailedError(command, 1) from None


def run_command_forked(executable: str, command: str, **process: object) -> None:
    """As `run_command_here`, in a process of its own, with the clone's code."""
    _, _, _, module, *arguments = shlex.split(command)
    print(finish(fork(module, *arguments, PYTHONPATH=os.getcwd())))


class _Watched(io.StringIO):
    """Text in memory that passes each piece on to `see` when it is written."""

    def __init__(self, see: Callable[[str], None]):
        super().__init__()
        self._see = see

    def write(self, text: str) -> int:
        self._see(text)
        return super().write(text)


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
        """Run DVC; return what it printed. A process starts only if stages may run."""
        if arguments[0] == "repro":
            result = self.run(sys.executable, "-m", "dvc", *arguments)
        else:
            result = self.dvc_here(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    @contextlib.contextmanager
    def entered(self) -> Iterator[pytest.MonkeyPatch]:
        """Make the clone the current folder, with the environment of its processes."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._environment().items():
                patch.setenv(name, value)
            patch.chdir(self.root)
            patch.setattr(_yaml, "parse_yaml", parse_yaml_once)
            patch.setattr("dvc.utils.strictyaml.parse_yaml", parse_yaml_once)
            yield patch

    def dvc_here(
        self, *arguments: str, see: Callable[[str], None] = lambda text: None
    ) -> subprocess.CompletedProcess[str]:
        """Run DVC's command line and the stages in this process; seconds less for each.

        The stages run this project's code: for a clone in which none was edited. `see` gets what
        they print when they print it.
        """
        out, err = _Watched(see), io.StringIO()
        with self.entered() as patch:
            patch.setenv("DVC_TEST", "true")  # else DVC restores the stream of its import for JSON
            patch.setattr("dvc.stage.run._run", run_command_here)
            for handler in logging.getLogger("dvc").handlers:  # with the streams of its import
                stream = err if handler.level >= logging.WARNING else out
                patch.setattr(handler, "stream", stream)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = dvc_main(list(arguments))
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    def make_repro(self, jobs: int, *, forked: bool) -> subprocess.CompletedProcess[str]:
        """Run `make repro` with this environment's Python, without setting one up.

        `forked`: run its commands, and the Python processes that they start, as forks of this one.
        """
        write_params(self.root, self.params)
        make = ["make", "--no-print-directory", "--assume-old", ".venv/.ready", "repro"]
        if not forked:
            return self.run(*make, f"JOBS={jobs}")
        commands = self.run(*make, f"JOBS={jobs}", "--dry-run").stdout.splitlines()
        with self.entered() as patch:
            patch.setenv("PYTHONPATH", str(self.root))
            patch.setattr("subprocess.Popen", fork_command)
            done = [
                subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
                for command in commands
            ]
        return subprocess.CompletedProcess(
            make,
            max(each.returncode for each in done),
            "".join(each.stdout for each in done),
            "".join(each.stderr for each in done),
        )

    def twin(self, root: Path | None = None) -> "Clone":
        """Copy the clone, with DVC's cache."""
        twin = Clone(root or self.root.with_name(f"{self.root.name}_twin"))
        shutil.copytree(self.root, twin.root)
        twin.params = deepcopy(self.params)
        return twin

    def repro(self, *targets: str, here: bool = False) -> set[str]:
        """Run `dvc repro`; return the stages that ran, without those restored or skipped.

        `here`: in this process and with this project's code.
        """
        write_params(self.root, self.params)
        output = self.dvc_here("repro", *targets).stdout if here else self.dvc("repro", *targets)
        self.restored = set(re.findall(r"Stage '(.+?)' is cached - skipping run", output))
        return stages_run(output)

    def invalidated(self) -> set[str]:
        """The stages whose dependencies or outputs are not those of the lock; what `dvc status`
        lists, without a process."""
        write_params(self.root, self.params)
        with self.entered(), hashed_once(), Repo() as repo:
            return set(repo.status())

    @contextlib.contextmanager
    def watched(self) -> Iterator[Callable[[], set[str]]]:
        """A function that returns what `invalidated` does, for edits of other files than dvc.yaml,
        dvc.lock and params.yaml: it loads these once."""

        def invalidated() -> set[str]:
            with repo.lock, hashed_once():
                return {stage.addressing for stage in repo.index.stages if stage.status()}

        write_params(self.root, self.params)
        with self.entered(), Repo() as repo:
            yield invalidated

    def plan(self) -> str:
        """What `make plan` prints, without a process."""
        write_params(self.root, self.params)
        printed = io.StringIO()
        with self.entered(), hashed_once(), contextlib.redirect_stdout(printed):
            run_module("pipeline.commands.plan")
        return printed.getvalue()

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
    clone_into(root)
    return Clone(root)


def committed(factory: pytest.TempPathFactory) -> Clone:
    """A clone in which every stage has run, with the lock and the cache that `dvc repro` leaves."""

    def build(root: Path) -> None:
        shutil.copytree(built_once(factory, "clone", finish_clone), root, dirs_exist_ok=True)
        Clone(root).dvc("commit", "--force")

    clone = Clone(built_once(factory, "committed", build))
    clone.params = deepcopy(PARAMS)
    return clone
