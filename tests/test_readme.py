"""The README's commands work in a clean clone. They take minutes, so they are marked slow."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from conftest import write_images
from import_closure import ROOT

README = (ROOT / "README.md").read_text("utf-8")


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


class Terminal:
    """One bash for all commands, as a reader's, with a home folder of its own."""

    END = "the commands have ended"

    def __init__(self, folder: Path, home: Path, **environment: str):
        caches = {  # what this machine has downloaded
            "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache/uv")),
            "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache/pip")),
        }
        reader = {f"GIT_{role}_NAME": "A reader" for role in ("AUTHOR", "COMMITTER")}
        reader |= {f"GIT_{role}_EMAIL": "a@example.org" for role in ("AUTHOR", "COMMITTER")}
        self._bash = subprocess.Popen(
            ["bash", "-e"],
            cwd=folder,
            env=os.environ | {"HOME": str(home)} | caches | reader | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, commands: str) -> str:
        """Run commands; return what they print. All must succeed."""
        self._bash.stdin.write(f"{{\n{commands}\n}} </dev/null\necho\necho '{self.END}'\n")
        self._bash.stdin.flush()
        printed = []
        for line in self._bash.stdout:
            if line == f"{self.END}\n":
                return "".join(printed)
            printed.append(line)
        raise AssertionError(f"{commands}\n\n{''.join(printed)}")

    def close(self) -> None:
        self._bash.communicate()


def blocks() -> Iterator[tuple[str, str, str]]:
    """Yield the heading, language and text of each of the README's blocks."""
    for section in README.split("\n## ")[1:]:
        for language, text in re.findall(r"^```(\w+)\n(.*?)\n```$", section, re.M | re.S):
            yield section.partition("\n")[0], language, text


def bring_images_and_teacher(home: Path) -> None:
    """Write what the README's reader owns: images of three classes, and a checkpoint."""
    write_images(home / "pets", size=40)
    shutil.make_archive(str(home / "pets"), "gztar", home / "pets")
    (teacher,) = [
        yaml.safe_load(text)["teacher"] for _, _, text in blocks() if text.startswith("teacher:")
    ]
    network = torchvision.models.get_model(teacher["network"]["name"], num_classes=3)
    torch.save(network.state_dict(), home / Path(teacher["checkpoint"]).name)


def edit_params(path: Path, block: str) -> None:
    """Set the block's keys, as a reader does in an editor."""
    params = yaml.safe_load(path.read_text("utf-8"))
    for section, values in yaml.safe_load(block).items():
        params[section] |= values
    path.write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")


def follow(clone: Path, terminal: Terminal) -> Iterator[tuple[str, str]]:
    """Do what the README's blocks say, in order; yield the heading and the output of each.

    What a block shows after `$ COMMAND` follows in the output, in this order; `...` is the rest."""
    for heading, language, text in blocks():
        if language == "yaml":
            edit_params(clone / "params.yaml", text)
        elif language == "bash":
            yield heading, terminal.run(text)
        elif text.startswith("$ "):
            command, *shown = text.removeprefix("$ ").splitlines()
            output = terminal.run(command)
            lines = iter(output.splitlines())
            assert all(line == "..." or line in lines for line in shown), output
            yield heading, output


def test_the_readme_has_180_lines_at_most_and_marks_what_a_reader_types():
    assert README.count("\n") <= 180
    assert len(list(blocks())) == README.count("```") / 2
    assert {language for _, language, _ in blocks()} == {
        *("bash", "yaml", "python", "text", "mermaid")
    }
    for _, language, text in blocks():
        assert language == "text" or not text.startswith("$ ")
        if language == "bash":
            subprocess.run(["bash", "-nc", text], check=True)


@pytest.mark.slow
def test_a_fresh_clone_does_what_the_readme_says_from_top_to_bottom(tmp_path):
    run(f"git clone --quiet {ROOT} clone", tmp_path)
    clone, home = tmp_path / "clone", tmp_path / "home"
    bring_images_and_teacher(home)
    terminal = Terminal(clone, home)
    check_each_section(clone, terminal)
    terminal.close()


def check_each_section(clone: Path, terminal: Terminal) -> None:
    last_lines = [text.splitlines()[-1] for _, language, text in blocks() if language == "text"]
    after_files = {"speed", "compare"}
    headings = []
    for heading, output in follow(clone, terminal):
        headings.append(heading)
        ran = set(re.findall(r"Running stage '(.+?)'", output))
        kinds = {stage.partition("@")[0] for stage in ran}
        match heading:
            case "First run":
                assert last_lines[0] in output.splitlines()  # counts, which no processor changes
                assert not re.search("Running stage", terminal.run("make repro"))
            case "Your images":
                assert {"prepare", "teacher", "soft_targets", "student", "compare"} <= kinds
                assert "images of 3 classes" in output
            case "Your teacher":
                assert {"teacher", "soft_targets", "student", "compare"} <= kinds
                assert not {"prepare", "baseline"} & kinds
            case "Your student":
                assert {"student@mine", "baseline@mine", "export@mine"} <= ran
                assert all(stage.endswith("@mine") for stage in ran - after_files)
            case "Swap a student":
                stages = ("baseline", "student", "int8_training", "export", "robustness")
                assert ran == {f"{stage}@resnet20" for stage in stages} | after_files
            case "Ship":
                assert len(re.findall(r"^\.scratch/samples/\d_\w+\.png ", output, re.M)) == 4
            case "Compare commits":
                assert re.search(r"students\.resnet20\.gain ", output)
                assert (clone / "dvc_plots/index.html").is_file()
                assert "student" in kinds
                assert not {"prepare", "teacher", "soft_targets", "baseline"} & kinds
    assert headings == [
        *("First run", "Your images", "Your teacher", "Your student"),
        *("Swap a student", "Ship", "Compare commits"),
    ]


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
