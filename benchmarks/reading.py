"""Compare reading soft targets with other ways: random batches of 256 of a view, 1,000 classes.

    python -m benchmarks.reading

The store's `gather` is compared with NumPy in memory, h5py's fancy indexing of the same shards, and
torchdistill 1.1.4's cache of one file per sample (`pip install -e '.[bench]'`). A `top_k` store is
decoded to dense float32. Everything is in the page cache, and on one thread. The logits are random;
their values do not matter to reading. Needs about 400 MB of disk in the temporary folder.
"""

from pipeline.runtime.command import run_command

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

from benchmarks.pairs import alternate, median, seconds
from pipeline.runtime.progress import bar
from pipeline.store.format.schema import SHARD_SAMPLES, StoreIdentity, canary_samples, shard_keys
from pipeline.store.reading.index import read_index
from pipeline.store.reading.store import Store, open_shards
from pipeline.store.writing.shard_writer import write_index, write_shard

CLASSES, BATCH, K = 1000, 256, 10
TOP_K_TARGET = 1_000_000  # rows per second on one core

Read = Callable[[np.ndarray], object]


def write_store(directory: Path, logits: np.ndarray, labels: np.ndarray, k: int | None) -> Store:
    """Write and open a store of one view. `logits`: [N, C]; `labels`: [N]; `k`: of `top_k`."""
    encoding, classes = "top_k" if k else "dense", logits.shape[1]
    contents = StoreIdentity("0" * 64, "0" * 64, "crop", 0, 32, encoding, k, "float32", classes)
    sizes = {"train": len(logits)}
    for place in shard_keys(sizes, 1):
        rows = slice(place.first_sample, place.first_sample + place.num_samples)
        canaries = np.zeros((len(canary_samples(place)), 32), np.uint8)
        path = directory / place.file_name
        write_shard(path, contents, place, logits[rows].astype("f4"), labels[rows], canaries)
    names = [str(number) for number in range(classes)]
    write_index(directory, contents, names, sizes, 1, {})
    return open_shards(directory, read_index(directory), {"train": labels}).decoded_at(4.0)


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


class NoImages(Dataset):
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


def compare(name: str, ours: Read, theirs: Read, size: int, pairs: int) -> dict[str, object]:
    batches = [np.random.default_rng(pair).permutation(size)[:BATCH] for pair in range(pairs)]
    for read in (ours, theirs):
        for samples in batches[:10]:
            read(samples)
    mine, other = alternate(lambda p: ours(batches[p]), lambda p: theirs(batches[p]), pairs)
    ratio, rates = median(other / mine), [BATCH / median(times).median for times in (mine, other)]
    print(f"{name:<34}{rates[1]:>14,.0f}{rates[0]:>14,.0f}   {ratio}", flush=True)
    return {
        "rows_per_second": round(rates[1]),
        "ours_rows_per_second": round(rates[0]),
        "times_as_fast": ratio.as_list(),
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.reading", description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000, help="of the view")
    parser.add_argument("--files", type=int, default=10_000, help="of torchdistill's cache")
    parser.add_argument("--pairs", type=int, default=200, help="of batches to compare by")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    logits = np.empty((arguments.samples, CLASSES), np.float16)
    for rows in np.array_split(logits, 50):
        rows[:] = 3 * rng.standard_normal(rows.shape, np.float32)
    labels = rng.integers(0, CLASSES, len(logits))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = write_store(folder / "dense", logits, labels, None)
        top_k = write_store(folder / "top_k", logits, labels, K)
        shards, size = len(dense.shards["train", 0]), len(logits)
        print(
            f"batches of {BATCH} random rows of {CLASSES:,} classes, {size:,} samples in {shards} "
            f"shards; {arguments.pairs} alternated pairs, one thread, all in the page cache\n"
            f"{'':<34}{'rows/s':>14}{'ours, rows/s':>14}   speed-up of ours (95 %)"
        )

        def ours(samples: np.ndarray) -> np.ndarray:
            return dense.gather(0, samples).logits

        of_h5py = with_h5py(folder / "dense")
        check = np.random.default_rng(1).permutation(size)[:BATCH]
        assert np.array_equal(ours(check), logits[check])
        assert np.array_equal(of_h5py(check), logits[check])
        found = {
            "numpy_in_memory": compare(
                "NumPy, an array in memory", ours, lambda s: logits[s], size, arguments.pairs
            ),
            "h5py": compare("h5py, fancy indexing", ours, of_h5py, size, arguments.pairs),
        }
        count = min(arguments.files, size)
        of_torchdistill = with_torchdistill(folder / "files", logits[:count])
        if of_torchdistill is None:
            print("torchdistill is not installed (`pip install -e '.[bench]'`): not compared")
        else:
            few = check % count
            assert np.array_equal(of_torchdistill(few).numpy(), logits[few].astype(np.float32))
            found["torchdistill"] = compare(
                f"torchdistill, {count:,} files", ours, of_torchdistill, count, arguments.pairs
            )
        rates = decoding_rates(top_k, arguments.pairs)
    print(
        f"top_k, k = {K}, to dense float32: {rates.median:,.0f} rows/s "
        f"({rates.low:,.0f} to {rates.high:,.0f}); the target is {TOP_K_TARGET:,}"
    )
    summary = {
        "samples": size,
        "pairs": arguments.pairs,
        **found,
        "top_k_rows_per_second": [round(rate) for rate in (rates.median, rates.low, rates.high)],
    }
    print(json.dumps(summary))


def decoding_rates(store: Store, pairs: int):
    size = store.index.split_sizes["train"]
    batches = [np.random.default_rng(pair).permutation(size)[:BATCH] for pair in range(pairs)]
    for samples in batches[:10]:
        store.gather(0, samples)
    return median([BATCH / seconds(lambda s=samples: store.gather(0, s)) for samples in batches])


if __name__ == "__main__":
    run_command(main)
