"""docs/soft_targets_format.md is enough to read a store, and to write one for students."""

import ast
import hashlib
import shutil
from pathlib import Path

import foreign
import foreign_views
import h5py
import numpy as np
import pytest
import torch
from conftest import bytes_of, change_params, opened, run_stage
from import_closure import ROOT

from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json
from pipeline.runtime.outputs import TEACHER

STORE = Path("data/soft_targets")
CHECKED_IN = ROOT / "tests/files/store_v2"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (foreign, {"hashlib", "json", "math", "pathlib", "h5py", "numpy", "foreign_views"}),
        (foreign_views, {"math", "re", "numpy", "scipy.special"}),
    ],
)
def test_the_foreign_reader_and_writer_import_none_of_our_code(module, expected):
    source = Path(module.__file__).read_text("utf-8")
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == expected


ENCODINGS = [{}, {"encoding": "top_k", "k": 1}, {"encoding": "top_k", "k": 2}]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_store_is_read_by_the_page_with_hdf5_and_numpy_alone(project, encoding, temperature):
    if encoding:
        change_params("soft_targets", **encoding)
        run_stage("soft_targets")
    store = opened().decoded_at(temperature)
    for split, view in (("train", 0), ("train", 2), ("validation", 0), ("test", 0)):
        labels = open_dataset().splits[split].labels
        theirs = foreign.read(STORE, split, view, labels, temperature)
        logits = store.gather(view, np.arange(len(labels)), split=split).logits.astype(np.float64)
        ours = torch.softmax(torch.from_numpy(logits) / temperature, 1).numpy()
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)


@pytest.mark.parametrize("encoding", [{"encoding": "dense"}, {"encoding": "top_k", "k": 2}])
def test_a_store_that_a_foreign_writer_wrote_by_the_page_trains_a_student(project, encoding):
    """The teacher is not in PyTorch: it knows the labels, and adds noise."""
    dataset, index = open_dataset(), read_json(STORE / "store.json", produced_by="-")
    keys = ("dataset_fingerprint", "teacher_fingerprint", "policy", "seed", "image_size")
    identity = {key: index[key] for key in (*keys, "precision", "num_classes")} | encoding
    rng = np.random.default_rng(0)
    splits = {
        name: (
            split.images,
            split.labels,
            (4 * np.eye(3)[split.labels] + rng.standard_normal((3, len(split), 3))).astype("f4"),
        )
        for name, split in dataset.splits.items()
    }
    before = bytes_of(Path("models/students/small"))
    shutil.rmtree(STORE)
    foreign.write(STORE, identity, list(dataset.class_names), splits, num_views=3)
    rows = opened().gather(1, np.arange(36)).logits
    np.testing.assert_allclose(rows, splits["train"][2][1], rtol=2e-3, atol=2e-3)
    run_stage("student", "small")
    assert bytes_of(Path("models/students/small")) != before


def test_other_rows_under_an_equal_index_train_a_student_anew(project):
    """A writer that measures nothing may be corrected, and write the same index again."""
    run_stage("student", "small")
    before = bytes_of(Path("models/students/small"))
    for shard in STORE.glob("train*.h5"):
        with h5py.File(shard, "r+") as file:
            rows = np.ascontiguousarray(file["logits"][:][:, ::-1])
            file["logits"][...] = rows
            file.attrs["logits_sha256"] = np.bytes_(hashlib.sha256(rows.tobytes()).hexdigest())
    run_stage("student", "small")
    assert bytes_of(Path("models/students/small")) != before


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("logits", np.nan, "its logits are not finite numbers"),
        ("logits", -np.inf, "its logits are not finite numbers"),
        ("values", np.inf, "its values are not finite numbers"),
        ("class_ids", 3, "its class_ids are not 1 different classes of 3"),
    ],
)
def test_invalid_rows_of_a_foreign_writer_are_refused(project, name, number, message):
    if name != "logits":
        change_params("soft_targets", encoding="top_k", k=1)
        run_stage("soft_targets")
    with h5py.File(STORE / "train_view00001_sample000000000.h5", "r+") as file:
        file[name][7, 0] = number
        digest = hashlib.sha256(file[name][:].tobytes()).hexdigest()
        file.attrs[f"{name}_sha256"] = np.bytes_(digest)
    with pytest.raises(UserError, match=f"sample000000000.h5` is wrong in row 7: {message}"):
        run_stage("student", "small")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (slice(0, 2), "its values are not the 2 largest in their order"),
        (slice(2, 3), "its values are not of one logit where the label is among the largest"),
    ],
)
def test_a_row_whose_logits_contradict_each_other_is_refused(project, columns, message):
    change_params("soft_targets", encoding="top_k", k=2)
    run_stage("soft_targets")
    with h5py.File(STORE / "train_view00001_sample000000000.h5", "r+") as file:
        values = file["values"][:]  # the 2 largest, the label's, the tail's two
        values[:, columns] = values[:, columns][:, ::-1] if columns.start == 0 else 9
        file["values"][...] = values
        file.attrs["values_sha256"] = np.bytes_(hashlib.sha256(values.tobytes()).hexdigest())
    with pytest.raises(UserError, match=message):
        opened()


def test_a_row_that_names_a_class_twice_is_refused(project):
    change_params("soft_targets", encoding="top_k", k=2)
    run_stage("soft_targets")
    with h5py.File(STORE / "train_view00001_sample000000000.h5", "r+") as file:
        file["class_ids"][7] = 0b1010  # class 2, and class 2 again
        digest = hashlib.sha256(file["class_ids"][:].tobytes()).hexdigest()
        file.attrs["class_ids_sha256"] = np.bytes_(digest)
    with pytest.raises(UserError, match="its class_ids are not 2 different classes of 3"):
        opened()


@pytest.mark.parametrize("encoding", ["dense", "top_k"])
def test_a_checked_in_store_of_this_format_still_opens_and_trains(project, encoding):
    for name, source in (("prepared", "prepared"), ("soft_targets", encoding)):
        shutil.rmtree(f"data/{name}")
        shutil.copytree(CHECKED_IN / source, f"data/{name}")
    change_params("views", count=2, image_size=8)
    teacher = checkpoint.fingerprint(TEACHER.model, produced_by="-")
    index = read_json(STORE / "store.json", produced_by="-")
    write_json(STORE / "store.json", index | {"teacher_fingerprint": teacher})
    for path in STORE.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["teacher_fingerprint"] = np.bytes_(teacher)
    store, written = opened(), np.load(CHECKED_IN / "logits.npz")
    for split, view in (("train", 0), ("train", 1), ("test", 0)):
        expected = written[f"{split}_view{view:05d}"].astype(np.float16)
        rows = store.gather(view, np.arange(len(expected)), split=split)
        kept = np.ones_like(expected, bool) if rows.kept is None else rows.kept
        assert kept.sum(1).min() >= 2
        assert np.array_equal(rows.logits[kept], expected[kept])
    before = bytes_of(Path("models/students/small"))
    run_stage("student", "small")
    assert bytes_of(Path("models/students/small")) != before
