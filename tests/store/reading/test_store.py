"""Every way to read soft targets returns the same rows."""

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import change_params, opened, run_stage
from import_closure import ROOT
from torch.utils.data import DataLoader

from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section
from pipeline.store.format.encodings import decode, encode
from pipeline.store.format.schema import StoreIdentity, canary_samples, shard_keys
from pipeline.store.reading.index import read_index
from pipeline.store.reading.store import Store, open_shards, open_store
from pipeline.store.writing.shard_writer import write_index, write_shard
from pipeline.views.params import ViewsParams

SAMPLES, VIEWS, CLASSES = 40_000, 3, 5  # a view has three shards
SIZES = {"train": SAMPLES, "validation": 7}


def logits_of(split: str, view: int) -> np.ndarray:
    rng = np.random.default_rng([view, len(split)])
    return rng.standard_normal((SIZES[split], CLASSES), dtype=np.float32)


def labels_of(split: str) -> np.ndarray:
    return np.random.default_rng(9).integers(-1, CLASSES, SIZES[split])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One store of each encoding, with several shards a view."""
    root = tmp_path_factory.mktemp("stores")
    for encoding, k in (("dense", None), ("top_k", 2)):
        identity = StoreIdentity(
            dataset_fingerprint="d" * 64,
            teacher_fingerprint="t" * 64,
            policy="crop",
            seed=0,
            image_size=8,
            encoding=encoding,
            k=k,
            precision="float32",
            num_classes=CLASSES,
        )
        for key in shard_keys(SIZES, VIEWS):
            rows = slice(key.first_sample, key.first_sample + key.num_samples)
            write_shard(
                root / encoding / key.file_name,
                identity,
                key,
                logits_of(key.split, key.view)[rows],
                labels_of(key.split)[rows],
                np.zeros((len(canary_samples(key)), 32), np.uint8),
            )
        write_index(root / encoding, identity, list("abcde"), SIZES, VIEWS, {})
    return {encoding: root / encoding for encoding in ("dense", "top_k")}


def opened_at(directory: Path) -> Store:
    labels = {split: labels_of(split) for split in SIZES}
    return open_shards(directory, read_index(directory), labels).decoded_at(4.0)


@pytest.fixture(params=["dense", "top_k"])
def store(request, directories) -> Store:
    return opened_at(directories[request.param])


def expected(store: Store, samples: np.ndarray, views: np.ndarray) -> np.ndarray:
    """The same rows, encoded and decoded in memory."""
    rows = np.stack([logits_of("train", view) for view in range(VIEWS)])[views, samples]
    labels, identity = labels_of("train")[samples], store.identity
    arrays = encode(rows, labels, identity.encoding, identity.k)
    return decode(arrays, labels, CLASSES, temperature=4.0)[0]


BATCHES = {
    "across shard boundaries": np.array([16_383, 16_384, 32_767, 32_768, 0, 39_999]),
    "in any order": np.random.default_rng(1).permutation(SAMPLES)[:500],
    "repeated": np.array([20_000, 5, 20_000, 39_999, 5, 5]),
    "one": np.array([16_384]),
    "a whole view": np.arange(SAMPLES),
    "none": np.array([], np.int64),
}


@pytest.mark.parametrize("name", BATCHES)
def test_any_samples_of_a_view_are_gathered_in_the_requested_order(store, name):
    samples = BATCHES[name]
    for view in range(VIEWS):
        gathered = store.gather(view, samples)
        assert gathered.logits.shape == (len(samples), CLASSES)
        wanted = expected(store, samples, np.full(len(samples), view))
        assert np.array_equal(gathered.logits, wanted)


def test_any_pairs_of_sample_and_view_are_gathered_in_the_requested_order(store):
    rng = np.random.default_rng(2)
    samples, views = rng.integers(0, SAMPLES, 700), rng.integers(0, VIEWS, 700)
    assert np.array_equal(
        store.gather_pairs(samples, views).logits, expected(store, samples, views)
    )


def test_the_classes_that_a_top_k_row_keeps_are_returned_with_it(directories):
    labels = {split: labels_of(split) for split in SIZES}
    store = open_shards(directories["top_k"], read_index(directories["top_k"]), labels)
    samples = np.arange(100)
    kept = store.gather(1, samples).kept
    rows, row_labels = logits_of("train", 1)[samples].astype(np.float16), labels["train"][samples]
    largest = np.argsort(-rows, axis=1, kind="stable")[:, :2]
    wanted = np.zeros_like(kept)
    np.put_along_axis(wanted, largest, True, 1)
    labelled = row_labels >= 0
    wanted[labelled, row_labels[labelled]] = True
    assert np.array_equal(kept, wanted)


def test_validation_and_test_are_read_by_their_names(store):
    rows = store.gather(0, np.arange(7), split="validation").logits
    kept = logits_of("validation", 0).argmax(1)
    assert np.array_equal(rows.argmax(1), kept)


@pytest.mark.parametrize(
    ("samples", "views", "message"),
    [
        ([0, SAMPLES], [0, 0], f"sample {SAMPLES} of {SAMPLES}"),
        ([0, -1], [0, 0], "sample -1"),
        ([0, 1], [0, VIEWS], f"view {VIEWS} of {VIEWS}"),
        ([0, 1], [-1, 0], "view -1"),
    ],
)
def test_a_sample_or_view_that_does_not_exist_is_refused(store, samples, views, message):
    with pytest.raises(IndexError, match=message):
        store.gather_pairs(np.array(samples), np.array(views))


def test_a_caller_may_change_a_gathered_batch(store):
    first = store.gather(0, np.arange(3)).logits
    before = first.copy()
    first += 1
    assert np.array_equal(store.gather(0, np.arange(3)).logits, before)


@pytest.mark.parametrize(
    ("method", "encoding"),
    [("fork", "dense"), pytest.param("spawn", "top_k", marks=pytest.mark.slow)],
)
def test_workers_of_a_data_loader_read_what_the_parent_reads(directories, method, encoding):
    store = opened_at(directories[encoding])
    store.gather(0, np.arange(9))  # mapped before the workers start
    positions = np.random.default_rng(3).permutation(len(store))[:96].tolist()
    loader = DataLoader(
        store,
        batch_size=32,
        sampler=positions,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    batches = list(loader)
    views, samples = np.divmod(positions, SAMPLES)
    direct = store.gather_pairs(samples, views)
    logits = torch.cat([batch["logits"] for batch in batches]).numpy()
    assert np.array_equal(logits, direct.logits)
    if direct.kept is not None:
        kept = torch.cat([batch["kept"] for batch in batches]).numpy()
        assert np.array_equal(kept, direct.kept)


def test_one_position_is_one_row_of_its_batch(store):
    row = store[SAMPLES + 16_384]  # view 1
    assert np.array_equal(row["logits"], store.gather(1, np.array([16_384])).logits[0])
    assert len(store) == SAMPLES * VIEWS
    with pytest.raises(IndexError):
        store[len(store)]


def test_a_store_in_use_keeps_no_file_open(store):
    store.gather_pairs(np.arange(0, SAMPLES, 7), np.arange(0, SAMPLES, 7) % VIEWS)
    links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert not [link for link in links if link.exists() and link.resolve().suffix == ".h5"]


def test_a_store_in_use_is_pickled_without_its_rows(store):
    samples = np.arange(SAMPLES)
    before = store.gather(2, samples).logits
    pickled = pickle.dumps(store)
    labels = sum(labels.nbytes for labels in store.labels.values())
    assert len(pickled) - labels < 8_000  # of three views in three shards each
    assert np.array_equal(pickle.loads(pickled).gather(2, samples).logits, before)


def test_mapped_rows_cannot_be_written(store):
    for array in store.shards["train", 0][0].arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


@pytest.mark.parametrize("tail", ["spread", "bucket"])
def test_a_student_trains_from_a_top_k_store_as_from_a_dense_one_when_k_is_all_classes(
    project, tail
):
    before = Path("metrics/history/students/small.csv").read_bytes()
    change_params("soft_targets", encoding="top_k", k=3)
    change_params("distillation", tail=tail)
    run_stage("soft_targets")
    run_stage("student", "small")
    after = Path("metrics/history/students/small.csv").read_bytes()
    losses = [
        np.loadtxt(text.decode().splitlines()[1:], delimiter=",", usecols=range(6))
        for text in (before, after)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert tail == "bucket" or before == after


def test_a_student_trains_from_fewer_classes_with_the_tail_spread_or_in_a_bucket(project):
    change_params("soft_targets", encoding="top_k", k=1)
    run_stage("soft_targets")
    assert opened().gather(0, np.arange(36)).kept.sum(1).max() <= 2
    histories = set()
    for tail in ("spread", "bucket"):
        change_params("distillation", tail=tail)
        run_stage("student", "small")
        histories.add(Path("metrics/history/students/small.csv").read_text("utf-8"))
    assert len(histories) == 2


def test_the_code_of_the_page_on_the_store_reads_it(project):
    page = (ROOT / "docs/store.md").read_text("utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    views = load_section(ViewsParams, "views")
    names = {
        **{"open_store": open_store, "open_dataset": open_dataset, "DataLoader": DataLoader},
        **{"view_params": views, "view": 1, "views": np.arange(5) % 3, "samples": np.arange(5)},
        "teacher_fingerprint": checkpoint.fingerprint(TEACHER.model, produced_by="-"),
    }
    exec(code, names)
    assert names["store"].temperature == 4.0
    assert names["logits"].shape == (5, 3)
    assert len(names["loader"].dataset) == 3 * 36
