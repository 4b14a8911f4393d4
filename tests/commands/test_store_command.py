"""`python -m pipeline.commands.store` describes a store, and finds what is wrong with it."""

import hashlib
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import change_params, run_stage
from stage_process import fork

from pipeline.commands.store import inspect, main, verify
from pipeline.data.prepared.dataset import open_dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import STORE

SHARD = STORE / "train_view00001_sample000000000.h5"
VIEW_0 = STORE / "train_view00000_sample000000000.h5"


@pytest.fixture
def top_k(project: Path) -> None:
    change_params("soft_targets", encoding="top_k", k=1)
    run_stage("soft_targets")


def tamper(name: str, change, shard: Path = SHARD) -> None:
    """Change an array of a shard, and its checksum with it."""
    with h5py.File(shard, "r+") as file:
        array = file[name][:]
        change(array)
        file[name][...] = array
        file.attrs[f"{name}_sha256"] = np.bytes_(hashlib.sha256(array.tobytes()).hexdigest())


def test_inspect_describes_a_store(project, top_k):
    index = read_json(STORE / "store.json", produced_by="-")
    printed = "\n".join(inspect(STORE))
    for key in ("dataset_fingerprint", "teacher_fingerprint"):
        assert index[key] in printed
    assert "crop_flip, seed 7, 16 pixels" in printed
    assert "top_k, k = 1, of 3 classes" in printed
    assert "forward pass in float32" in printed
    assert "train 36 x 3 views, validation 12, test 12: 132 in all, in 5 shards" in printed
    size = sum(path.stat().st_size for path in STORE.glob("*.h5"))
    per_view = sum(path.stat().st_size for path in STORE.glob("train*.h5")) / (3 * 36)
    assert f"{size:,} bytes; {per_view:,.1f} per view of an image, 9 of them its row" in printed
    for key, value in index["fidelity"].items():
        assert f"{key} {value}" in printed
    assert "kl_at_temperature_4" in printed
    rows = [line for line in printed.splitlines() if " sample " in line]
    assert [line.split(":")[0].strip() for line in rows] == [
        "train view 0 sample 0",
        "train view 2 sample 35",
        "validation view 0 sample 0",
        "validation view 0 sample 11",
        "test view 0 sample 0",
        "test view 0 sample 11",
    ]


def test_the_rows_that_inspect_prints_are_the_largest_logits_by_class_name(project):
    with h5py.File(STORE / "train_view00000_sample000000000.h5", "r") as file:
        row = file["logits"][0]
    names = open_dataset().class_names
    shown = ", ".join(f"{names[c]} {row[c]:.2f}" for c in np.argsort(-row))
    assert f"  train view 0 sample 0: {shown}" in list(inspect(STORE))


def test_inspect_shows_the_largest_logit_of_a_top_k_row_whatever_its_label_has(project, top_k):
    before = [line for line in inspect(STORE) if "train view 0 sample 0" in line]
    for sample in range(36):
        tamper("values", lambda values, s=sample: values[s].__setitem__(1, -9), VIEW_0)
    assert [line for line in inspect(STORE) if "train view 0 sample 0" in line] == before


@pytest.mark.parametrize("directory", ["soft_targets", "copy/of/it"])
def test_inspect_needs_neither_dataset_nor_teacher_nor_parameters(
    project, tmp_path, monkeypatch, directory
):
    shutil.copytree(STORE, tmp_path / directory)
    monkeypatch.chdir(tmp_path)
    assert next(inspect(Path(directory))) == f"{directory}: format 2"


def test_verify_accepts_a_sound_store(project):
    verified = verify(STORE, 20, seed=0)
    assert "all 132 rows are as written" in verified
    assert "; 20 of them match the teacher's logits" in verified
    assert "; 108 of them match" in verify(STORE, 9999, seed=0)  # the store has no more


def test_verify_accepts_a_sound_top_k_store(project, top_k):
    assert "108 of them match the teacher's logits" in verify(STORE, 108, seed=0)


def test_verify_names_every_difference_and_exits_with_a_code_that_is_not_0(project):
    SHARD.unlink()
    other = STORE / "train_view00002_sample000000000.h5"
    content = bytearray(other.read_bytes())
    with h5py.File(other, "r") as file:
        content[file["logits"].id.get_offset()] ^= 1
    other.write_bytes(content)
    shutil.copy(
        STORE / "test_view00000_sample000000000.h5",
        STORE / "validation_view00000_sample000000000.h5",
    )
    (STORE / "left_over.h5").touch()
    process = fork("pipeline.commands.store", "verify", "--recompute", "5")
    stdout, stderr = process.communicate()
    assert process.returncode == 1
    assert stdout == ""
    for message in (
        f"`{SHARD}` is absent.",
        f"`{other}` is damaged: its logits do not match their checksum.",
        "`data/soft_targets/validation_view00000_sample000000000.h5` says split test; expected",
        "`data/soft_targets/left_over.h5` is not part of the store",
        "4 differences.",
    ):
        assert message in stderr
    assert "Traceback" not in stderr


def raise_by(amount: float):
    def change(array: np.ndarray) -> None:
        array[17, 0] += amount

    return change


def test_recompute_catches_a_row_that_was_changed_with_its_checksum(project):
    tamper("logits", raise_by(0.1))
    assert "all 132 rows are as written" in verify(STORE, 0, seed=0)
    with pytest.raises(UserError) as refusal:
        verify(STORE, 108, seed=0)
    message = str(refusal.value)
    assert "train view 1 sample 17: the logit of ant is " in message
    assert "1 difference." in message


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (0, "the logit of"),
        (2, "the tail's log-sum-exp is"),
        (3, "the tail's mean is"),
    ],
)
def test_recompute_catches_every_column_of_a_top_k_row(project, top_k, column, message):
    """The columns for k = 1 of 3 classes: largest, label, the tail's log-sum-exp and mean."""
    sample = sample_whose_label_is_the_largest(column > 1)

    def change(array: np.ndarray) -> None:
        array[sample, column] -= 0.5

    tamper("values", change)
    with pytest.raises(UserError, match=f"train view 1 sample {sample}: {message}"):
        verify(STORE, 108, seed=0)


def test_recompute_catches_a_changed_class(project, top_k):
    sample = sample_whose_label_is_the_largest(False)

    label = open_dataset().splits["train"].labels[sample]

    def change(array: np.ndarray) -> None:
        array[sample] = 3 - array[sample] - label  # the third class

    tamper("class_ids", change)
    with pytest.raises(UserError, match=f"train view 1 sample {sample}: "):
        verify(STORE, 108, seed=0)


def sample_whose_label_is_the_largest(wanted: bool) -> int:
    """If wanted, the tail has two classes, so that its mean is not its log-sum-exp."""
    with h5py.File(SHARD, "r") as file:
        largest = file["class_ids"][:, 0]
    is_largest = largest == open_dataset().splits["train"].labels
    return int(np.flatnonzero(is_largest == wanted)[0])


def test_another_seed_recomputes_other_rows(project):
    tamper("logits", raise_by(0.1))
    caught = []
    for seed in range(6):
        try:
            verify(STORE, 30, seed=seed)
        except UserError:
            caught.append(seed)
    assert 0 < len(caught) < 6


def test_recompute_uses_the_precision_of_the_store(project):
    change_params("soft_targets", precision="bfloat16")
    run_stage("soft_targets")
    assert "108 of them" in verify(STORE, 108, seed=0)


def test_a_negative_number_of_rows_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["store", "verify", "--recompute=-3"])
    with pytest.raises(SystemExit) as refusal:
        main()
    assert refusal.value.code == 2
    assert "-3 is not a number of rows; expected 0 or more" in capsys.readouterr().err
