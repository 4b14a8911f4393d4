"""The benchmarks run, and their last line is JSON. What they measure is never asserted."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from conftest import write_images

from benchmarks import encodings
from pipeline.encodings import decode, encode
from pipeline.losses import distillation_loss


def summary(name: str, monkeypatch, capsys, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    importlib.import_module(f"benchmarks.{name}").main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_reading_runs(monkeypatch, capsys):
    arguments = ("--samples", "600", "--files", "20", "--pairs", "3")
    found = summary("reading", monkeypatch, capsys, *arguments)
    assert {"numpy_in_memory", "h5py", "top_k_rows_per_second"} < found.keys()


def test_encodings_run(project, monkeypatch, capsys):
    found = summary("encodings", monkeypatch, capsys, "--rows", "60")
    assert "dense" in found["store"]
    assert {"top_k 10, spread", "top_k 10, bucket", "TinyViT 10"} < found["synthetic"].keys()


def test_decoding_runs(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "photographs", per_class=4)
    found = summary("decoding", monkeypatch, capsys, str(tmp_path / "photographs"), "--pairs", "2")
    assert {"original", "quality 90, 256"} < found.keys()
    assert found["original"]["images"] == 8


@pytest.mark.parametrize("k", [1, 10])
def test_the_kl_of_the_benchmark_is_that_of_the_losses(k):
    logits, labels = encodings.synthetic(32, 100)
    found = encodings.of_top_k(logits, labels, k)
    for t in encodings.TEMPERATURES:
        decoded, kept = decode(encode(logits, labels, "top_k", k), labels, 100, temperature=t)
        stored, teacher = (torch.from_numpy(np.float64(x)) for x in (decoded, logits))
        for tail, mask in (("spread", None), ("bucket", torch.from_numpy(kept))):
            loss = distillation_loss(stored, teacher, temperature=t, kept=mask)
            assert found[tail][t][0] == pytest.approx(loss.item() / t**2, rel=1e-6, abs=1e-12)
