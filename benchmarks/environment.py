"""What does the environment of requirements.lock cost to download and on disk?

    python -m benchmarks.environment

Asks the package index for the size of each file that `make setup` would download to this platform,
and adds up the bytes of `.venv` if it is there. Downloads no package.
"""

import subprocess
import tempfile
import tomllib
from pathlib import Path

from packaging.markers import Marker
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

GPU = ("nvidia-", "cuda-", "triton")  # torch's libraries for CUDA


def locked_packages() -> list[dict]:
    """The packages of the lock for this platform, as uv writes them with the sizes of files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pylock.toml")
        compile_lock = ["uv", "pip", "compile", "requirements.lock", "--universal", "--quiet"]
        subprocess.run([*compile_lock, "--format", "pylock.toml", "-o", path], check=True)
        packages = tomllib.loads(path.read_text("utf-8"))["packages"]
    return [p for p in packages if "marker" not in p or Marker(p["marker"]).evaluate()]


def download_bytes(package: dict, tags: dict) -> int:
    """The bytes of the package's best wheel for this platform, or of its source."""
    sizes = {}
    for wheel in package.get("wheels", []):
        name = wheel.get("name") or wheel["url"].rsplit("/", 1)[1].replace("%2B", "+")
        ranks = [tags[tag] for tag in parse_wheel_filename(name)[3] if tag in tags]
        if ranks:
            sizes[min(ranks)] = wheel["size"]
    return sizes[min(sizes)] if sizes else package["sdist"]["size"]


def main() -> None:
    tags = {tag: rank for rank, tag in enumerate(sys_tags())}
    sizes = {package["name"]: download_bytes(package, tags) for package in locked_packages()}
    gpu = sum(size for name, size in sizes.items() if name.startswith(GPU))
    print(f"download: {sum(sizes.values()) / 1e9:.1f} GB, {len(sizes)} packages")
    print(f"  of which for GPUs: {gpu / 1e9:.1f} GB")
    if Path(".venv").is_dir():
        files = (path.lstat() for path in Path(".venv").resolve().rglob("*"))
        used = sum({(s.st_dev, s.st_ino): s.st_blocks * 512 for s in files}.values())
        print(f".venv: {used / 1e9:.1f} GB on disk")


if __name__ == "__main__":
    main()
