"""DVC's lock file is repaired after a kill, and left alone otherwise."""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from pipeline.commands import repair_dvc


@pytest.mark.parametrize("content", ["", '{"read": {"/a', "{}"])
def test_a_truncated_lock_file_is_removed_and_a_complete_one_stays(folder, content):
    repair_dvc.RWLOCK.parent.mkdir(parents=True)
    repair_dvc.RWLOCK.write_text(content, "utf-8")
    assert bool(repair_dvc.repair_rwlock()) is (content != "{}")
    assert repair_dvc.RWLOCK.exists() is (content == "{}")
    assert not repair_dvc.repair_rwlock()


def test_a_lock_file_of_killed_processes_that_nobody_collects_is_removed(folder):
    """DVC takes the process for a running one; without an init, nobody ever collects it."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as killed:
        killed.kill()
        os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
        ended, ours = ({"pid": pid, "cmd": "dvc repro"} for pid in (killed.pid, os.getpid()))
        repair_dvc.RWLOCK.parent.mkdir(parents=True)
        repair_dvc.RWLOCK.write_text(json.dumps({"read": {"a": [ended]}, "write": {"c": ours}}))
        assert not repair_dvc.repair_rwlock()  # ours is living
        repair_dvc.RWLOCK.write_text(json.dumps({"read": {"a": [ended]}, "write": {"c": ended}}))
        assert repair_dvc.repair_rwlock()
        assert not repair_dvc.RWLOCK.exists()


def test_a_lock_file_that_another_dvc_is_writing_stays(folder):
    repair_dvc.RWLOCK.parent.mkdir(parents=True)
    repair_dvc.RWLOCK.touch()
    with open(repair_dvc.RWLOCK_GUARD, "w", encoding="utf-8") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        assert not repair_dvc.repair_rwlock()
    assert repair_dvc.RWLOCK.exists()
