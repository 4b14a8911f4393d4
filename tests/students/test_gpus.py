"""Trainings side by side are spread over the GPUs."""

import os
from pathlib import Path

import pytest

from pipeline.seeds import gpus
from pipeline.seeds.command_line import train_side_by_side
from pipeline.seeds.gpus import SharedGpus, visible_gpus


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        ("2,0", ["2", "0"]),
        (" GPU-8932f937 , MIG-1/2 ", ["GPU-8932f937", "MIG-1/2"]),
        ("1,-1,0", ["1"]),
        ("-1", []),
        ("", []),
    ],
)
def test_the_gpus_are_those_that_the_user_lets_be_seen(monkeypatch, variable, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == names


def test_else_they_are_as_many_as_the_driver_has_files_for(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia2", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpus, "Path", lambda _: tmp_path)
    assert visible_gpus() == ["0", "1"]


def test_each_job_takes_the_gpus_with_the_fewest_jobs_and_gives_them_back():
    shared = SharedGpus(["a", "b", "c"])

    def shown(environment) -> str:
        return environment["CUDA_VISIBLE_DEVICES"]

    with shared.taken(2) as first, shared.taken(1) as second:
        assert [shown(first), shown(second)] == ["a,b", "c"]
        with shared.taken(9) as all_of_them:
            assert sorted(shown(all_of_them).split(",")) == ["a", "b", "c"]
    with shared.taken(1) as again:
        assert shown(again) == "a"
    with SharedGpus([]).taken(1) as nothing:
        assert nothing == {}


#: Ends only if both seeds run at once.
SEED = """
import os, sys, time
seed = int(sys.argv[3])
with open(f"gpu{seed}", "w") as file:
    file.write(os.environ["CUDA_VISIBLE_DEVICES"])
while not os.path.exists(f"gpu{1 - seed}"):
    time.sleep(0.01)
"""


@pytest.mark.parametrize(("processes", "expected"), [("1", {"4", "6"}), ("2", {"4,6"})])
def test_seeds_side_by_side_have_a_gpu_each_or_as_many_as_processes(
    monkeypatch, tmp_path, processes, expected
):
    monkeypatch.chdir(tmp_path)
    Path("seed_process.py").write_text(SEED, "utf-8")
    settings = {"SEED_JOBS": "2", "PROCESSES": processes, "OMP_NUM_THREADS": "1"}
    for name, value in {**settings, "CUDA_VISIBLE_DEVICES": "4,6"}.items():
        monkeypatch.setenv(name, value)
    train_side_by_side("seed_process", "small", [0, 1])
    assert {Path(f"gpu{seed}").read_text("utf-8") for seed in (0, 1)} == expected
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
