"""Measure what each encoding costs and loses: bytes per view, and KL from the dense rows at T = 1,
2, 4.

    python -m benchmarks.encodings [--store STORE] [--prepared FOLDER]

The logits are those of a finished dense store, and synthetic ones of 1,000 classes. `top_k` is
compared with the sparse labels of TinyViT (Wu et al. 2022, arXiv:2207.10666; its `save_logits.py`):
the k largest probabilities at T = 1 in float16 with 2-byte ids and a 4-byte seed, the rest spread
evenly, and re-tempered if T is not 1.

KL is in nats, mean over rows, from the stored dense rows in float16 (from float32 for the synthetic
ones). `spread`: between the distributions over all classes. `bucket`: over the outcomes of the
bucket's loss, the kept classes and the sum of the others. TinyViT's rest or one of its
probabilities is sometimes 0 or less, and KL not finite: the mean leaves these rows out, and their
share is printed.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.special import log_softmax as scipy_log_softmax

from benchmarks import stores
from benchmarks.harness import Row, median, run_benchmark
from pipeline.data.prepared.dataset import open_dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import PREPARED, STORE
from pipeline.store.format.encodings import decode, encode
from pipeline.store.format.schema import SHARD_SAMPLES, ShardKey
from pipeline.store.reading.index import read_index
from pipeline.store.reading.store import open_shards
from pipeline.store.writing.shard_writer import shard_bytes

TEMPERATURES = (1, 2, 4)
KS = (5, 10, 20, 50)


def log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    return scipy_log_softmax(logits.astype(np.float64) / temperature, axis=1)


def kl(teacher: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """[n] nats, of log-probabilities [n, classes]."""
    probabilities = np.exp(teacher)
    with np.errstate(invalid="ignore"):
        return np.where(probabilities > 0, probabilities * (teacher - stored), 0).sum(1)


def bucketed(log_probabilities: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """[n, C + 1]: classes that are not kept have no probability; the last column is their sum."""
    tail = np.where(kept, 0, np.exp(log_probabilities)).sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        return np.hstack([np.where(kept, log_probabilities, -np.inf), np.log(tail)])


def of_top_k(
    logits: np.ndarray, labels: np.ndarray, k: int
) -> dict[str, dict[int, tuple[float, float]]]:
    """For each tail and temperature: KL, and the share of rows where it is finite."""
    stored, classes = encode(logits, labels, "top_k", k), logits.shape[1]
    found: dict[str, dict[int, tuple[float, float]]] = {"spread": {}, "bucket": {}}
    for temperature in TEMPERATURES:
        decoded, kept = decode(stored, labels, classes, temperature=temperature)
        teacher, rows = log_softmax(logits, temperature), log_softmax(decoded, temperature)
        found["spread"][temperature] = mean_of_finite(kl(teacher, rows))
        found["bucket"][temperature] = mean_of_finite(
            kl(bucketed(teacher, kept), bucketed(rows, kept))
        )
    return found


def of_tinyvit(logits: np.ndarray, k: int) -> dict[int, tuple[float, float]]:
    probabilities = np.exp(log_softmax(logits, 1)).astype(np.float32)
    ids = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    largest = np.take_along_axis(probabilities, ids, 1).astype(np.float16).astype(np.float64)
    share = (1 - largest.sum(1, keepdims=True)) / (logits.shape[1] - k)
    rows = np.repeat(share, logits.shape[1], 1)
    np.put_along_axis(rows, ids, largest, 1)
    found = {}
    for temperature in TEMPERATURES:
        with np.errstate(invalid="ignore", divide="ignore"):
            tempered = log_softmax(np.log(rows), temperature)
        found[temperature] = mean_of_finite(kl(log_softmax(logits, temperature), tempered))
    return found


def mean_of_finite(divergences: np.ndarray) -> tuple[float, float]:
    finite = np.isfinite(divergences)
    return float(divergences[finite].mean()), float(finite.mean())


def bytes_per_view(encoding: str, k: int | None, classes: int) -> float:
    """Bytes of a full shard's file, divided by its rows."""
    contents = stores.identity(classes, encoding=encoding, k=k)
    place = ShardKey("train", 0, 0, SHARD_SAMPLES)
    return shard_bytes(contents, place) / SHARD_SAMPLES


def of_a_store(directory: Path, prepared: Path, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of training rows, spread evenly over samples and views.

    Raises:
        UserError: the store is not dense.
    """
    index = read_index(directory)
    if index.encoding != "dense":
        raise UserError(
            f"`{directory}` is encoded as {index.encoding}; expected a dense store, to "
            "compare the encodings with its rows."
        )
    store, labels = open_shards(directory, index, {}), open_dataset(prepared).splits["train"].labels
    positions = np.linspace(0, len(store) - 1, min(rows, len(store))).astype(np.int64)
    views, samples = np.divmod(positions, len(labels))
    return store.gather_pairs(samples, views).logits.astype(np.float32), labels[samples]


def synthetic(rows: int, classes: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Logits that decay like a classifier's: classes form groups, and images are near theirs."""
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((classes // 20, 64))
    centres = np.repeat(groups, 20, 0) + rng.standard_normal((classes, 64))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    labels = rng.integers(0, classes, rows)
    strength = rng.uniform(0.5, 2, (rows, 1))  # some images are easy, some are not
    images = strength * centres[labels] + rng.standard_normal((rows, 64)) / 8
    return (8 * images @ centres.T).astype(np.float32), labels


def rows_of(name: str, logits: np.ndarray, labels: np.ndarray) -> Iterator[Row]:
    classes = logits.shape[1]
    top = median(np.exp(log_softmax(logits, 1)).max(1)).median
    print(f"\n{name}: {len(logits):,} rows; largest probability {top:.3f} in the median", end="")

    def row(label: str, size: float, divergences: dict[int, tuple[float, float]]) -> Row:
        lost = 1 - min(share for _, share in divergences.values())
        kls = {f"KL at T = {t}": f"{divergences[t][0]:.2e}" for t in TEMPERATURES}
        return {
            f"{name}, C = {classes:,}": label,
            "bytes/view": f"{size:.1f}",
            **kls,
            "not finite": f"{lost:.1%}" if lost else "",
        }

    rounded = logits.astype(np.float16)
    dense = {
        t: mean_of_finite(kl(log_softmax(logits, t), log_softmax(rounded, t))) for t in TEMPERATURES
    }
    yield row("dense", bytes_per_view("dense", None, classes), dense)
    for k in (k for k in KS if k < classes):
        for tail, divergences in of_top_k(logits, labels, k).items():
            yield row(f"top_k {k}, {tail}", bytes_per_view("top_k", k, classes), divergences)
        yield row(f"TinyViT {k}", 4 + 4 * k, of_tinyvit(logits, k))


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    logits, labels = of_a_store(arguments.store, arguments.prepared, arguments.rows)
    yield from rows_of("the store's logits", logits, labels)
    yield from rows_of("synthetic logits", *synthetic(arguments.rows))


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        store=(STORE, "a dense store"),
        prepared=(PREPARED, "the store's dataset"),
        rows=(8192, "to measure on"),
    )


if __name__ == "__main__":
    run_command(main)
