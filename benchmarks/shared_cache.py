"""Does a store go from one clone to another through an S3 server, pulls killed on the way?

    uv pip install --target /tmp/s3 'moto[server]' dvc-s3
    PYTHONPATH=/tmp/s3 python -m benchmarks.shared_cache

A server of this machine's own (moto, in memory), a bucket as DVC's remote, and two clones of this
project, the second without images. The first runs everything on tiny images and pushes. In the
second, `dvc pull` is killed `--kills` times at random moments; then a new student is trained by
`dvc repro --pull --allow-missing`, everything is pulled, and the bytes of both clones are compared.
Ends with an error where they differ, or where the teacher's weights were fetched for the student.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import yaml

from benchmarks.long_runs import ROOT, write_images, write_params
from pipeline.errors import UserError, reported

OUTPUTS = ("data/prepared", "data/soft_targets", "models", "predictions", "reports")
PULLING = ("repro", "--pull", "--allow-missing")


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server that answers."""
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
            raise UserError("the S3 server does not answer; expected it to within a minute.")
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
        )

    def run(self, *command: str) -> str:
        process = self.start(*command)
        said = process.communicate()[0]
        if process.returncode:
            raise UserError(f"`{' '.join(command)}` failed in `{self.root}`:\n{said}")
        return said

    def dvc(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments)

    def add_student(self) -> None:
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text("utf-8"))
        params["students"]["new"] = params["students"]["small"] | {"training": {"seed": 3}}
        path.write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")

    def outputs(self) -> dict[str, bytes]:
        files = [path for folder in OUTPUTS for path in (self.root / folder).rglob("*.*")]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in files}


def make_origin(root: Path, images: int, address: str) -> Clone:
    """A project in which everything has run, committed, with the server as its remote."""
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
    import boto3  # noqa: PLC0415  (it comes with moto, which this command asks for)

    keys = {"aws_access_key_id": "-", "aws_secret_access_key": "-", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket="shared")


def measure(folder: Path, images: int, kills: int, address: str) -> dict[str, object]:
    make_bucket(address)
    origin = make_origin(folder / "origin", images, address)
    begin = time.perf_counter()
    origin.dvc("push")
    pushed = time.perf_counter() - begin

    other = Clone(folder / "other")
    subprocess.run(["git", "clone", "--quiet", str(origin.root), str(other.root)], check=True)
    moments = random.Random(0)
    for _ in range(kills):
        process = other.start(sys.executable, "-m", "dvc", "pull", "prepare", "soft_targets")
        time.sleep(moments.uniform(0.5, 4))
        process.kill()
        process.communicate()
    for clone in (origin, other):
        clone.add_student()
    begin = time.perf_counter()
    said = other.dvc(*PULLING, "student@new")
    trained = time.perf_counter() - begin
    ran = said.count("Running stage")
    if ran != 1 or (other.root / "models/teacher/weights.safetensors").exists():
        raise UserError(f"expected the new student alone to run, without the teacher:\n{said}")
    other.dvc("pull", "--allow-missing")
    other.dvc(*PULLING)
    origin.dvc("repro")
    expected, found = origin.outputs(), other.outputs()
    differing = sorted(name for name in expected if found.get(name) != expected[name])
    if differing:
        raise UserError(f"{len(differing)} files differ in the two clones: {differing[:5]}")
    return {
        "kills": kills,
        "push_seconds": round(pushed, 1),
        "new_student_seconds": round(trained, 1),
        "files_equal": len(expected),
        "bytes_equal": sum(map(len, expected.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.shared_cache", description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
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
        f"pushed in {found['push_seconds']} s; after {found['kills']} killed pulls a new student "
        f"in {found['new_student_seconds']} s, without images and teacher; "
        f"{found['files_equal']} files, {found['bytes_equal']:,} bytes, equal in both clones"
    )
    print(json.dumps({"benchmark": "shared_cache", **found}))


if __name__ == "__main__":
    with reported():
        main()
