"""A reader and a writer of the store, built from docs/soft_targets_format.md alone.

Uses JSON, HDF5 and NumPy, and none of our code.
"""

import hashlib
import json
import math
from pathlib import Path

import h5py
import numpy as np
from foreign_views import of_pair, view_of

SHARD = 16_384


def read(
    directory: Path, split: str, view: int, labels: np.ndarray, temperature: float
) -> np.ndarray:
    """Read one view of a split: [N, C] probabilities; a top_k row's tail is spread evenly."""
    index = json.loads((directory / "store.json").read_text("utf-8"))
    assert index["format_version"] == 2
    logits = []
    for first in range(0, index["splits"][split], SHARD):
        name = f"{split}_view{view:05d}_sample{first:09d}.h5"
        with h5py.File(directory / name, "r") as file:
            arrays = {key: dataset[:] for key, dataset in file.items()}
            for key in arrays.keys() - {"canary_samples"}:
                digest = hashlib.sha256(arrays[key].tobytes()).hexdigest()
                assert file.attrs[f"{key}_sha256"].decode() == digest
            count = int(file.attrs["num_samples"])
        if index["encoding"] == "dense":
            logits.extend(arrays["logits"].astype(float))
        else:
            logits += [
                _logits_of_a_top_k_row(
                    arrays["class_ids"][i],
                    arrays["values"][i],
                    labels[first + i],
                    index,
                    temperature,
                )
                for i in range(count)
            ]
    weights = np.exp((np.array(logits) - np.max(logits, 1, keepdims=True)) / temperature)
    return weights / weights.sum(1, keepdims=True)


def _logits_of_a_top_k_row(
    class_ids: np.ndarray, values: np.ndarray, label: int, index: dict, temperature: float
) -> np.ndarray:
    k, classes = index["k"], index["num_classes"]
    bits = max(1, math.ceil(math.log2(classes)))
    packed = int.from_bytes(class_ids.tobytes(), "little")
    ids = [packed >> (bits * j) & (2**bits - 1) for j in range(k)]
    *largest, of_label, log_sum_exp, mean = map(float, values)
    tail = classes - len({*ids, int(label)} - {-1})
    logits = np.zeros(classes)
    if tail:
        share = mean + (log_sum_exp - math.log(tail) - mean) / max(temperature, 1)
        logits[:] = min(share, largest[-1])
    logits[ids] = largest
    logits[ids[0] if label < 0 else label] = of_label
    return logits


def write(directory: Path, identity: dict, class_names: list[str], splits: dict, num_views: int):
    """Write a store from any teacher's logits.

    Args:
        identity: the identity's keys of the index.
        splits: name -> (images [N, channels, S, S] uint8 at the size of the views, labels [N],
            logits [views, N, C] float32).
    """
    directory.mkdir(parents=True)
    for split, (images, labels, logits) in splits.items():
        for view in range(num_views if split == "train" else 1):
            of_split = identity["policy"] if split == "train" else "none"
            policy, seed, number = of_pair(of_split, identity["seed"], view)
            for first in range(0, len(images), SHARD):
                rows = slice(first, min(first + SHARD, len(images)))
                count = rows.stop - first
                canaries = min(4, count)
                samples = [first + i * (count - 1) // max(1, canaries - 1) for i in range(canaries)]
                digests = [
                    hashlib.sha256(view_of(images, policy, seed, number, i).tobytes()).digest()
                    for i in samples
                ]
                arrays = rows_of(logits[view, rows], labels[rows], identity)
                arrays["canaries"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
                name = f"{split}_view{view:05d}_sample{first:09d}.h5"
                with h5py.File(directory / name, "w") as file:
                    attributes = {
                        "format_version": 2,
                        **identity,
                        "policy": policy,
                        "split": split,
                        "view": view,
                        "first_sample": first,
                        "num_samples": count,
                    }
                    for key, array in arrays.items():
                        file[key] = array
                        attributes[f"{key}_sha256"] = hashlib.sha256(array.tobytes()).hexdigest()
                    file["canary_samples"] = np.array(samples, np.int64)
                    for key, value in attributes.items():
                        text = isinstance(value, str)
                        file.attrs[key] = np.bytes_(value) if text else np.int64(value)
    index = {
        "format_version": 2,
        **identity,
        "splits": {split: len(parts[0]) for split, parts in splits.items()},
        "num_views": num_views,
        "fidelity": {},
        "class_names": class_names,
    }
    (directory / "store.json").write_text(json.dumps(index), "utf-8")


def rows_of(logits: np.ndarray, labels: np.ndarray, identity: dict) -> dict[str, np.ndarray]:
    """Encode rows: name -> array."""
    if identity["encoding"] == "dense":
        return {"logits": logits.astype("<f2")}
    k, classes = identity["k"], identity["num_classes"]
    bits = max(1, math.ceil(math.log2(classes)))
    ids, values = [], []
    for row, label in zip(logits, labels, strict=True):
        rounded = row.astype("<f2")
        largest = sorted(range(classes), key=lambda c: (-float(rounded[c]), c))[:k]
        kept = {*largest, int(label)} - {-1}
        tail = [float(row[c]) for c in range(classes) if c not in kept]
        sums = [0.0, 0.0]
        if tail:
            sums = [math.log(math.fsum(map(math.exp, tail))), math.fsum(tail) / len(tail)]
        packed = sum(c << (bits * j) for j, c in enumerate(largest))
        ids.append(list(packed.to_bytes(math.ceil(k * bits / 8), "little")))
        of_label = rounded[largest[0] if label < 0 else label]
        values.append([*rounded[largest], of_label, *sums])
    return {"class_ids": np.array(ids, np.uint8), "values": np.array(values, "<f2")}
