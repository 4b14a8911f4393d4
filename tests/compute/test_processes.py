"""Processes wait for one another as long as it takes, and tell what went wrong as what it is."""

import os
import socket
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from ranks import results_of_two

from pipeline.compute import distributed
from pipeline.compute.distributed import ProcessGroup
from pipeline.runtime.errors import UserError


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(distributed, "_PATIENCE", 0)
    monkeypatch.setattr(distributed, "_COMPUTING", distributed.timedelta(seconds=3))


def test_a_wait_for_the_main_process_outlasts_the_time_limit_of_the_computation():
    def run(group: ProcessGroup) -> list[object]:
        with group.main_process_first():
            time.sleep(4 * group.is_main)
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        return [group.broadcast(group.rank), *group.gather(group.rank), total.item()]

    assert results_of_two(run) == [[0, 0, 1, 2.0]] * 2


def test_a_hang_in_the_computation_ends_with_a_message():
    def run(group: ProcessGroup) -> None:
        with group.report_peer_failure():
            if group.is_main:
                torch.distributed.all_reduce(torch.ones(1))
            time.sleep(4)

    assert results_of_two(run)[0].startswith(
        "UserError: another process of this run has ended or does not answer ("
    )


def test_a_peer_that_has_ended_is_told_as_that():
    def run(group: ProcessGroup) -> None:
        if not group.is_main:
            os._exit(1)
        group.gather(None)

    message, nothing = results_of_two(run)
    assert nothing is None
    assert message.startswith("UserError: another process of this run has ended or does not")
    assert "by peer" in message


class _Unpicklable:
    def __reduce__(self):
        raise RuntimeError("an error of its own")


def test_an_error_of_the_process_itself_keeps_its_text():
    def run(group: ProcessGroup) -> None:
        if group.is_main:
            group.broadcast(_Unpicklable())

    assert results_of_two(run)[0] == "RuntimeError: an error of its own"


def test_the_main_process_is_the_first_to_say_that_memory_is_short(monkeypatch):
    waits = []
    monkeypatch.setattr(distributed, "time", SimpleNamespace(sleep=waits.append))

    def run(group: ProcessGroup) -> list[float]:
        with suppress(RuntimeError), group.report_peer_failure():
            torch.empty(10**15)
        return waits

    assert results_of_two(run) == [[], [0]]


def test_processes_that_cannot_connect_are_told_where_to_look(monkeypatch):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody listens
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(bound.getsockname()[1])}
        for name, value in {**address, "WORLD_SIZE": "2", "RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        message = r"cannot connect by gloo \(The client socket has timed out .*127\.0\.0\.1, \d+\)"
        with pytest.raises(UserError, match=message), distributed.process_group():
            pass


@pytest.mark.parametrize(
    ("devices", "nccl", "message"),
    [
        (1, True, "torchrun started 2 processes on this machine, but it has 1 CUDA devices; .*"),
        (2, False, "this PyTorch was built without NCCL, by which several processes use GPUs; .*"),
    ],
)
def test_too_few_gpus_and_no_nccl_are_refused_before_a_gpu_is_used(
    monkeypatch, devices, nccl, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), distributed.process_group():
        pass
