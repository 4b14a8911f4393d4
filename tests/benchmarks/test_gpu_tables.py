"""The published pairs on a machine lent for minutes: packed images, a command that continues."""

import io
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import gpu, packed_images
from benchmarks.accuracy import methods, study
from benchmarks.packed_images import pack, unpack
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import PREPARED


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_tables(monkeypatch, project: Path, minutes: float) -> None:
    arguments = ["--device", "cpu", "--quick", "--minutes", str(minutes), "--tables", str(project)]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpu.main()


def test_unpacked_images_are_those_that_were_packed_to_the_bit(project, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_images, "_LONGEST", 100)  # a column has a few images
    parts = pack(project, tmp_path / "parts", part_bytes=9000)
    assert len(parts) > 2
    assert max(path.stat().st_size for path in parts) <= 9000
    with zipfile.ZipFile(io.BytesIO(b"".join(path.read_bytes() for path in parts))) as packed:
        assert sum(name.startswith("train/") for name in packed.namelist()) > 2
    unpack(tmp_path / "parts", tmp_path / "again")
    assert contents(tmp_path / "again" / PREPARED) == contents(PREPARED)
    assert (tmp_path / "again/params.yaml").read_bytes() == Path("params.yaml").read_bytes()


def test_a_part_that_is_missing_or_damaged_is_refused(project, tmp_path):
    parts = pack(project, tmp_path / "parts", part_bytes=3000)
    content = parts[1].read_bytes()
    parts[1].write_bytes(bytes(reversed(content)))
    with pytest.raises(UserError, match="is damaged"):
        unpack(tmp_path / "parts", tmp_path / "again")
    parts[1].unlink()
    with pytest.raises(UserError, match=f"holds {parts[0].name}, .*expected all parts of one"):
        unpack(tmp_path / "parts", tmp_path / "again")
    assert not (tmp_path / "again" / PREPARED).exists()
    with pytest.raises(UserError, match="holds no part"):
        unpack(tmp_path / "nothing", tmp_path / "again")


def test_the_most_wanted_come_first():
    first, *_ = methods.plan(study.BUDGETS["gpu"])
    assert [run.seed for run in first] == [0] * 14 + [1] * 14 + [2] * 14
    labels, kd = first[:2]
    assert (labels.distillation, kd.distillation) == ({}, {"method": "kd"})
    teacher = kd.caches[0].teacher.network.name
    assert (teacher, kd.student.name, kd.epochs) == ("resnet56", "resnet20", 240)


def test_when_its_minutes_are_over_it_says_so(folder, monkeypatch, capfd):
    PREPARED.mkdir(parents=True)
    run_tables(monkeypatch, Path(), 1e-4)
    said = capfd.readouterr().out
    assert "0.0001 minutes are over: run the same command again" in said
    assert "runs.csv` has 0 runs" in said


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_every_run(folder, monkeypatch, capfd):
    for _ in range(20):
        run_tables(monkeypatch, Path("tables"), 1.5)
        if "minutes are over" not in capfd.readouterr().out:
            break
    rows = pd.read_csv("tables/runs.csv")
    assert len(rows) == 28
    assert not rows.duplicated(study.KEY).any()
    assert rows[["torch", "hardware", "seed"]].notna().all(axis=None)
    assert not list(Path("tables").rglob("*.state"))
