"""The lock files decide what is installed, and no command uses the network."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path

import pytest
from clone import cloned, stages_run
from conftest import write_params
from dvc.repo import Repo
from import_closure import ROOT

#: Every Python process imports this module first. It records and refuses network access.
GUARD = """
import os, sys

def watch(event, arguments):
    names = event in ("socket.getaddrinfo", "socket.gethostbyname")
    sends = event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple)
    if names or sends:
        with open(os.environ["ATTEMPTS"], "a", encoding="utf-8") as file:
            file.write(f"{event} {arguments}\\n")
        raise OSError("there is no network here")

sys.addaudithook(watch)
"""


def locked(name: str) -> dict[str, str]:
    """Each package of a lock file with its line: version, marker and hashes."""
    text = (ROOT / name).read_text("utf-8").replace("\\\n", " ")
    return {re.match(r"[A-Za-z0-9._-]+", line)[0].lower(): line for line in text.splitlines()}


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-uv.lock"])
def test_every_package_is_locked_to_a_version_and_to_hashes(name):
    for package, line in locked(name).items():
        assert re.match(rf"(?i){re.escape(package)}==[^ ]+ ", line), line
        assert re.search(r" --hash=sha256:[0-9a-f]{64}\b", line), line
        assert "://" not in line


def test_the_lock_has_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["lint"]]
    names = {re.match(r"[A-Za-z0-9._-]+", text)[0].lower() for text in wanted}
    assert names - {project["name"]} <= locked("requirements.lock").keys()


def test_every_installed_package_must_have_a_locked_hash():
    setup = (ROOT / "Makefile").read_text("utf-8").partition("$(READY):")[2].partition("\n\n")[0]
    installs = re.findall(r"pip install (.+?--requirement \S+)", setup.replace("\\\n", ""))
    assert len(installs) == 2
    assert all("--require-hashes" in options for options in installs)


@pytest.fixture
def attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which processes started by the test record network access."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard/sitecustomize.py").write_text(GUARD, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "guard"))
    monkeypatch.setenv("ATTEMPTS", str(tmp_path / "attempts"))
    return tmp_path / "attempts"


def test_the_guard_records_network_access(attempts):
    code = "import urllib.request; urllib.request.urlopen('http://example.org')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode != 0
    assert "example.org" in attempts.read_text("utf-8")


@pytest.mark.parametrize("module", ["export.running.onnx_model", "networks.onnx"])
def test_onnxruntime_sends_no_telemetry(tmp_path, module):
    """It would do so in a thread that Python does not see, and leave files."""
    names = ("CI", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")  # `CI` alone would silence it
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run(
        [sys.executable, "-c", f"import pipeline.{module}, onnxruntime"],
        cwd=ROOT,
        env=environment | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        check=True,
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not (ROOT / ".venv/.ready").exists(), reason="`make setup` was not run here")
def test_no_other_user_can_write_what_dvc_unpickles():
    """DVC's default is a folder in /var/tmp that everybody may write to (CVE-2025-69872)."""
    site = Path(Repo(str(ROOT)).site_cache_dir)
    assert site.is_relative_to(ROOT)
    for folder in (site.parent, site.parent.parent, ROOT):
        assert not folder.stat().st_mode & 0o002, folder


@pytest.mark.slow
def test_the_whole_pipeline_runs_without_a_network_and_uses_none(tmp_path, attempts, monkeypatch):
    alone, trace, home = ["unshare", "--net"], tmp_path / "trace", tmp_path / "home"
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a namespace without network cannot be made here (unshare --net)")
    if shutil.which("strace"):  # sees the threads of libraries
        calls = "trace=connect,sendto,sendmsg,sendmmsg"
        alone += ["strace", "-f", "--seccomp-bpf", "-qq", "-e", calls, "-A", "-o", str(trace)]
        code = "import socket; socket.socket().connect_ex(('127.0.0.1', 1))"
        subprocess.run([*alone, sys.executable, "-S", "-c", code], check=True)
        assert "AF_INET" in trace.read_text("utf-8")
        trace.unlink()
    home.mkdir()
    monkeypatch.delenv("CI", raising=False)  # with it, onnxruntime sends nothing anyway
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    clone = cloned(tmp_path / "clone")
    students = clone.params["students"]
    for name, family, network in (
        ("of_timm", "timm", {"name": "test_resnet"}),
        ("of_torchvision", "torchvision", {"name": "mobilenet_v2", "input_size": 32}),
    ):
        students[name] = deepcopy(students["small"]) | {"family": family, "network": network}
    write_params(clone.root, clone.params)
    for command in (
        ("-m", "pipeline.commands.check"),
        ("-m", "dvc", "repro"),
        ("-m", "pipeline.commands.store", "verify"),
    ):
        result = clone.run(*alone, sys.executable, *command)
        assert result.returncode == 0, result.stdout + result.stderr
        assert not attempts.exists(), attempts.read_text("utf-8")
        assert not trace.exists() or "AF_INET" not in trace.read_text("utf-8")
        assert not list(home.iterdir())
        if "repro" in command:
            assert "student@of_timm" in stages_run(result.stdout)


def test_set_up_says_what_it_downloads_and_fills_as_the_readme_does():
    makefile, readme = ((ROOT / name).read_text("utf-8") for name in ("Makefile", "README.md"))
    said = re.search(r"downloads ([\d.]+ GB) and fills ([\d.]+ GB) of disk", makefile)
    documented = re.search(r"downloads ([\d.]+ GB) .*?fills ([\d.]+ GB) of disk", readme, re.S)
    assert said.groups() == documented.groups()


def test_make_help_lists_every_target_that_a_reader_calls():
    printed = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (targets,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert re.findall(r"^make (\S+) ", printed, re.M) == targets.split()
