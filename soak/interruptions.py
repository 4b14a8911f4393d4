"""Interrupt every command, run it again, and compare its outputs with those of an undisturbed run.

    python -m soak.interruptions --kills 200 --seed 0

A small project in a temporary folder, under DVC. SIGKILL, SIGTERM and SIGINT go to every stage run
without DVC, to one of two processes that share a stage, and to `dvc repro` and
`python -m pipeline.commands.repro --jobs 2`: to all of their processes, like Ctrl-C, or to
the first alone. The moments are spread over an undisturbed run from its first to its last. Then the
same command runs again. It must succeed and leave every output with the bytes of the undisturbed
run (`dvc.lock` with its entries, in any order), no process, and no temporary file outside
`.scratch`. On SIGINT and SIGTERM a stage must end with one line. Needs Linux; 200 kills take more
than an hour.
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
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of_file
from soak import common

LIMIT_S = 600  # of one run; none takes a minute on an idle machine
PATIENCE_S = 60  # until all processes of an interrupted run must have ended
FIRST_S = 0.15  # Python itself is starting until then, and ends in its own words
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CLOCKED = common.CLOCKED | {"dvc.lock: speed", "dvc.lock: compare"}
#: DVC's message after a kill while it wrote its files, or if a killed DVC is not collected yet ->
#: the command of docs/reliability.md.
REMEDIES = {
    r"Unable to read RWLock-file|is busy": (sys.executable, "-m", "pipeline.commands.repair_dvc"),
    r"dvc\.lock' (is invalid|validation failed)": ("rm", "dvc.lock"),
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


_COMMANDS = {
    name: (f"pipeline.stages.{stage}", *arguments)
    for name, (stage, *arguments) in common.STAGES.items()
}
STAGES = [
    *(Target(name, command) for name, command in _COMMANDS.items()),
    *(
        Target(f"{name}, one of 2 processes", _COMMANDS[name], "rank")
        for name in ("teacher", "soft_targets", "student")
    ),
]
WHOLE = [
    Target(f"{' '.join(command).rpartition('.')[2]}, {to}", command, to, from_nothing=True)
    for command in (("dvc", "repro"), ("pipeline.commands.repro", "--jobs", "2"))
    for to in ("all", "first")
]


@dataclass
class Row:
    """The results of interrupting one target by one signal."""

    kills: int = 0
    resumed: int = 0  # the next run printed where it resumes
    repaired: int = 0  # DVC's files needed a remedy first
    slowest_s: float = 0.0  # until the last process had ended
    failures: list[str] = field(default_factory=list)


class Project:
    """A project, its runs, and the outputs of an undisturbed run."""

    def __init__(self, folder: Path):
        self._root = folder / "project"
        self._fresh, self._finished = folder / "fresh", folder / "finished"  # states to begin from
        self._temporary = folder / "tmp"  # of all runs, which must leave it empty
        self._fresh.mkdir()
        self.expected: dict[tuple, tuple[dict[str, str], float]] = {}  # outputs and seconds of runs
        common.copy_code(self._fresh)
        common.write_folder(self._fresh / "images", common.images(60, 16))
        common.write_params(self._fresh, common.params(views=12))

    def start(self, target: Target) -> subprocess.Popen:
        settings = {"PROCESSES": str(target.processes), "SHELL": "/bin/sh"}
        settings |= {"TMPDIR": str(self._temporary), "SOAK": str(self._root)}
        with open(self._root / ".output", "wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *target.command],
                cwd=self._root,
                env=common.environment(self._root, **settings),
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

    def living(self) -> list[psutil.Process]:
        """Every process of a run."""
        return [
            process
            for process in psutil.process_iter(["environ"])
            if (process.info["environ"] or {}).get("SOAK") == str(self._root)
        ]

    def kill_all(self) -> None:
        for process in self.living():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def measure(self, target: Target) -> float:
        """Run it undisturbed; keep its outputs and its seconds, and return the seconds."""
        self.begin(target)
        start = time.monotonic()
        if problem := self.run(target):
            raise UserError(f"{target.name}, undisturbed, {problem}")
        seconds = time.monotonic() - start
        self.expected[target.run] = self.outputs(target), seconds
        if not self._finished.exists():
            shutil.copytree(self._fresh, self._finished)
            for name, path in common.files_of(self._root):
                (self._finished / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self._finished / name)
        return seconds

    def begin(self, target: Target) -> None:
        """Restore the state before the target runs: all outputs, or none."""
        for folder in (self._root, self._temporary):
            shutil.rmtree(folder, ignore_errors=True)
        self._temporary.mkdir()
        finished = not target.from_nothing and self._finished.exists()
        shutil.copytree(self._finished if finished else self._fresh, self._root, symlinks=True)

    def outputs(self, target: Target) -> dict[str, str]:
        """The digest of every output, and the entries of dvc.lock if DVC has run, without those
        that depend on a clock."""
        found = {name: sha256_of_file(path) for name, path in common.files_of(self._root)}
        if target.from_nothing:
            stages = yaml.safe_load((self._root / "dvc.lock").read_text("utf-8"))["stages"]
            found |= {f"dvc.lock: {name}": json.dumps(stage) for name, stage in stages.items()}
        return {name: digest for name, digest in found.items() if name not in CLOCKED}

    def strays(self) -> list[str]:
        """Temporary files that runs have left."""
        # torch makes a folder for its compiler's cache in every run that loads the compiler.
        left = [p for p in self._temporary.iterdir() if not p.name.startswith("torchinductor_")]
        scratch = self._root / ".scratch"
        left += [
            path
            for pattern in ("*.partial", "*.sorted")
            for path in self._root.rglob(pattern)
            if not path.is_relative_to(scratch)
        ]
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
        row.kills += 1
        problems = []
        while (left := self.living()) and time.monotonic() < sent + PATIENCE_S:
            process.poll()
            time.sleep(0.02)
        row.slowest_s = max(row.slowest_s, time.monotonic() - sent)
        # DVC ignores SIGINT while a stage runs, and the stage runs to its end.
        if left and not (signum == signal.SIGINT and target.to == "first"):
            problems.append(f"{len(left)} processes lived after {PATIENCE_S} s")
            self.kill_all()
        process.wait(LIMIT_S)
        while self.living():
            time.sleep(0.02)
        if target.to == "all" and not target.from_nothing and sent - start >= FIRST_S:
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
        number, send = process.pid, os.killpg if target.to == "all" else os.kill
        if target.to == "rank":
            ranks: list[psutil.Process] = []
            while not ranks and process.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    ranks = psutil.Process(process.pid).children()
            number = random.choice(ranks).pid if ranks else None
        if process.poll() is None and number is not None:
            with suppress(ProcessLookupError):
                send(number, signum)
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


def soak(project: Project, kills: int, seed: int) -> dict[tuple[str, str], Row]:
    random.seed(seed)
    turns = schedule(kills)
    for target in [WHOLE[0], *(target for target, _ in turns)]:
        if target.run not in project.expected:
            print(f"{target.name}, undisturbed: {project.measure(target):.1f} s", flush=True)
    total, done = Counter(target for target, _ in turns), Counter()
    table: dict[tuple[str, str], Row] = {}
    for number, (target, signum) in enumerate(turns, 1):
        row = table.setdefault((target.name, signum.name), Row())
        # The first and the last moment, and the others spread between.
        share = (done[target] + random.random()) / total[target]
        done[target] += 1
        share = {1: 0.0, total[target]: 0.98}.get(done[target], share)
        before = len(row.failures)
        while not project.interrupt(target, signum, share, row):
            share *= 0.9  # it had ended before
        print(f"{number}/{kills} {target.name} {signum.name} {share:.2f}", flush=True)
        for failure in row.failures[before:]:
            print(failure, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    # A background job ignores Ctrl-C, and its runs would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        try:
            table = soak(project, arguments.kills, arguments.seed)
        finally:
            project.kill_all()
    rows = [
        {"target": name, "signal": signum} | vars(row) | {"failures": len(row.failures)}
        for (name, signum), row in sorted(table.items())
    ]
    common.conclude(
        rows,
        [failure for row in table.values() for failure in row.failures],
        campaign="interruptions",
        seed=arguments.seed,
        kills=sum(row.kills for row in table.values()),
        resumed=sum(row.resumed for row in table.values()),
        repaired=sum(row.repaired for row in table.values()),
        slowest_s=round(max(row.slowest_s for row in table.values()), 2),
    )


if __name__ == "__main__":
    run_command(main)
