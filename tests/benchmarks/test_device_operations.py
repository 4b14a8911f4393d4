"""The training step on an emulated CUDA device, if there is one beside this repository."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from import_closure import ROOT

from benchmarks import device_operations
from benchmarks.device_operations import EMULATOR, columns, counted, kind_of

FILE = Path(os.environ.get("EMULATED_CUDA", EMULATOR))

#: How often a training of two epochs waits or makes a pageable copy, by file, and why.
LISTED = {
    "pipeline/views/loader.py": (2, "images of training and of validation go to the device once"),
    "pipeline/training/divergence.py": (
        4,
        "the loss: its values, at the latest after 50 steps, and its mean, once an epoch each",
    ),
    "pipeline/models/evaluation.py": (2, "logits of the validation: metrics are the host's"),
}


@pytest.fixture(scope="module")
def cases() -> dict:
    if not FILE.is_file() or torch.version.cuda is None or sys.platform != "linux":
        pytest.skip("there is no emulated CUDA device here")
    return counted(ROOT, FILE, "resnet8", 8, 16)


def test_a_training_step_makes_no_pageable_copy_and_does_not_wait_for_the_device(cases):
    for case in ("none", "crop_flip+rand_augment(2,9)", "crop_flip+cutmix(1.0)"):
        assert case in cases["policies"]
    for name, case in (cases["policies"] | cases["losses"]).items():
        found = columns(case)
        assert (found["pageable"], found["waits"]) == (0, 0), (name, case["crossings"])
    # Within an epoch nothing is copied: images, labels and the teacher's rows are on the device.
    assert {columns(cases["policies"][text])["bytes"] for text in ("crop", "none")} == {0}


def test_a_training_waits_and_makes_pageable_copies_only_where_it_is_listed(cases):
    (training,) = cases["training"].values()
    found = Counter()
    for what, place, count, _ in training["crossings"]:
        if kind_of(what) != "pinned":
            found[place.split(":")[0]] += count
    assert found == {file: count for file, (count, _) in LISTED.items()}


def test_crossings_are_counted_by_their_kind():
    crossings = [
        ["H2D pinned non_blocking", "a", 3, 24],
        ["H2D PAGEABLE BLOCKING", "b", 1, 8],
        ["CPU index of a CUDA tensor (hidden H2D)", "c", 1, 8],
        ["host sync: item", "d", 2, 0],
    ]
    found = columns({"operations": 9, "crossings": crossings})
    assert found == {"operations": 9, "pinned": 3, "pageable": 2, "waits": 2, "bytes": 40}


def test_without_an_emulation_the_command_says_what_to_set(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["device_operations", "--emulator", "absent.py"])
    with pytest.raises(SystemExit, match=r"no emulation at `absent.py`: set --emulator"):
        device_operations.main()
