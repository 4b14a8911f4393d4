"""Make the study's projects: a fixed subset of a finished project's images, and its teacher.

The pipeline's stages run in one folder for each policy whose views are cached.
"""

import csv
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import yaml

from pipeline.data.prepared.dataset import open_dataset
from pipeline.data.sources.archives import read_files
from pipeline.runtime.outputs import PREPARED
from pipeline.runtime.params import read_params

ROOT = Path(__file__).resolve().parents[2]
TRAIN_PER_CLASS, VALIDATION_PER_CLASS = 100, 10
FOLDERS = {"train": "train", "validation": "val", "test": "test"}
UNLABELLED = "unlabeled"


def make_projects(source: Path, workspace: Path, cached: dict[str, int], precision: str) -> None:
    """Make `workspace/POLICY/` for each policy, with a store of `cached[POLICY]` views.

    Args:
        source: a project of the pipeline in which `prepare` and `teacher` have run, on an image
            folder or archive.
    """
    here = Path.cwd()
    os.chdir(source)  # stages read parameters from the current folder
    try:
        images = workspace / "images.tar"
        if not images.exists():
            workspace.mkdir(parents=True, exist_ok=True)
            write_subset(images)
        for policy, count in cached.items():
            project = workspace / policy
            if (project / "data/soft_targets/store.json").exists():
                continue
            shutil.rmtree(project, ignore_errors=True)
            shutil.copytree("models/teacher", project / "models/teacher")
            params = read_params()
            params["dataset"] |= {"source": "image_folder", "root": str(images)}
            params["views"] |= {"policy": policy, "count": count, "seed": 0}
            params["soft_targets"] |= {"precision": precision}
            (project / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
            for stage in ("prepare", "soft_targets"):
                run_stage(stage, project)
    finally:
        os.chdir(here)


def run_stage(stage: str, project: Path) -> None:
    command = [sys.executable, "-m", f"pipeline.stages.{stage}"]
    subprocess.run(command, cwd=project, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def write_subset(
    archive: Path, train_per_class: int = TRAIN_PER_CLASS, unlabelled_per_class: int = 0
) -> None:
    """Write a subset of the images of the project in the current folder: the first of each class,
    by sample id, of training and validation, all of test, and `unlabelled_per_class` more of each
    class from training, without their labels."""
    dataset = open_dataset(PREPARED)
    limits = {"train": train_per_class, "validation": VALIDATION_PER_CLASS}
    target: dict[str, str] = {}  # name in the source -> name in the archive
    for name, split in dataset.splits.items():
        taken: Counter[int] = Counter()
        for sample_id, label in sorted(zip(split.sample_ids, split.labels.tolist(), strict=True)):
            if taken[label] < limits.get(name, len(split)):
                target[sample_id] = f"{FOLDERS[name]}/{sample_id.split('/', 1)[1]}"
            elif name == "train" and taken[label] < limits[name] + unlabelled_per_class:
                target[sample_id] = f"{UNLABELLED}/{len(target):06d}{Path(sample_id).suffix}"
            else:
                continue
            taken[label] += 1
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for name, content in read_files(Path(read_params()["dataset"]["root"])):
            if name in target:
                member = tarfile.TarInfo(target[name])
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                del target[name]
    if target:
        raise SystemExit(
            f"{len(target)} images of data/prepared are not in dataset.root; expected all of them. "
            "Run `dvc repro prepare`."
        )
    partial.rename(archive)


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add a finished run to a table of runs."""
    new = not path.exists()
    with open(path, "a", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
