"""Send a store from one clone to another through an S3 server, and kill pulls on the way.

    uv pip install --target /tmp/s3 'moto[server]' dvc-s3
    PYTHONPATH=/tmp/s3 python -m soak.shared_caches --kills 45 --seed 0

A server on this machine (moto, in memory), a bucket as DVC's remote, and two clones of this
project, the second without images. The first runs everything on tiny images and pushes. In the
second, `--kills` times and with nothing fetched yet, a pull, or a training of a new student that
pulls its inputs, gets SIGKILL, SIGTERM or SIGINT at a random moment. Then the same command runs
again, or the training after the pull. What this leaves out or refuses is counted. After the remedy
of docs/reliability.md every file must be there, with its bytes. At the end both clones make the
student and the comparison, and must hold the same bytes, except in two reports with measured
seconds. A killed pull must never lead to another student than the origin's, and the teacher's
weights must not be fetched for a student.
"""

from pipeline.runtime.command import run_command

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import yaml

from pipeline.runtime.errors import UserError
from soak import common

DVC = (sys.executable, "-m", "dvc")
PULL = ("pull", "--allow-missing")
TRAIN = ("repro", "--pull", "--allow-missing", "student@new")
WAYS = [(PULL, PULL), (PULL, TRAIN), (TRAIN, TRAIN)]  # what is killed, and what runs then
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WEIGHTS = "models/students/new/weights.safetensors"
KEYS = {"AWS_ACCESS_KEY_ID": "-", "AWS_SECRET_ACCESS_KEY": "-", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Start a server with an empty bucket; yields its address."""
    import boto3  # noqa: PLC0415  (installed with moto, which only this command needs)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "moto.server", "-p", address.rpartition(":")[2]]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keys = {"aws_access_key_id": "-", "aws_secret_access_key": "-", "region_name": "us-east-1"}
    try:
        for attempt in range(240):
            with contextlib.suppress(Exception if attempt < 239 else ()):
                boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket="shared")
                break
            time.sleep(0.25)
        yield address
    finally:
        server.terminate()
        server.wait()


class Clone:
    def __init__(self, root: Path):
        self.root = root

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=common.environment(self.root, **KEYS),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str) -> str:
        process = self.start(*command)
        output = process.communicate()[0]
        if process.returncode:
            raise UserError(f"`{' '.join(command)}` failed in `{self.root}`:\n{output}")
        return output

    def dvc(self, *arguments: str) -> str:
        return self.run(*DVC, *arguments)

    def begin(self) -> None:
        """Remove everything that DVC has fetched, and its state; add the new student."""
        self.run("git", "clean", "-ffdxq")
        self.run("git", "checkout", "--quiet", ".")
        self.add_student()

    def add_student(self) -> None:
        params = yaml.safe_load((self.root / "params.yaml").read_text("utf-8"))
        params["students"]["new"] = params["students"]["small"] | {"training": {"seeds": 3}}
        common.write_params(self.root, params)

    def repair(self) -> None:
        """Apply the remedy of docs/reliability.md."""
        for index in (self.root / ".venv/dvc/repo").glob("*/index"):
            shutil.rmtree(index)
        self.dvc(*PULL, "--force")

    def outputs(self) -> dict[str, bytes]:
        """Every output that DVC stores (Git stores the metrics)."""
        files = common.files_of(self.root)
        return {name: path.read_bytes() for name, path in files if not name.startswith("metrics/")}


def make_origin(root: Path, images: int, address: str) -> Clone:
    """Make a project in which everything has run, committed, with the server as its remote."""
    origin = Clone(root)
    subprocess.run(["git", "clone", "--quiet", str(common.ROOT), str(root)], check=True)
    (root / "dvc.lock").unlink(missing_ok=True)
    common.write_folder(root / "images", common.images(images, 8))
    common.write_params(root, common.params(size=8, epochs=2))
    with open(root / ".gitignore", "a", encoding="utf-8") as file:
        file.write("/images\n")
    origin.dvc("repro")
    origin.dvc("remote", "add", "--default", "shared", "s3://shared/cache")
    origin.dvc("remote", "modify", "shared", "endpointurl", address)
    identity = ["-c", "user.name=soak", "-c", "user.email=soak@example.org"]
    origin.run("git", "add", "--all")
    origin.run("git", *identity, "commit", "--quiet", "--message", "finished")
    origin.dvc("push")
    return origin


def differing(expected: Mapping[str, bytes], clone: Clone) -> list[str]:
    found = clone.outputs()
    return sorted(name for name in expected if found.get(name) != expected[name])


def kill_pulls(
    other: Clone, kills: int, seed: int, pushed: Mapping[str, bytes], student: bytes
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Kill commands and repeat them; returns the count of each way and result, and the failures.

    Args:
        pushed: the remote's contents, by path.
        student: the new student's weights from an undisturbed training.
    """
    seconds, counts, failures, choice = {}, Counter(), [], random.Random(seed)
    for command in (PULL, TRAIN):
        other.begin()
        start = time.perf_counter()
        other.dvc(*command)
        seconds[command] = time.perf_counter() - start
    for number in range(kills):
        killed, then = WAYS[number % len(WAYS)]
        other.begin()
        process = other.start(*DVC, *killed)
        time.sleep(choice.uniform(0.2, 1) * seconds[killed])
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, choice.choice(SIGNALS))
        process.communicate()
        again = other.start(*DVC, *then)
        output, problem = again.communicate()[0], ""
        if again.returncode:
            result = "refused"
            problem = "a traceback" if "Traceback" in output else ""
        elif then == TRAIN:
            result = "trained"
            same = (other.root / WEIGHTS).read_bytes() == student
            problem = "" if same else "another student was trained"
        else:
            result = "left out" if differing(pushed, other) else "complete"
        other.repair()
        if names := differing(pushed, other):
            problem = f"after the remedy {len(names)} files differ: {names[:5]}"
        counts[f"{killed[0]}, {then[0]}", result] += 1
        failures += [f"kill {number}: {problem}\n{output}"] if problem else []
        print(f"{number + 1}/{kills} {killed[0]}, {then[0]}: {result} {problem}", flush=True)
    return counts, failures


def train_without_teacher(origin: Clone, other: Clone) -> tuple[list[str], dict[str, bytes]]:
    """Train the new student in the second clone, and make the comparison in both; returns the
    failures, and the files that must be equal."""
    other.begin()
    output = other.dvc(*TRAIN)
    failures = []
    if output.count("Running stage") != 1:
        failures.append(f"expected only the new student to run:\n{output}")
    if (other.root / "models/teacher/weights.safetensors").exists():
        failures.append("the teacher's weights were fetched for a student")
    other.dvc(*PULL)
    other.dvc(*TRAIN[:-1])
    origin.dvc("repro")
    expected = {n: held for n, held in origin.outputs().items() if n not in common.CLOCKED}
    if names := differing(expected, other):
        failures.append(f"{len(names)} files differ in the two clones: {names[:5]}")
    return failures, expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    arguments = parser.parse_args()
    if missing := [name for name in ("moto", "dvc_s3") if find_spec(name) is None]:
        raise UserError(
            f"{', '.join(missing)} cannot be imported. `uv pip install --target /tmp/s3 "
            "'moto[server]' dvc-s3`, and run this with PYTHONPATH=/tmp/s3."
        )
    with tempfile.TemporaryDirectory() as folder, s3_server() as address:
        origin = make_origin(Path(folder, "origin"), arguments.images, address)
        pushed, other = origin.outputs(), Clone(Path(folder, "other"))
        subprocess.run(["git", "clone", "--quiet", str(origin.root), str(other.root)], check=True)
        origin.add_student()
        origin.dvc("repro", "student@new")
        student = (origin.root / WEIGHTS).read_bytes()
        counts, failures = kill_pulls(other, arguments.kills, arguments.seed, pushed, student)
        more, equal = train_without_teacher(origin, other)
    rows = [
        {"killed, then": way, "result": result, "count": count}
        for (way, result), count in sorted(counts.items())
    ]
    common.conclude(
        rows,
        failures + more,
        campaign="shared_caches",
        seed=arguments.seed,
        kills=arguments.kills,
        files_equal=len(equal),
        bytes_equal=sum(map(len, equal.values())),
    )


if __name__ == "__main__":
    run_command(main)
