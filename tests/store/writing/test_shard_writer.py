"""Equal runs write equal stores; a shard is written whole or not at all."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import bytes_of, change_params, opened, run_stage, small_file_system

from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import TEACHER
from pipeline.store.format import schema
from pipeline.store.format.schema import (
    SHARD_SAMPLES,
    ShardKey,
    StoreIdentity,
    canary_digests,
    shard_keys,
)
from pipeline.store.reading.store import view_of_epoch
from pipeline.store.writing.shard_writer import shard_bytes, write_shard
from pipeline.views.geometry import apply_views, plan_views
from pipeline.views.policy import ViewPolicy

STORE = Path("data/soft_targets")
SHARD = STORE / "train_view00001_sample000000000.h5"


def test_a_repeated_run_writes_the_same_bytes(project):
    before = bytes_of(STORE)
    shutil.rmtree(STORE)
    run_stage("soft_targets")
    assert bytes_of(STORE) == before
    assert len(before) == 3 + 2 + 1  # three views of train; validation and test; the index


def test_the_rows_are_the_teachers_logits_for_the_views(project):
    store, dataset = opened(), open_dataset()
    network, description = checkpoint.load(TEACHER.model, produced_by="-")
    network.eval()
    samples = np.array([5, 0, 30])
    (plan,) = plan_views(ViewPolicy("crop_flip"), 7, 2, [samples], 16, torch.device("cpu"))
    views = apply_views(torch.from_numpy(dataset.splits["train"].images[samples]), plan)
    with torch.inference_mode():
        live = network(description.input.apply(views)).numpy()
    np.testing.assert_allclose(store.gather(2, samples).logits, live, rtol=1e-3, atol=1e-4)
    test_rows = store.gather(0, np.arange(len(dataset.splits["test"])), split="test").logits
    with torch.inference_mode():
        live = network(
            description.input.apply(torch.from_numpy(dataset.splits["test"].images))
        ).numpy()
    np.testing.assert_allclose(test_rows, live, rtol=1e-3, atol=1e-4)


def test_an_hdf5_reader_sees_the_rows_of_the_memory_map(project):
    with h5py.File(SHARD, "r") as file:
        assert file["logits"].chunks is None
        assert np.array_equal(file["logits"][:], opened().gather(1, np.arange(36)).logits)
    assert read_json(STORE / "store.json", produced_by="-")["class_names"] == ["ant", "bee", "cat"]


IDENTITY = StoreIdentity(
    dataset_fingerprint="d" * 64,
    teacher_fingerprint="t" * 64,
    policy="crop_flip",
    seed=0,
    image_size=8,
    encoding="dense",
    precision="float32",
    num_classes=3,
)


def changed(**values: object) -> StoreIdentity:
    return StoreIdentity(**IDENTITY.fields() | values)


KEY = ShardKey("train", 0, 0, 2)
LABELS = np.array([2, 0])
CANARIES = canary_digests(np.zeros((2, 3, 8, 8), np.uint8))


@pytest.mark.parametrize(
    ("value", "printed"), [(np.nan, "nan"), (np.inf, "inf"), (70_000.0, "70000.0")]
)
@pytest.mark.parametrize(("encoding", "k"), [("dense", None), ("top_k", 1)])
def test_logits_that_float16_cannot_hold_are_refused_and_nothing_is_written(
    tmp_path, value, printed, encoding, k
):
    logits = np.array([[0, 1, 2], [3, value, 5]], np.float32)
    identity = changed(encoding=encoding, k=k)
    with pytest.raises(UserError, match=f"logit is {printed} for sample 1 of train, view 0"):
        write_shard(tmp_path / "shard.h5", identity, KEY, logits, LABELS, CANARIES)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small_disk") as folder:
        yield folder


def test_a_full_disk_is_reported_with_the_bytes_needed_and_leaves_nothing(small_disk):
    with pytest.raises(
        UserError, match=r"cannot be written .* needs 1\d\d,\d{3} bytes; .* are free"
    ) as refusal:
        write_shard(
            small_disk / "shard.h5",
            changed(num_classes=4),
            ShardKey("train", 0, 0, 16_384),
            np.zeros((16_384, 4), np.float32),
            np.zeros(16_384, np.int64),
            np.zeros((4, 32), np.uint8),
        )
    assert "No space left" in str(refusal.value)
    assert list(small_disk.iterdir()) == []


ATTRIBUTES = {
    "format_version": 2,
    "dataset_fingerprint": "d" * 64,
    "teacher_fingerprint": "t" * 64,
    "policy": "crop_flip",
    "seed": 0,
    "image_size": 8,
    "precision": "float32",
    "num_classes": 3,
    "split": "train",
    "view": 0,
    "first_sample": 0,
    "num_samples": 2,
    "canaries_sha256": schema.sha256(CANARIES),
}


def attributes_of(path: Path) -> dict[str, int | str]:
    with h5py.File(path, "r") as file:
        return {k: v.decode() if isinstance(v, bytes) else v for k, v in file.attrs.items()}


def test_a_dense_shard_has_every_attribute_of_the_format(tmp_path):
    logits = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_shard(tmp_path / "shard.h5", IDENTITY, KEY, logits, LABELS, CANARIES)
    assert attributes_of(tmp_path / "shard.h5") == ATTRIBUTES | {
        "encoding": "dense",
        "logits_sha256": schema.sha256(logits.astype("<f2")),
    }


def test_a_top_k_shard_has_every_attribute_of_the_format(tmp_path):
    logits = np.arange(6, dtype=np.float32).reshape(2, 3)
    identity = changed(encoding="top_k", k=1)
    write_shard(tmp_path / "shard.h5", identity, KEY, logits, LABELS, CANARIES)
    with h5py.File(tmp_path / "shard.h5", "r") as file:
        ids, values = file["class_ids"][:], file["values"][:]
    assert attributes_of(tmp_path / "shard.h5") == ATTRIBUTES | {
        "encoding": "top_k",
        "k": 1,
        "class_ids_sha256": schema.sha256(ids),
        "values_sha256": schema.sha256(values),
    }
    assert ids.tolist() == [[2], [2]]  # the largest logit's class, in two bits
    tail = np.log(1 + np.e)  # the first row's: its label is its largest, so classes 0 and 1
    np.testing.assert_allclose(values, [[2, 2, tail, 0.5], [5, 3, 4, 4]], rtol=1e-3)


@pytest.mark.parametrize(("encoding", "k"), [("dense", None), ("top_k", 3)])
@pytest.mark.parametrize("num_samples", [1, 5, 3000])
def test_the_size_of_a_shard_is_computed_before_it_is_written(tmp_path, encoding, k, num_samples):
    identity = changed(encoding=encoding, k=k, num_classes=17)
    key = ShardKey("train", 161, 16_384, num_samples)
    labels = np.zeros(num_samples, np.int64)
    logits = np.random.default_rng(0).standard_normal((num_samples, 17), np.float32)
    canaries = np.zeros((min(4, num_samples), 32), np.uint8)
    write_shard(tmp_path / "shard.h5", identity, key, logits, labels, canaries)
    assert shard_bytes(identity, key) == (tmp_path / "shard.h5").stat().st_size


def test_a_full_shard_of_1000_classes_costs_40_bytes_a_row_at_most():
    identity = changed(encoding="top_k", k=10, num_classes=1000, image_size=224)
    key = ShardKey("train", 0, 0, SHARD_SAMPLES)
    assert shard_bytes(identity, key) <= 40 * SHARD_SAMPLES


def test_shards_cover_every_row_once():
    covered = np.zeros((3, 40_000), int)
    for key in shard_keys({"train": 40_000, "test": 5}, num_views=3):
        if key.split == "train":
            covered[key.view, key.first_sample : key.first_sample + key.num_samples] += 1
        assert key.num_samples <= 16_384
    assert (covered == 1).all()


@pytest.mark.parametrize("num_views", [1, 3, 162])
def test_each_cycle_of_epochs_uses_every_cached_view_once_in_another_order(num_views):
    cycles = [
        [view_of_epoch(cycle * num_views + i, num_views, seed=5) for i in range(1, num_views + 1)]
        for cycle in range(2)
    ]
    assert sorted(cycles[0]) == sorted(cycles[1]) == list(range(num_views))
    assert num_views < 100 or cycles[0] != cycles[1]


def test_count_all_caches_each_of_the_162_views_of_a_sample(project, monkeypatch):
    change_params("views", count="all")
    monkeypatch.setattr(
        "pipeline.store.writing.job.shard_logits",  # this tests the views, not the teacher
        lambda job, key: np.zeros((key.num_samples, 3), np.float32),
    )
    run_stage("soft_targets")
    store = opened()
    assert store.num_views == 162
    dataset = open_dataset()
    image = torch.from_numpy(dataset.splits["train"].images[3:4])
    distinct = set()
    for epoch in range(1, 163):
        view = view_of_epoch(epoch, 162, seed=2)
        (plan,) = plan_views(
            ViewPolicy("crop_flip"), 7, view, [np.array([3])], 16, torch.device("cpu")
        )
        distinct.add(apply_views(image, plan).numpy().tobytes())
    assert len(distinct) == 162


def test_views_of_another_size_than_the_prepared_images_are_cached_and_replayed(project):
    change_params("views", image_size=12)
    run_stage("soft_targets")
    assert opened().identity.image_size == 12
    run_stage("student", "small")
    assert checkpoint.load(Path("models/students/small"), produced_by="-")[1].input.size == 12
    assert checkpoint.load(TEACHER.model, produced_by="-")[1].input.size == 16
