"""A killed run resumes, and ends with the bytes of an uninterrupted run."""

import io
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
import torch
from conftest import (
    PARAMS,
    bytes_of,
    change_params,
    opened,
    run_stage,
    small_file_system,
)
from import_closure import ROOT
from stage_process import (
    SCRATCH,
    TORCHRUNS_POPEN,
    finish,
    fork,
    fork_command,
    kill,
    passes,
    resumed,
    shards_in_scratch,
    start,
    start_module,
    wait_for_shards,
)

from pipeline.models import checkpoint
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import TEACHER
from pipeline.store.writing import finished_shards, job

STORE = Path("data/soft_targets")
VIEWS = 40
SHARDS = VIEWS + 2  # validation and test


@pytest.fixture(scope="module")
def uninterrupted(
    finished_project: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The bytes of a store of VIEWS views, written by one process without a break."""
    root = tmp_path_factory.mktemp("uninterrupted") / "project"
    shutil.copytree(finished_project, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        change_params("views", count=VIEWS)
        run_stage("soft_targets")
        return bytes_of(STORE)


def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_an_uninterrupted_run(
    project, uninterrupted
):
    change_params("views", count=VIEWS)
    moments = random.Random(5)
    kept = 0
    for writes in (True, False):
        process = start()
        if writes:
            wait_for_shards(process, kept + moments.randint(1, 8))
            time.sleep(moments.uniform(0, 0.03))
        else:  # while it loads, checks finished shards, or writes
            time.sleep(moments.uniform(0.5, 3))
        kill(process)
        assert len(shards_in_scratch()) >= kept
        kept = len(shards_in_scratch())
    output = finish(start())
    assert resumed(output) == kept > 0
    assert "made again" not in output  # every shard under its final name was whole
    assert bytes_of(STORE) == uninterrupted
    assert not list(SCRATCH.rglob("*.partial"))
    opened()


@pytest.mark.slow
def test_the_number_of_processes_may_change_between_a_kill_and_the_resume(project, uninterrupted):
    change_params("views", count=VIEWS)
    # Not a fork, which has the libraries that earlier tests have loaded: torchrun has not.
    process = start_module("pipeline.stages.soft_targets", PROCESSES="1")
    wait_for_shards(process, 5)
    kill(process)
    kept = len(shards_in_scratch())
    assert 5 <= kept < SHARDS
    assert resumed(finish(start(processes=2))) == kept
    assert bytes_of(STORE) == uninterrupted


def test_a_resumed_run_does_not_ask_the_teacher_for_finished_shards(project, monkeypatch, capsys):
    requested = watch_shards(monkeypatch)
    run_stage("soft_targets")
    assert len(requested) == 5
    shutil.rmtree(STORE)
    requested.clear()
    before = capsys.readouterr().out
    run_stage("soft_targets")
    output = capsys.readouterr().out
    assert requested == []
    assert (resumed(before), passes(before)) == (0, 3 * 36 + 2 * 12)
    assert (resumed(output), passes(output)) == (5, 0)


def watch_shards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the name of each shard whose logits are computed from now on."""
    requested, original = [], job.shard_logits

    def watched(*arguments):
        requested.append(arguments[1].file_name)
        return original(*arguments)

    monkeypatch.setattr(job, "shard_logits", watched)
    return requested


def test_a_shard_is_written_while_the_teacher_runs_for_the_next_one_and_no_further(
    project, monkeypatch
):
    events, next_runs = [], threading.Event()
    compute, write = job.shard_logits, job.write_shard

    def watched_compute(*arguments):
        events.append("compute")
        if events.count("compute") > 1:
            next_runs.set()
        return compute(*arguments)

    def watched_write(*arguments):
        assert next_runs.wait(60)
        write(*arguments)
        events.append("written")

    monkeypatch.setattr(job, "shard_logits", watched_compute)
    monkeypatch.setattr(job, "write_shard", watched_write)
    run_stage("soft_targets")
    assert (events.count("compute"), events.count("written")) == (5, 5)
    for position in range(len(events)):
        before = events[: position + 1]
        assert before.count("compute") - before.count("written") <= 2


def test_an_error_while_a_shard_is_written_ends_the_stage_and_keeps_the_shards_before(
    project, monkeypatch
):
    write = job.write_shard

    def full_disk(path: Path, *arguments):
        if "view00001" in path.name:
            raise UserError("the disk is full")
        write(path, *arguments)

    before = bytes_of(STORE)
    monkeypatch.setattr(job, "write_shard", full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        run_stage("soft_targets")
    assert shards_in_scratch() == {SHARD.replace("00001", "00000")}
    assert not list(SCRATCH.rglob("*.partial"))
    assert bytes_of(STORE) == before


def test_more_views_run_the_teacher_on_the_new_views_alone(project, monkeypatch, capsys):
    run_stage("soft_targets")
    requested = watch_shards(monkeypatch)
    change_params("views", count=5)
    run_stage("soft_targets")
    assert requested == [f"train_view{view:05d}_sample000000000.h5" for view in (3, 4)]
    assert passes(capsys.readouterr().out.rpartition("soft targets:")[2]) == 2 * 36
    more = bytes_of(STORE)
    requested.clear()
    change_params("views", count=3)
    run_stage("soft_targets")
    assert requested == []
    fewer = bytes_of(STORE)
    assert fewer.keys() < more.keys()
    assert all(more[name] == content for name, content in fewer.items() if name != "store.json")
    shutil.rmtree(SCRATCH)
    change_params("views", count=5)
    run_stage("soft_targets")
    assert bytes_of(STORE) == more


def test_the_stage_first_prints_that_it_makes_all_shards_if_none_is_finished(
    project, monkeypatch, capsys
):
    change_params("views", count=2)
    printed = []
    monkeypatch.setattr(
        "pipeline.stages.soft_targets.make_shards",
        lambda *_: printed.append(capsys.readouterr().out) or pytest.skip("printed"),
    )
    with pytest.raises(pytest.skip.Exception):
        run_stage("soft_targets")
    assert STORE.is_dir()  # the store of three views is still there
    assert f"`{SCRATCH}` has no shard of this store: all are made" in printed[0]
    assert passes(printed[0]) == 2 * 36 + 2 * 12


SHARD = "train_view00001_sample000000000.h5"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:1000]), "is damaged and cannot be read"),
        (lambda p: p.write_bytes(b""), "is damaged and cannot be read"),
        (
            lambda p: p.write_bytes(p.with_name(SHARD.replace("1", "2", 1)).read_bytes()),
            "says view 2; expected 1",
        ),
    ],
)
def test_a_damaged_finished_shard_is_reported_and_made_again(
    project, monkeypatch, capsys, damage, message
):
    run_stage("soft_targets")
    expected = bytes_of(STORE)
    damage(next(SCRATCH.glob(f"*/{SHARD}")))
    requested = watch_shards(monkeypatch)
    run_stage("soft_targets")
    assert requested == [SHARD]
    assert message in capsys.readouterr().out
    assert bytes_of(STORE) == expected


def test_a_flipped_bit_anywhere_in_scratch_never_reaches_the_store(project, monkeypatch):
    run_stage("soft_targets")
    expected = bytes_of(STORE)
    shard = next(SCRATCH.glob(f"*/{SHARD}"))
    whole = shard.read_bytes()
    bits = random.Random(3)
    for _ in range(8):
        content = bytearray(whole)
        content[bits.randrange(len(whole))] ^= 1 << bits.randrange(8)
        shard.unlink()  # else the write would change the hard link in the store
        shard.write_bytes(content)
        run_stage("soft_targets")
        rows = opened().gather(1, [0, 17, 35]).logits
        assert bytes_of(STORE)["store.json"] == expected["store.json"]
        assert rows.tobytes() == expected_rows(expected)


def expected_rows(store: dict[str, bytes]) -> bytes:
    with h5py.File(io.BytesIO(store[SHARD]), "r") as file:
        return file["logits"][[0, 17, 35]].tobytes()


CHANGES = {
    "policy": lambda: change_params("views", policy="crop"),
    "encoding": lambda: change_params("soft_targets", encoding="top_k", k=2),
    "precision": lambda: change_params("soft_targets", precision="bfloat16"),
    "batch size": lambda: change_params("soft_targets", batch_size=14),
    "teacher": lambda: (
        change_params("teacher", training=TRAINING | {"seed": 99}),
        run_stage("teacher"),
    ),
}
TRAINING = PARAMS["teacher"]["training"]


@pytest.mark.parametrize("changed", CHANGES)
def test_shards_of_other_inputs_are_not_reused_and_are_removed(
    project, monkeypatch, capsys, changed
):
    run_stage("soft_targets")
    (before,) = SCRATCH.glob("*/")
    CHANGES[changed]()
    requested = watch_shards(monkeypatch)
    capsys.readouterr()
    run_stage("soft_targets")
    assert len(requested) == 5
    assert resumed(capsys.readouterr().out) == 0
    (after,) = SCRATCH.glob("*/")
    assert before != after
    opened()


#: The stage three times, with an edit of the running code after the first and the second.
EDIT_AFTER_RUNS = """
from pathlib import Path
from pipeline.stages import soft_targets

for edited in ("distillation/losses.py", "networks/cifar_resnet.py", "stages/soft_targets.py"):
    soft_targets.main()
    print("a run has ended", flush=True)
    path = Path(soft_targets.__file__).parents[1] / edited
    path.write_text(path.read_text("utf-8") + "# edited\\n", "utf-8")
"""


def test_an_edit_of_the_teachers_network_reuses_nothing(project, tmp_path):
    code = tmp_path / "code"
    shutil.copytree(ROOT / "pipeline", code / "pipeline")
    script = tmp_path / "edit_after_runs.py"
    script.write_text(EDIT_AFTER_RUNS, "utf-8")
    runs = finish(fork(script, PYTHONPATH=str(code))).split("a run has ended")[:-1]
    assert [resumed(run) for run in runs] == [0, 5, 0]


@pytest.fixture
def other_disk(project: Path) -> Iterator[Path]:
    with small_file_system(project / ".scratch") as folder:
        yield folder


def test_finished_shards_are_copied_if_they_cannot_be_linked(other_disk):
    expected = bytes_of(STORE)
    shutil.rmtree(STORE)
    run_stage("soft_targets")
    assert bytes_of(STORE) == expected
    assert len(shards_in_scratch()) == 5


def test_a_store_that_cannot_fit_is_refused_before_the_teacher_runs(other_disk, monkeypatch):
    change_params("views", count=VIEWS)
    requested = watch_shards(monkeypatch)
    before = bytes_of(STORE)
    with pytest.raises(UserError, match=r"need 2\d\d,\d{3} bytes in `.scratch/soft_targets`, but"):
        run_stage("soft_targets")
    assert requested == []
    assert bytes_of(STORE) == before


def test_the_announced_bytes_are_the_size_of_the_shards(project, capsys):
    run_stage("soft_targets")
    size = sum(path.stat().st_size for path in STORE.glob("*.h5"))
    assert f"; {size:,} bytes to write, " in capsys.readouterr().out


def overflow_the_teacher() -> None:
    network, description = checkpoint.load(TEACHER.model, produced_by="-")
    with torch.no_grad():
        network.fc.weight.zero_()
        network.fc.bias.zero_()[0] = 1e6  # and the others 0: no number that all share
    checkpoint.save(TEACHER.model, network, description)


@pytest.mark.slow
def test_a_failing_process_ends_the_run_with_its_message_and_without_a_traceback(project):
    overflow_the_teacher()
    before = bytes_of(STORE)
    process = start(processes=2)
    stderr = process.communicate()[1]
    assert process.returncode == 1
    assert "error: the teacher's logit is 1000000" in stderr
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) <= 2  # both processes may have reached the error
    assert bytes_of(STORE) == before


def test_a_killed_process_ends_the_run_with_a_message_that_names_the_signal(project, monkeypatch):
    monkeypatch.setattr(TORCHRUNS_POPEN, fork_command)
    change_params("views", count=VIEWS)
    process = start(processes=2)
    wait_for_shards(process, 3)
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    stderr = process.communicate()[1]
    assert process.returncode == 1
    assert "of 2 was ended by SIGKILL" in stderr
    assert "Traceback" not in stderr
    assert len(shards_in_scratch()) >= 3


def test_processes_end_if_their_launcher_is_killed_while_they_load(project):
    process = start(processes=2)
    children = ["pgrep", "-P", str(process.pid), "-f", "stages.soft_targets"]
    ranks: list[str] = []
    while len(ranks) < 2:
        listing = subprocess.run(children, capture_output=True, text=True, check=False)
        ranks = listing.stdout.split()
    os.kill(process.pid, signal.SIGKILL)  # they still import for seconds
    process.communicate(timeout=60)  # returns when both have ended and closed the output


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5", "²"])
def test_a_bad_number_of_processes_is_refused(project, monkeypatch, count):
    monkeypatch.setenv("PROCESSES", count)
    with pytest.raises(UserError, match=f"PROCESSES is `{count}`; expected the number"):
        run_stage("soft_targets")


def test_two_runs_at_once_are_refused(project):
    with (
        finished_shards.exclusive(),
        pytest.raises(UserError, match="another run of this stage has locked"),
    ):
        run_stage("soft_targets")


def test_a_k_above_the_number_of_classes_is_refused(project):
    change_params("soft_targets", encoding="top_k", k=4)
    with pytest.raises(UserError, match=r"soft_targets.k` is 4, but the dataset has 3 classes"):
        run_stage("soft_targets")


def test_the_index_holds_the_fidelity_and_the_size_of_the_rows(project):
    fidelity = read_json(STORE / "store.json", produced_by="-")["fidelity"]
    size = sum(path.stat().st_size for path in STORE.glob("train_*.h5"))
    assert '"rows": 108,' in (STORE / "store.json").read_text("utf-8")  # a whole number
    assert fidelity["bytes_per_row"] == round(size / (3 * 36), 2)
    assert fidelity["agreement"] == 1
    assert all(0 <= fidelity[f"kl_at_temperature_{t}"] < 1e-6 for t in (1, 2, 4))
    change_params("soft_targets", encoding="top_k", k=1)
    run_stage("soft_targets")
    sparse = read_json(STORE / "store.json", produced_by="-")["fidelity"]
    assert sparse["kl_at_temperature_1"] > fidelity["kl_at_temperature_1"]
