"""Interrupt every command, run it again, and compare its outputs with those of an undisturbed run.

    python -m benchmarks.soak_interrupts --kills 200

A small project in a temporary folder, under DVC. SIGKILL, SIGTERM and SIGINT go to every stage run
without DVC, to one of two processes that share a stage, and to `dvc repro` and
`python -m pipeline.commands.train_students --jobs 2`: to all of their processes, like Ctrl-C, or to
the first alone. The moments are spread over an undisturbed run from its first to its last. Then the
same command runs again. It must succeed and leave every output with the bytes of the undisturbed
run (`dvc.lock` with its entries, in any order), no process, and no temporary file outside
`.scratch`. On SIGINT and SIGTERM a stage must end with one line. Exits with code 1 if any of this
fails. Needs Linux; 200 kills take more than an hour.
"""

from pipeline.runtime.command import run_command

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of_file

ROOT = Path(__file__).parents[1]
LIMIT_S = 600  # of one run; none takes a minute on an idle machine
PATIENCE_S = 60  # until all processes of an interrupted run must have ended
FIRST_S = 0.15  # Python itself is starting until then, and ends in its own words
OUTPUTS = ("data/prepared", "data/soft_targets", "models", "predictions", "metrics", "reports")
PARAMS = {
    "dataset": {
        "source": "image_folder",
        "root": "images",
        "storage": "pixels",
        "image_size": 16,
        "channels": 3,
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "split_seed": 0,
    },
    "views": {
        "policy": "crop_flip",
        "rand_augment": "none",
        "mix": "none",
        "count": 12,
        "seed": 0,
        "image_size": 16,
    },
    "teacher": {
        "family": "cifar_resnet",
        "network": "resnet8",
        "weights": "train",
        "checkpoint": "models/imported/none",
        "training": {
            "epochs": 6,
            "batch_size": 8,
            "learning_rate": 0.05,
            "policy": "crop_flip",
            "seed": 0,
        },
    },
    "soft_targets": {"encoding": "dense", "precision": "float32", "batch_size": 16},
    "training": {
        "epochs": 6,
        "batch_size": 16,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "seed": 0,
    },
    "distillation": {
        "method": "kd",
        "temperature": 4.0,
        "soft_label_weight": 0.9,
        "hard_label_weight": 0.1,
    },
    "students": {
        "small": {
            "family": "cifar_resnet",
            "network": "resnet8",
            "training": {},
            "distillation": {},
        }
    },
}


@dataclass(frozen=True)
class Target:
    """A command to interrupt."""

    name: str
    command: tuple[str, ...]  # for `python -m`
    to: str = "all"  # all | first | rank: which of its processes get the signal
    from_nothing: bool = False  # start without any output, cache or lock; else with all outputs

    @property
    def processes(self) -> int:
        return 2 if self.to == "rank" else 1

    @property
    def run(self) -> tuple[tuple[str, ...], int]:
        """Identifies its undisturbed run."""
        return self.command, self.processes


def _stage(name: str, *arguments: str, to: str = "all") -> Target:
    of = {"all": "", "rank": ", one of 2 processes"}[to]
    return Target(name + of, (f"pipeline.stages.{name}", *arguments), to)


STAGES = [
    *(_stage(name) for name in ("prepare", "teacher", "soft_targets", "speed", "compare")),
    *(_stage(name, "small") for name in ("student", "baseline", "robustness", "export")),
    *(_stage(name, to="rank") for name in ("teacher", "soft_targets")),
    _stage("student", "small", to="rank"),
]
WHOLE = [
    Target(f"{name}, {to}", command, to, from_nothing=True)
    for name, command in (
        ("dvc repro", ("dvc", "repro")),
        ("students --jobs 2", ("pipeline.commands.train_students", "--jobs", "2")),
    )
    for to in ("all", "first")
]
#: The outputs of `speed`, and those that show them.
TIMED = {
    *("metrics/speed.json", "reports/index.html", "reports/comparison.md"),
    *("dvc.lock: speed", "dvc.lock: compare"),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: DVC's message after a kill while it wrote its files, or if a killed DVC is not collected yet ->
#: the command of docs/reliability.md.
REMEDIES = {
    r"Unable to read RWLock-file|is busy": (sys.executable, "-m", "pipeline.commands.repair_dvc"),
    r"dvc\.lock' (is invalid|validation failed)": ("rm", "dvc.lock"),
}


@dataclass
class Row:
    """The results of interrupting one target by one signal."""

    kills: int = 0
    resumed: int = 0  # the next run printed where it resumes
    repaired: int = 0  # DVC's files needed a remedy first
    slowest_s: float = 0.0  # until the last process had ended
    failures: list[str] = field(default_factory=list)


def make_project(folder: Path) -> None:
    """Copy the project's code to an empty folder under Git and DVC, and write images of three
    colours."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).splitlines():
        kept = name.startswith(("pipeline/", ".dvc/", ".git", "models/", "data/"))
        if (kept or name in ("dvc.yaml", ".dvcignore")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for label, name in enumerate(("ant", "bee", "cat")):
        (folder / "images/train" / name).mkdir(parents=True)
        for index in range(20):
            rng = np.random.default_rng([label, index])
            pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[:8, :8, label] += 120
            Image.fromarray(pixels).save(folder / f"images/train/{name}/{index:03d}.png")
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS, sort_keys=False), "utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


class Project:
    """A project, its runs, and the outputs of an undisturbed run."""

    def __init__(self, folder: Path):
        self._root, self._reference = folder / "project", folder / "reference"
        self._temporary = folder / "tmp"  # of all runs, which must leave it empty
        for each in (self._root, self._temporary):
            each.mkdir()
        self._mark = f"SOAK_INTERRUPTS={os.getpid()}"
        self.expected: dict[tuple, tuple[dict[str, str], float]] = {}  # outputs and seconds of runs
        make_project(self._root)

    def start(self, target: Target) -> subprocess.Popen:
        name, value = self._mark.split("=")
        settings = {
            name: value,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PROCESSES": str(target.processes),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self._temporary),
            "DVC_SITE_CACHE_DIR": str(self._root / ".venv/dvc"),
            "SHELL": "/bin/sh",
        }
        with open(self._root / ".output", "wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *target.command],
                cwd=self._root,
                env=os.environ | settings,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, target: Target) -> str | None:
        """Run it to its end; returns the problem if it failed."""
        process = self.start(target)
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill_all()
            return f"still ran after {LIMIT_S} s: {self.output()}"
        return None if code == 0 else f"ended with {code}: {self.output()}"

    def output(self) -> str:
        return (self._root / ".output").read_text("utf-8", errors="replace")

    def living(self) -> Iterator[tuple[int, int]]:
        """The id of every process of a run, and of its parent."""
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                    yield int(entry.name), int(parent)

    def kill_all(self) -> None:
        for process, _ in self.living():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def measure(self, target: Target) -> float:
        """Run it undisturbed; keep its outputs and its seconds, and return the seconds."""
        self.begin(target)
        start = time.monotonic()
        if problem := self.run(target):
            raise UserError(f"{target.name}, undisturbed, {problem}")
        seconds = time.monotonic() - start
        self.expected[target.run] = self.outputs(target), seconds
        if not self._reference.exists():
            for folder in OUTPUTS:
                shutil.copytree(self._root / folder, self._reference / folder)
        return seconds

    def begin(self, target: Target) -> None:
        """Restore the state before the target runs: all outputs, or none."""
        for path in self._temporary.iterdir():
            (shutil.rmtree if path.is_dir() else os.unlink)(path)
        for name in (*OUTPUTS, ".scratch"):
            if name != "models":
                shutil.rmtree(self._root / name, ignore_errors=True)
        for name in ("teacher", "students", "baselines", "exported"):
            shutil.rmtree(self._root / "models" / name, ignore_errors=True)
        if target.from_nothing:
            for name in (".dvc/cache", ".dvc/tmp"):
                shutil.rmtree(self._root / name, ignore_errors=True)
            (self._root / "dvc.lock").unlink(missing_ok=True)
        elif self._reference.exists():
            shutil.copytree(self._reference, self._root, dirs_exist_ok=True)

    def outputs(self, target: Target) -> dict[str, str]:
        """The digest of every output, and the entries of dvc.lock if DVC has run, without those
        that depend on a clock."""
        found = {
            str(path.relative_to(self._root)): sha256_of_file(path)
            for folder in OUTPUTS
            for path in (self._root / folder).rglob("*")
            if path.is_file()
        }
        if target.from_nothing:
            stages = yaml.safe_load((self._root / "dvc.lock").read_text("utf-8"))["stages"]
            found |= {f"dvc.lock: {name}": json.dumps(stage) for name, stage in stages.items()}
        return {name: digest for name, digest in found.items() if name not in TIMED}

    def strays(self) -> list[str]:
        """Temporary files that runs have left."""
        # torch makes a folder for its compiler's cache in every run that loads the compiler.
        left = [p for p in self._temporary.iterdir() if not p.name.startswith("torchinductor_")]
        for path in self._root.rglob("*"):
            name = str(path.relative_to(self._root))
            if path.suffix in (".partial", ".sorted") and not name.startswith(".scratch/"):
                left.append(path)
        return [str(path) for path in left]

    def interrupt(self, target: Target, signum: signal.Signals, share: float, row: Row) -> bool:
        """Interrupt a run after this share of its undisturbed time, run it again, and record every
        broken promise. Returns whether it was still running."""
        self.begin(target)
        expected, duration = self.expected[target.run]
        process, start = self.start(target), time.monotonic()
        time.sleep(share * duration)
        if not self._signal(target, process, signum):
            process.wait(LIMIT_S)
            return False
        sent = time.monotonic()
        early = sent - start < FIRST_S
        row.kills += 1
        problems = []
        while list(self.living()) and time.monotonic() < sent + PATIENCE_S:
            process.poll()
            time.sleep(0.02)
        row.slowest_s = max(row.slowest_s, time.monotonic() - sent)
        left = list(self.living())
        # DVC ignores SIGINT while a stage runs, and the stage runs to its end.
        if left and not (signum == signal.SIGINT and target.to == "first"):
            problems.append(f"{len(left)} processes lived after {PATIENCE_S} s")
            self.kill_all()
        process.wait(LIMIT_S)
        while list(self.living()):
            time.sleep(0.02)
        if target.to == "all" and not target.from_nothing and not early:
            problems += self._ending(process.returncode, signum)
        problems += self._run_again(target, row)
        if not problems:
            if (found := self.outputs(target)) != expected:
                names = sorted(n for n in expected | found if expected.get(n) != found.get(n))
                problems.append(f"other bytes in {', '.join(names)}")
            if strays := self.strays():
                problems.append(f"left behind: {', '.join(strays)}")
        moment = f"{target.name}, {signum.name} after {share:.2f} of {duration:.1f} s"
        row.failures += [f"{moment}: {problem}" for problem in problems]
        return True

    def _signal(self, target: Target, process: subprocess.Popen, signum: signal.Signals) -> bool:
        """Send it; returns whether there was a process to receive it."""
        if target.to == "rank":
            ranks: list[int] = []
            while not ranks and process.poll() is None:
                ranks = [number for number, parent in self.living() if parent == process.pid]
            if not ranks:
                return False
            with suppress(ProcessLookupError):
                os.kill(random.choice(ranks), signum)
                return True
            return False
        if process.poll() is not None:
            return False
        with suppress(ProcessLookupError):
            (os.killpg if target.to == "all" else os.kill)(process.pid, signum)
            return True
        return False

    def _ending(self, code: int, signum: signal.Signals) -> list[str]:
        """Problems of how a stage ended: it must print one line, and no traceback."""
        output = self.output()
        if signum == signal.SIGKILL or code == 0:  # 0: it had just finished
            return []
        lines = [line for line in output.splitlines() if line.startswith("interrupted; ")]
        if code == 128 + signum and len(lines) == 1 and "Traceback" not in output:
            return []
        return [f"ended with {code}: {output}"]

    def _run_again(self, target: Target, row: Row) -> list[str]:
        """Run it to its end, with DVC's remedies if needed; returns the problems."""
        for _ in range(3):
            problem = self.run(target)
            output = self.output()
            row.resumed += "resumes" in output
            if problem is None:
                return ["Traceback"] if "Traceback" in output else []
            remedies = [command for words, command in REMEDIES.items() if re.search(words, output)]
            if not (target.from_nothing and remedies):
                break
            for command in remedies:
                subprocess.run(command, cwd=self._root, capture_output=True, check=True)
            row.repaired += 1
        return [f"the next run {problem}"]


def schedule(kills: int) -> list[tuple[Target, signal.Signals]]:
    """Targets and signals in turns; the slow targets in every second turn."""
    turns: list[tuple[Target, signal.Signals]] = []
    turn = 0
    while len(turns) < kills:
        targets = [*STAGES, *(WHOLE if turn % 2 else [])]
        turns += [
            (target, signum)
            for signum in SIGNALS
            for target in targets
            if target.to != "rank" or signum != signal.SIGINT  # a terminal sends it to all
        ]
        turn += 1
    return turns[:kills]


def soak(
    project: Project, kills: int, seed: int, report: Callable[[str], None]
) -> dict[tuple[str, str], Row]:
    moments = random.Random(seed)
    random.seed(seed)
    turns = schedule(kills)
    for target in [WHOLE[0], *(target for target, _ in turns)]:
        if target.run not in project.expected:
            report(f"{target.name}, undisturbed: {project.measure(target):.1f} s")
    counts: dict[Target, int] = {}
    table: dict[tuple[str, str], Row] = {}
    for number, (target, signum) in enumerate(turns, 1):
        row = table.setdefault((target.name, signum.name), Row())
        of = sum(other is target for other, _ in turns)
        position = counts[target] = counts.get(target, 0) + 1
        # The first and the last moment, and the others spread between.
        share = (position - 1 + moments.random()) / of
        share = {1: 0.0, of: 0.98}.get(position, share)
        before = len(row.failures)
        while not project.interrupt(target, signum, share, row):
            share *= 0.9  # it had ended before
        for failure in row.failures[before:]:
            report(failure)
        report(f"{number}/{kills} {target.name} {signum.name} {share:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.soak_interrupts", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    # A background job ignores Ctrl-C, and its runs would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        try:
            table = soak(
                project, arguments.kills, arguments.seed, lambda line: print(line, flush=True)
            )
        finally:
            project.kill_all()
    print(f"{'':33}  signal  kills resumed repaired slowest failed")
    for (name, signum), row in sorted(table.items()):
        print(
            f"{name:33} {signum:>7} {row.kills:6} {row.resumed:7} {row.repaired:8} "
            f"{row.slowest_s:5.1f} s {len(row.failures):6}"
        )
    totals = {
        key: sum(getattr(row, key) for row in table.values())
        for key in ("kills", "resumed", "repaired")
    }
    failures = [failure for row in table.values() for failure in row.failures]
    print(
        json.dumps(
            {
                "benchmark": "soak_interrupts",
                "seed": arguments.seed,
                **totals,
                "slowest_s": round(max(row.slowest_s for row in table.values()), 2),
                "failures": len(failures),
            }
        )
    )
    if failures:
        raise UserError("\n".join([*failures, f"{len(failures)} failures."]))


if __name__ == "__main__":
    run_command(main)
