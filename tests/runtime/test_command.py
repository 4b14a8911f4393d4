"""A command ends with one line, whatever it lacks."""

from pipeline.runtime.command import run_command

import gc
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from import_closure import ROOT

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 10.56 MiB is free. Of the allocated memory 78.00 GiB is allocated by PyTorch."
)


def raise_cuda() -> None:
    raise CUDA


@pytest.mark.parametrize(
    ("module", "main", "message"),
    [
        (
            "stages.student",
            raise_cuda,
            r"error: too little memory \(CUDA out of memory\. Tried to allocate 20\.00 MiB\. GPU 0 "
            r"has a total capacity of 79\.11 GiB of which 10\.56 MiB is free\); .* Set a lower "
            r"`training\.batch_size`, or this student's own, or end other processes that use it\.",
        ),
        ("stages.teacher", raise_cuda, r".* Set a lower `teacher\.training\.batch_size`, or .*"),
        (
            "stages.soft_targets",
            lambda: torch.empty(10**15),
            r"error: too little memory \(.*tried to allocate 4000000000000000 bytes.*"
            r"Set a lower `soft_targets\.batch_size`, or .*",
        ),
        ("commands.store", lambda: np.empty(10**15), r".*Unable to allocate.* Use a machine .*"),
    ],
)
def test_too_little_memory_is_told_in_one_line_with_the_parameter_to_lower(
    monkeypatch, module, main, message
):
    spec = SimpleNamespace(name=f"pipeline.{module}")
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    with pytest.raises(SystemExit, match=f"^{message}$"):
        run_command(main)


def test_another_error_of_torch_is_no_error_of_memory():
    with pytest.raises(RuntimeError, match="must match"):
        run_command(lambda: torch.ones(2) + torch.ones(3))


def test_the_end_of_a_decoding_process_is_told_in_one_line_in_whatever_line_it_is_noticed():
    def main() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    message = r"error: a process that decodes images has ended \(DataLoader worker \(pid 7\) is .*"
    with pytest.raises(SystemExit, match=message):
        run_command(main)


def test_a_command_whose_reader_has_ended_ends_without_a_word():
    code = "from pipeline.runtime.command import run_command\n"
    code += "run_command(lambda: [print('x' * 100) for _ in range(10_000)])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    assert (process.stderr.read(), process.wait()) == (b"", 128 + signal.SIGPIPE)


def test_a_command_collects_garbage_again_when_it_has_loaded():
    gc.disable()
    seen = []
    try:
        run_command(lambda: seen.append((gc.isenabled(), gc.get_freeze_count() > 0)))
    finally:
        gc.unfreeze()
        gc.enable()
    assert seen == [(True, True)]
