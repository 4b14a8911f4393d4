"""Send a store from one clone to another through an S3 server, and kill pulls on the way.

    uv pip install --target /tmp/s3 'moto[server]' dvc-s3
    PYTHONPATH=/tmp/s3 python -m benchmarks.shared_cache

A server on this machine (moto, in memory), a bucket as DVC's remote, and two clones of this
project, the second without images. The first runs everything on tiny images and pushes. In the
second, `--kills` times and with nothing fetched yet, a pull, or a training of a new student that
pulls its inputs, gets SIGKILL, SIGTERM or SIGINT at a random moment. Then the same command runs
again, or the training after the pull. The benchmark counts what this leaves out or refuses. After
the remedy of docs/reliability.md every file must be there, with its bytes. At the end both clones
make the student and the comparison. Ends with an error if bytes differ (except two reports with
measured seconds), if a killed pull led to another student than the origin's, or if the teacher's
weights were fetched for a student.
"""

from pipeline.runtime.command import run_command

import argparse
import contextlib
import json
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

from benchmarks.long_runs import ROOT, write_images, write_params
from pipeline.runtime.errors import UserError

OUTPUTS = ("data/prepared", "data/soft_targets", "models", "predictions", "reports")
DVC = (sys.executable, "-m", "dvc")
PULL = ("pull", "--allow-missing")
PULLING = ("repro", "--pull", "--allow-missing")
CLOCKED = {"reports/index.html", "reports/comparison.md"}  # contain measured seconds
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WEIGHTS = "models/students/new/weights.safetensors"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Start a server; yields its address when it accepts connections."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.25)
        else:
            raise UserError("the S3 server accepts no connection; expected one within a minute.")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


class Clone:
    def __init__(self, root: Path):
        self.root = root

    def start(self, *command: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "DVC_SITE_CACHE_DIR": str(self.root / ".venv/dvc"),
            "AWS_ACCESS_KEY_ID": "of-this-machine",
            "AWS_SECRET_ACCESS_KEY": "of-this-machine",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *command: str) -> tuple[int, str]:
        """Run a command to its end; returns its exit code and its output."""
        process = self.start(*command)
        output = process.communicate()[0]
        return process.returncode, output

    def run(self, *command: str) -> str:
        code, output = self.finish(*command)
        if code:
            raise UserError(f"`{' '.join(command)}` failed in `{self.root}`:\n{output}")
        return output

    def dvc(self, *arguments: str) -> str:
        return self.run(*DVC, *arguments)

    def forget(self) -> None:
        """Remove everything that DVC has fetched, and its state."""
        self.run("git", "clean", "-ffdxq")
        self.run("git", "checkout", "--quiet", ".")

    def repair(self) -> None:
        """Apply the remedy of docs/reliability.md."""
        for index in (self.root / ".venv/dvc/repo").glob("*/index"):
            shutil.rmtree(index)
        self.dvc(*PULL, "--force")

    def add_student(self) -> None:
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text("utf-8"))
        params["students"]["new"] = params["students"]["small"] | {"training": {"seed": 3}}
        path.write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")

    def outputs(self) -> dict[str, bytes]:
        files = [path for folder in OUTPUTS for path in (self.root / folder).rglob("*.*")]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in files}


def make_origin(root: Path, images: int, address: str) -> Clone:
    """Make a project in which everything has run, committed, with the server as its remote."""
    origin = Clone(root)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
    (root / "dvc.lock").unlink(missing_ok=True)
    write_images(root / "images.tar", images)
    write_params(root, 2)
    with open(root / ".gitignore", "a", encoding="utf-8") as file:
        file.write("/images.tar\n")
    origin.dvc("repro")
    origin.dvc("remote", "add", "--default", "shared", "s3://shared/cache")
    origin.dvc("remote", "modify", "shared", "endpointurl", address)
    identity = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@example.org"]
    origin.run("git", "add", "--all")
    origin.run("git", *identity, "commit", "--quiet", "--message", "finished")
    return origin


def make_bucket(address: str) -> None:
    import boto3  # noqa: PLC0415  (installed with moto, which only this command needs)

    keys = {"aws_access_key_id": "-", "aws_secret_access_key": "-", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket="shared")


def differing(expected: Mapping[str, bytes], clone: Clone) -> list[str]:
    found = clone.outputs()
    return sorted(name for name in expected if found.get(name) != expected[name])


def kill_pulls(
    other: Clone, kills: int, pushed: Mapping[str, bytes], student: bytes
) -> Counter[str]:
    """Kill commands and repeat them; returns the count of each result.

    Args:
        pushed: the remote's contents, by path.
        student: the new student's weights from an undisturbed training.
    """
    train = (*PULLING, "student@new")
    ways = {
        "pull, pull": (PULL, PULL),
        "pull, train": (PULL, train),
        "train, train": (train, train),
    }
    seconds, followed = {}, Counter()
    for command in (PULL, train):
        other.forget()
        other.add_student()
        begin = time.perf_counter()
        other.dvc(*command)
        seconds[command] = time.perf_counter() - begin
    choice = random.Random(0)
    for number in range(kills):
        other.forget()
        other.add_student()
        way = list(ways)[number % len(ways)]
        killed, then = ways[way]
        process = other.start(*DVC, *killed)
        time.sleep(choice.uniform(0.2, 1) * seconds[killed])
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, choice.choice(SIGNALS))
        process.communicate()
        code, output = other.finish(*DVC, *then)
        if code:
            followed[f"{way}: refused"] += 1
            print(output, flush=True)
            if "Traceback" in output:
                raise UserError(f"kill {number} ended with a traceback.")
        elif then == train:
            followed[f"{way}: trained"] += 1
            if (other.root / WEIGHTS).read_bytes() != student:
                raise UserError(f"after kill {number} another student was trained.")
        else:
            followed[f"{way}: {'left out' if differing(pushed, other) else 'complete'}"] += 1
        other.repair()
        if names := differing(pushed, other):
            raise UserError(
                f"after kill {number} and the remedy {len(names)} files differ: {names[:5]}"
            )
        print(f"{number + 1} of {kills}: {dict(followed)}", flush=True)
    return followed


def measure(folder: Path, images: int, kills: int, address: str) -> dict[str, object]:
    make_bucket(address)
    origin = make_origin(folder / "origin", images, address)
    pushed = origin.outputs()
    begin = time.perf_counter()
    origin.dvc("push")
    push_seconds = time.perf_counter() - begin

    other = Clone(folder / "other")
    subprocess.run(["git", "clone", "--quiet", str(origin.root), str(other.root)], check=True)
    origin.add_student()
    origin.dvc("repro", "student@new")
    student = (origin.root / WEIGHTS).read_bytes()
    followed = kill_pulls(other, kills, pushed, student)

    other.forget()
    other.add_student()
    begin = time.perf_counter()
    output = other.dvc(*PULLING, "student@new")
    trained = time.perf_counter() - begin
    ran = output.count("Running stage")
    if ran != 1 or (other.root / "models/teacher/weights.safetensors").exists():
        raise UserError(f"expected only the new student to run, without the teacher:\n{output}")
    other.dvc(*PULL)
    other.dvc(*PULLING)
    origin.dvc("repro")
    expected = {name: held for name, held in origin.outputs().items() if name not in CLOCKED}
    if names := differing(expected, other):
        raise UserError(f"{len(names)} files differ in the two clones: {names[:5]}")
    return {
        "kills": kills,
        "followed": followed,
        "push_seconds": round(push_seconds, 1),
        "new_student_seconds": round(trained, 1),
        "files_equal": len(expected),
        "bytes_equal": sum(map(len, expected.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.shared_cache", description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=45)
    arguments = parser.parse_args()
    missing = [name for name in ("moto", "dvc_s3") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} cannot be imported. `uv pip install --target /tmp/s3 "
            "'moto[server]' dvc-s3`, and run this with PYTHONPATH=/tmp/s3."
        )
    with tempfile.TemporaryDirectory() as name, s3_server() as address:
        found = measure(Path(name), arguments.images, arguments.kills, address)
    print(
        f"pushed in {found['push_seconds']} s; {found['kills']} killed pulls, each complete after "
        f"the remedy; a new student in {found['new_student_seconds']} s, without images and "
        f"teacher; {found['files_equal']} files, {found['bytes_equal']:,} bytes, equal in both "
        "clones"
    )
    print(json.dumps({"benchmark": "shared_cache", **found}))


if __name__ == "__main__":
    run_command(main)
