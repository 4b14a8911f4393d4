"""Compare reading soft targets with other ways: random batches of 256 of a view, 1,000 classes.

    python -m benchmarks.reading

The store's `gather` is compared with NumPy in memory, h5py's fancy indexing of the same shards, and
torchdistill 1.1.4's cache of one file per sample (`pip install -e '.[bench]'`). A `top_k` store is
decoded to dense float32. Everything is in the page cache, and on one thread. The logits are random;
their values do not matter to reading. Needs about 400 MB of disk in the temporary folder.
"""

from pipeline.runtime.command import run_command

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from benchmarks import stores
from benchmarks.harness import Row, alternate, median, run_benchmark
from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.progress import bar
from pipeline.store.format.schema import SHARD_SAMPLES, canary_samples, shard_keys
from pipeline.store.reading.index import read_index
from pipeline.store.reading.store import Store, open_shards
from pipeline.store.writing.shard_writer import write_index, write_shard

CLASSES, BATCH, K = 1000, 256, 10

Read = Callable[[np.ndarray], object]


def write_store(directory: Path, logits: np.ndarray, labels: np.ndarray, k: int | None) -> Store:
    """Write and open a store of one view. `logits`: [N, C]; `labels`: [N]; `k`: of `top_k`."""
    encoding, classes = "top_k" if k else "dense", logits.shape[1]
    contents = stores.identity(classes, encoding=encoding, k=k, policy="crop")
    sizes = {"train": len(logits)}
    for place in shard_keys(sizes, 1):
        rows = slice(place.first_sample, place.first_sample + place.num_samples)
        canaries = np.zeros((len(canary_samples(place)), 32), np.uint8)
        path = directory / place.file_name
        write_shard(path, contents, place, logits[rows].astype("f4"), labels[rows], canaries)
    names = [str(number) for number in range(classes)]
    write_index(directory, contents, names, sizes, 1, {})
    return open_shards(directory, read_index(directory), {"train": labels}).decoded_at(4.0)


def random_logits(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, C] and labels [N] of a dataset's training images, for `write_store`."""
    split, shape = dataset.splits["train"], (len(dataset.splits["train"]), dataset.num_classes)
    return 3 * np.random.default_rng(0).standard_normal(shape, np.float32), split.labels


def with_h5py(directory: Path) -> Read:
    """Fancy indexing of files that stay open; it needs increasing indices."""
    files = [h5py.File(path, "r")["logits"] for path in sorted(directory.glob("*.h5"))]

    def read(samples: np.ndarray) -> np.ndarray:
        rows = np.empty((len(samples), CLASSES), np.float16)
        order = np.argsort(samples)
        number, place = np.divmod(samples[order], SHARD_SAMPLES)
        for shard in np.unique(number):
            here = number == shard
            rows[order[here]] = files[shard][place[here]]
        return rows

    return read


class NoImages(TorchDataset):
    """The dataset that a cache wraps; it costs nothing."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, int]:
        return 0, 0


def with_torchdistill(directory: Path, logits: np.ndarray) -> Read | None:
    """One file per sample, as torchdistill's training box writes them, read by torchdistill."""
    try:
        import torchvision.datasets  # noqa: F401, PLC0415  (torchdistill looks for it when imported)
        from torchdistill.datasets.wrapper import (  # noqa: PLC0415
            CacheableDataset,
            default_idx2subpath,
        )
    except ImportError:
        return None
    for index, row in enumerate(bar(logits, "files")):
        path = directory / f"{default_idx2subpath(index)}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"teacher_outputs": torch.Tensor(row), "extracted_outputs": {}}, path)
    cache = CacheableDataset(NoImages(len(logits)), str(directory), default_idx2subpath)

    def read(samples: np.ndarray) -> torch.Tensor:
        return torch.stack(
            [cache[int(index)][2]["cached_data"]["teacher_outputs"] for index in samples]
        )

    return read


def compare(name: str, ours: Read, theirs: Read | None, size: int, pairs: int) -> Row:
    batches = [np.random.default_rng(pair).permutation(size)[:BATCH] for pair in range(pairs)]
    sides = {"ours": lambda pair: ours(batches[pair])}
    if theirs is not None:
        sides["theirs"] = lambda pair: theirs(batches[pair])
    times = alternate(sides, pairs, warm_up=10)
    ratio = "" if theirs is None else median(times["theirs"] / times["ours"])
    return {
        "": name,
        **{f"{side}, rows/s": BATCH / median(times[side]).median for side in sides},
        "speed-up of ours": ratio,
    }


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(1)
    size, pairs, rng = arguments.samples, arguments.pairs, np.random.default_rng(0)
    logits = np.empty((size, CLASSES), np.float16)
    for rows in np.array_split(logits, 50):
        rows[:] = 3 * rng.standard_normal(rows.shape, np.float32)
    labels = rng.integers(0, CLASSES, size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = write_store(folder / "dense", logits, labels, None)
        top_k = write_store(folder / "top_k", logits, labels, K)

        def ours(samples: np.ndarray) -> np.ndarray:
            return dense.gather(0, samples).logits

        few, of_h5py = (
            np.random.default_rng(1).permutation(size)[:BATCH],
            with_h5py(folder / "dense"),
        )
        assert np.array_equal(ours(few), logits[few])
        assert np.array_equal(of_h5py(few), logits[few])
        yield compare("NumPy, an array in memory", ours, lambda s: logits[s], size, pairs)
        yield compare("h5py, fancy indexing", ours, of_h5py, size, pairs)
        count = min(arguments.files, size)
        theirs = with_torchdistill(folder / "files", logits[:count])
        if theirs is None:
            print("torchdistill is not installed (`pip install -e '.[bench]'`): not compared")
        else:
            few = few % count
            assert np.array_equal(theirs(few).numpy(), logits[few].astype(np.float32))
            yield compare(f"torchdistill, {count:,} files", ours, theirs, count, pairs)
        decode = compare(
            f"top_k, k = {K}, decoded", lambda s: top_k.gather(0, s), None, size, pairs
        )
        yield {name: value for name, value in decode.items() if value != ""}


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        samples=(50_000, "of the view"),
        files=(10_000, "of torchdistill's cache"),
        pairs=(200, "of batches to compare by"),
    )


if __name__ == "__main__":
    run_command(main)
