"""The command for a GPU runs in small on a CPU, and says what to do without a GPU."""

import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_correctness import Setting, check
from benchmarks.gpu_results import Results
from benchmarks.harness import Interval
from pipeline.runtime.errors import UserError


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *map(str, arguments)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpu.main()


def test_without_a_cuda_device_it_says_what_to_use(folder, monkeypatch):
    with pytest.raises(UserError, match="no CUDA device; .*--device cpu --quick"):
        run(monkeypatch)
    assert not gpu.OUT.exists()


def test_a_finished_part_is_written_at_once_and_not_run_again(folder, monkeypatch):
    calls = []

    def first(_: Setting):
        calls.append("first")
        yield {"side": "ours", "ratio": Interval(1.0, 0.5, 2.0)}
        yield {"side": "theirs", "ms": 1234.0}

    def second(_: Setting):
        assert "| ours   | 1 (0.5 to 2) |" in Path("out/results.md").read_text("utf-8")
        calls.append("second")
        if len(calls) == 2:
            raise RuntimeError("the device is out of memory")
        yield check("pixels", 0, 0)

    monkeypatch.setattr(gpu, "PARTS", {"first": first, "second": second})
    with pytest.raises(UserError, match="second: RuntimeError\n1 problems"):
        run(monkeypatch, "--device", "cpu", "--out", "out")
    run(monkeypatch, "--device", "cpu", "--out", "out")
    assert calls == ["first", "second", "second"]
    page = Path("out/results.md").read_text("utf-8")
    assert "### first" in page
    assert "| pixels  | 0            | 0         | yes     |" in page


def test_results_of_several_machines_stand_beside_each_other(tmp_path):
    for machine in ("one", "two"):
        Results(tmp_path, machine).add("part", [{"side": "ours", "ms": 1}])
    assert Results(tmp_path, "one").parts() == Results(tmp_path, "two").parts() == {"part"}
    assert Results(tmp_path, "three").parts() == set()


def test_a_check_that_does_not_hold_fails_the_command(folder, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {"part": lambda _: [check("pixels", float("nan"), 1)]})
    with pytest.raises(UserError, match="part: pixels"):
        run(monkeypatch, "--device", "cpu", "--out", "out")


def test_it_ends_when_its_minutes_are_over(folder, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {"endless": lambda _: [time.sleep(60)]})
    run(monkeypatch, "--device", "cpu", "--minutes", 1e-4)
    assert not gpu.OUT.exists()


@pytest.mark.slow
def test_every_part_runs_in_small_on_a_cpu(folder, monkeypatch):
    run(monkeypatch, "--device", "cpu", "--quick", "--out", "out", "--minutes", 60)
    results = Results(Path("out"), f"CPU, torch {torch.__version__}, quick")
    assert results.parts() == set(gpu.PARTS)
    page = results.page.read_text("utf-8")
    for checked in ("store of the CPU", "killed and resumed", "two processes share a training"):
        assert checked in page
