"""A teacher without a network: a table or a store of logits that another system computed.

docs/teachers.md defines a table, docs/soft_targets_format.md a store. Both have a method
`rows(split, view, samples)`, which returns logits in the order of the dataset's classes, and

    path, sha256    the place, and the digest of the logits that are for this dataset
    num_views       of the training images; None: every view of an image has the same logits
    identity        of a store: the description of its rows in its index; of a table None
    told            lines to print for the user

This module reads a store by h5py alone, because the teacher's training would depend on anything
that it imports. The stage `soft_targets` verifies every shard with the store's own readers.
"""

import csv
import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from torch import nn

from pipeline.data.prepared.dataset import SPLITS, Dataset
from pipeline.runtime.errors import UserError, did_you_mean, first_line
from pipeline.runtime.files import canonical_json

_CHUNK = 16_384  # rows checked together; also the samples of one shard of a store
_SHOWN = 3  # examples in a message
_INDEX = "store.json"
_FORMAT_VERSION = 2
_IDENTITY = {
    "dataset_fingerprint": str,
    "teacher_fingerprint": str,
    "policy": str,
    "seed": int,
    "image_size": int,
    "encoding": str,
    "precision": str,
    "num_classes": int,
}


def build(network: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    raise UserError(
        f"`{network}` of family `logits` is no network, but logits of another system. They can be "
        "a teacher: set `weights: logits` and `teacher.checkpoint` to a table or a store."
    )


def open_source(path: Path, dataset: Dataset) -> "Table | Store":
    """Open the logits at a path: reads and checks all of a table, or the index of a store.

    Raises:
        UserError: there are no logits, or not for all of this dataset.
    """
    if path.is_dir():
        return open_store(path, dataset)
    if not path.is_file() or path.suffix not in _READERS:
        raise UserError(
            f"`{path}` is neither a table of logits (.csv, .npz) nor the folder of a store. Put "
            "one of them there, or name it in `teacher.checkpoint`."
        )
    return open_table(path, dataset)


@dataclass(frozen=True)
class Table:
    path: Path
    sha256: str
    num_views: int | None
    logits: np.ndarray  # [rows, columns], as in the file
    columns: np.ndarray  # [C] the column of each class
    places: Mapping[str, np.ndarray]  # by split, [views or 1, N] the row of each sample
    told: Sequence[str]
    identity: None = None

    def rows(self, split: str, view: int, samples: np.ndarray) -> np.ndarray:
        """[n, C] float32."""
        own = view if split == "train" and self.num_views is not None else 0
        return _taken(self.logits, self.places[split][own, samples], self.columns)


@dataclass(frozen=True)
class _Columns:
    """The contents of a table's file."""

    ids: np.ndarray  # [N] text
    logits: np.ndarray  # [N, columns] numbers
    class_names: Sequence[str]  # of the columns
    splits: np.ndarray | None  # [N] text
    views: np.ndarray | None  # [N] int64, -1 for none


def open_table(path: Path, dataset: Dataset) -> Table:
    """Read and check a table.

    Raises:
        UserError: lists every row, class or number that is wrong or missing.
    """
    held = _READERS[path.suffix](path, dataset)
    columns = _columns_of_classes(path, held.class_names, dataset.class_names)
    if not len(held.ids):
        count = sum(len(split) for split in dataset.splits.values())
        raise UserError(f"`{path}` has no rows; expected one for each of the {count:,} images.")
    samples = _samples_of_rows(path, held, dataset)
    num_views = None if held.views is None else _number_of_views(path, held, samples)
    places, problems = {}, []
    for name, of_rows in samples.items():
        views = (num_views or 1) if name == "train" else 1
        places[name], found = _one_row_each(held, of_rows, dataset, name, views)
        problems += found
    unknown = np.flatnonzero(np.all([found < 0 for found in samples.values()], 0))
    surplus = f"{len(unknown):,} rows are of no image of data/prepared: {_some(held.ids[unknown])}"
    if problems:
        problems += [surplus] if len(unknown) else []
        raise UserError(
            "\n  ".join([f"`{path}` has not one row for every image:", *problems])
            + "\nThe ids are those of data/prepared/train_ids.json, and of the other splits'."
        )
    told = [f"{path}: {surplus}"] if len(unknown) else []
    if num_views is None:
        told.append(f"{path} has one row per image, which is used for every view of it")
    digest = _check_numbers(path, held, columns, places, dataset.class_names, num_views)
    return Table(path, digest, num_views, held.logits, columns, places, told)


def _read_csv(path: Path, dataset: Dataset) -> _Columns:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file), [])
        beside = [name for name in ("id", "split", "view") if name in names]
        ambiguous = [name for name in beside if name in dataset.class_names]
        if ambiguous:
            raise UserError(
                f"`{path}`: the column `{ambiguous[0]}` may be the class of that name or not. "
                "Save the table as .npz."
            )
        if names.count("id") != 1 or len(set(names)) < len(names):
            raise UserError(
                f"`{path}` has the columns {_some(names)}; expected each once: `id`, one for each "
                "class, and `split` and `view` where they are needed."
            )
        classes = [name for name in names if name not in beside]
        frame = pd.read_csv(
            path,
            encoding="utf-8-sig",
            names=names,
            header=0,
            dtype={name: str if name in beside else np.float64 for name in names},
            keep_default_na=False,  # `NA` may be an id
            na_values={name: ["", "nan", "NaN"] for name in classes},
        )
        if not isinstance(frame.index, pd.RangeIndex):
            raise ValueError("its rows have more fields than its first line")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"`{path}` cannot be read as a table ({first_line(error)}). Expected UTF-8 text, "
            "the columns' names in its first line, and numbers."
        ) from None
    text = {name: frame[name].fillna("").to_numpy(object) for name in beside}
    views = None
    if "view" in text:
        bad = [v for v in text["view"] if v and not (v.isascii() and v.isdecimal() and len(v) < 10)]
        if bad:
            raise UserError(f"`{path}` has the view {_some(bad)}; expected numbers from 0.")
        views = np.array([int(view or -1) for view in text["view"]], np.int64)
    with np.errstate(over="ignore"):  # refused as too large
        logits = frame[classes].to_numpy(np.float32)
    return _Columns(text["id"], logits, classes, text.get("split"), views)


#: The arrays of an .npz: kinds of NumPy's types, dimensions, and whether they must be there.
_ARRAYS = {
    "ids": ("Uiu", 1, True),
    "logits": ("fiu", 2, True),
    "class_names": ("U", 1, True),
    "splits": ("U", 1, False),
    "views": ("iu", 1, False),
}


def _read_npz(path: Path, dataset: Dataset) -> _Columns:
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not an .npz file")
        with np.load(path, allow_pickle=False) as file:
            unknown = [name for name in file.files if name not in _ARRAYS]
            missing = [name for name, (*_, needed) in _ARRAYS.items() if needed > (name in file)]
            if unknown or missing:
                raise UserError(
                    f"`{path}` has the arrays {_some(file.files)}; expected `ids`, `logits` and "
                    "`class_names`, and `splits` and `views` where they are needed."
                )
            arrays = {name: file[name] for name in file.files}
    except UserError:
        raise
    except Exception as error:  # of NumPy, zipfile or zlib
        if "allow_pickle" in str(error):
            raise UserError(
                f"`{path}` holds pickled objects, which could run code, and was not loaded. Save "
                "names and ids as text: `np.array(ids, dtype=str)`."
            ) from None
        raise UserError(
            f"`{path}` cannot be read ({first_line(error)}). Expected what `np.savez` writes."
        ) from None
    count = len(arrays["ids"]) if arrays["ids"].ndim else 0
    for name, array in arrays.items():
        kinds, dimensions, _ = _ARRAYS[name]
        length = len(arrays["class_names"]) if name == "class_names" else count
        if array.dtype.kind not in kinds or array.ndim != dimensions or len(array) != length:
            raise UserError(
                f"`{path}` has {name} {array.dtype} {list(array.shape)}; expected ids [rows] of "
                "text, logits [rows, classes] of numbers, class_names [classes] of text, splits "
                "[rows] of text, views [rows] of integers."
            )
    ids, splits, views = arrays["ids"], arrays.get("splits"), arrays.get("views")
    if arrays["logits"].shape[1] != len(arrays["class_names"]):
        raise UserError(
            f"`{path}` has {arrays['logits'].shape[1]} columns of logits, but "
            f"{len(arrays['class_names'])} class_names; expected one for each."
        )
    return _Columns(
        ids.astype(str).astype(object),
        arrays["logits"],
        arrays["class_names"].tolist(),
        None if splits is None else splits.astype(object),
        None if views is None else views.astype(np.int64),
    )


_READERS: Mapping[str, Callable[[Path, Dataset], _Columns]] = {".csv": _read_csv, ".npz": _read_npz}


def _columns_of_classes(path: Path, found: Sequence[str], expected: Sequence[str]) -> np.ndarray:
    """[C] the column of each class, by name."""
    number = {name: column for column, name in enumerate(found)}
    missing = [name for name in expected if name not in number]
    known = set(expected)
    unknown = [name for name in found if name not in known]
    if missing or unknown or len(number) < len(found):
        advice = did_you_mean(missing[0], unknown) if missing else ""
        raise UserError(
            f"`{path}` has logits for {len(found)} classes: {len(missing)} of the "
            f"{len(expected)} class folders are not among them"
            f"{f' ({_some(missing)}{advice})' if missing else ''}, {len(unknown)} are no class "
            f"folder{f' ({_some(unknown)})' if unknown else ''}. Expected each class folder's "
            "name once."
        )
    return np.array([number[name] for name in expected])


def _samples_of_rows(path: Path, held: _Columns, dataset: Dataset) -> dict[str, np.ndarray]:
    """By split, [rows] the sample number of each row, -1 for none."""
    if held.splits is not None:
        unknown = [split for split in pd.unique(held.splits) if split not in SPLITS]
        if unknown:
            raise UserError(f"`{path}` has the split {_some(unknown)}; expected {_some(SPLITS)}.")
    found = {}
    for name, split in dataset.splits.items():
        found[name] = pd.Index(split.sample_ids, dtype=object).get_indexer(held.ids)
        if held.splits is not None:
            found[name][held.splits != name] = -1
    several = np.sum([samples >= 0 for samples in found.values()], 0) > 1
    if several.any():
        raise UserError(
            f"`{path}`: {np.count_nonzero(several):,} of its ids are in two splits: "
            f"{_some(held.ids[several])}. Name the split of each row: add "
            f"{'a column `split`' if path.suffix == '.csv' else 'an array `splits`'} of "
            f"{_some(SPLITS)}."
        )
    return found


def _number_of_views(path: Path, held: _Columns, samples: Mapping[str, np.ndarray]) -> int:
    """The number of views of the training images; the others have one, without augmentation.

    Raises:
        UserError: a view is impossible, or there is a gap between views.
    """
    train = samples["train"] >= 0
    others = (samples["validation"] >= 0) | (samples["test"] >= 0)
    for wrong, what in (
        (train & (held.views < 0), "of train have no view; expected numbers from 0"),
        (others & (held.views > 0), "of validation and test have a view; expected none, or 0"),
    ):
        if wrong.any():
            raise UserError(
                f"`{path}`: {np.count_nonzero(wrong):,} rows {what}: {_some(held.ids[wrong])}."
            )
    views = np.unique(held.views[train])
    if not np.array_equal(views, np.arange(len(views))):
        raise UserError(
            f"`{path}` has the views {_some(views)} of train; expected 0, 1 and so on, none left "
            "out."
        )
    return max(1, len(views))


def _one_row_each(
    held: _Columns, samples: np.ndarray, dataset: Dataset, split: str, num_views: int
) -> tuple[np.ndarray, list[str]]:
    """The row of each sample in each view, [num_views, N]; and the problems."""
    size, rows = len(dataset.splits[split]), np.flatnonzero(samples >= 0)
    views = held.views[rows] if held.views is not None and split == "train" else 0
    keys = views * size + samples[rows]
    order = np.argsort(keys, kind="stable")
    rows, keys = rows[order], keys[order]
    again = np.flatnonzero(np.diff(keys, prepend=-1) == 0)
    problems = []
    present = np.unique(keys)
    if len(present) < num_views * size:
        first, gap = [], 0
        for key in [*present.tolist(), num_views * size]:
            first += range(gap, min(key, gap + _SHOWN))
            gap = key + 1
            if len(first) >= _SHOWN:
                break
        ids = dataset.splits[split].sample_ids
        of_view = [
            ids[key % size] + (f" in view {key // size}" if num_views > 1 else "") for key in first
        ]
        missing = num_views * size - len(present)
        what = f"{size:,} images" + (f" in {num_views} views" if num_views > 1 else "")
        problems.append(
            f"{missing:,} rows are missing of {split}, {what}: {_some(of_view, missing)}"
        )
    if len(again):
        problems.append(
            f"{len(again):,} rows of {split} are there twice: {_some(held.ids[rows[again]])}"
        )
    return (rows if problems else rows.reshape(num_views, size)), problems


def _taken(logits: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[n, C] float32."""
    with np.errstate(over="ignore"):  # refused as too large
        return logits[rows][:, columns].astype(np.float32)


def _check_numbers(
    path: Path,
    held: _Columns,
    columns: np.ndarray,
    places: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    num_views: int | None,
) -> str:
    """Check every number that is for the dataset, in its order.

    Returns:
        The digest of these logits.

    Raises:
        UserError: there are numbers that float16 cannot hold, or probabilities.
    """
    digest, numbers = hashlib.sha256(canonical_json(num_views).encode()), _Numbers(class_names)
    for of_split in places.values():
        for of_view in of_split:
            for start in range(0, len(of_view), _CHUNK):
                rows = of_view[start : start + _CHUNK]
                logits = _taken(held.logits, rows, columns)
                numbers.look_at(logits, lambda row, rows=rows: held.ids[rows[row]])
                digest.update(logits.astype("<f4").tobytes())
    numbers.refuse(path)
    return digest.hexdigest()


@dataclass
class _Numbers:
    """The problems of logits that are checked part by part."""

    class_names: Sequence[str]
    bad: list[str] = field(default_factory=list)  # the first of them
    bad_rows: int = 0
    all_probabilities: bool = True

    def look_at(self, logits: np.ndarray, name_of: Callable[[int], str]) -> None:
        """Check [n, C] float32 logits; `name_of` gives the name of a row."""
        with np.errstate(over="ignore", invalid="ignore"):
            wrong = ~np.isfinite(logits.astype(np.float16))
            sums = logits.sum(1)
        rows = np.flatnonzero(wrong.any(1))
        self.bad_rows += len(rows)
        for row in rows[: _SHOWN - len(self.bad)].tolist():
            column = int(wrong[row].argmax())
            self.bad.append(
                f"{name_of(row)}: {logits[row, column]:g} for {self.class_names[column]}"
            )
        self.all_probabilities &= bool((logits >= 0).all() and (abs(sums - 1) < 0.02).all())

    def refuse(self, path: Path) -> None:
        """Raise if the numbers cannot be logits."""
        if self.bad_rows:
            raise UserError(
                f"`{path}`: {self.bad_rows:,} rows have numbers that are not finite, or beyond "
                f"float16's ±65504: {_some(self.bad, self.bad_rows)}. Expected finite logits."
            )
        if self.all_probabilities:
            raise UserError(
                f"`{path}` holds probabilities, which are not negative and add up to 1; expected "
                "logits. Save the input of the softmax, or the logarithm of the probabilities "
                "(raised to at least 1e-7, because that of 0 is not finite)."
            )


@dataclass(frozen=True)
class Store:
    path: Path
    sha256: str
    num_views: int
    identity: Mapping[str, Any]
    class_names: Sequence[str]
    sizes: Mapping[str, int]
    told: Sequence[str] = ()

    def rows(self, split: str, view: int, samples: np.ndarray) -> np.ndarray:
        """[n, C] float32; verifies the checksum of every shard that is read.

        Raises:
            UserError: a shard is absent or damaged, or its numbers cannot be logits.
        """
        found = np.empty((len(samples), self.identity["num_classes"]), np.float32)
        for first in np.unique(samples // _CHUNK * _CHUNK).tolist():
            here = samples // _CHUNK * _CHUNK == first
            found[here] = self._shard(split, view, first)[samples[here] - first]
        return found

    def _shard(self, split: str, view: int, first: int) -> np.ndarray:
        """[num_samples, C] float16, read without HDF5, which would follow links and run filters."""
        path = self.path / _shard_name(split, view, first)
        expected = (min(_CHUNK, self.sizes[split] - first), self.identity["num_classes"])
        with _opened(path) as file:
            if not isinstance(file.get("logits", getlink=True), h5py.HardLink):
                raise ValueError("it has no `logits` of its own")
            dataset = file["logits"]
            dtype, shape, offset = dataset.dtype, dataset.shape, dataset.id.get_offset()
        if shape != expected or dtype != np.dtype("<f2"):
            raise UserError(
                f"`{path}` has logits {dtype} {list(shape)}; expected float16 {list(expected)}. "
                f"{_AGAIN}"
            )
        if offset is None:
            raise UserError(
                f"`{path}` has logits that are chunked, compressed or in another file; expected "
                f"one block of bytes. {_AGAIN}"
            )
        logits = np.fromfile(path, dtype, math.prod(expected), offset=offset)
        if logits.size != math.prod(expected):
            raise UserError(f"`{path}` is damaged: it ends within its logits. {_AGAIN}")
        logits = logits.reshape(expected)
        if hashlib.sha256(logits.tobytes()).hexdigest() != _stated_sum(path):
            raise UserError(
                f"`{path}` is damaged: its logits do not match their checksum. {_AGAIN}"
            )
        numbers = _Numbers(self.class_names)
        numbers.look_at(logits.astype(np.float32), lambda row: f"sample {first + row}")
        numbers.refuse(path)
        return logits


_AGAIN = "Write it again, as docs/soft_targets_format.md says."


def open_store(path: Path, dataset: Dataset) -> Store:
    """Open a store: reads the index, and the checksum of every shard.

    Raises:
        UserError: it is not a store, is of another dataset, or lacks logits.
    """
    if not (path / _INDEX).is_file():
        raise UserError(
            f"the folder `{path}` has no `{_INDEX}`; expected a store, as "
            "docs/soft_targets_format.md says. Put it there, or name a table (.csv, .npz) in "
            "`teacher.checkpoint`."
        )
    try:
        index = dict(json.loads((path / _INDEX).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"`{path / _INDEX}` cannot be read ({first_line(error)}). {_AGAIN}"
        ) from None
    keys = _IDENTITY | {"splits": dict, "num_views": int, "class_names": list}
    wrong = [key for key, kind in keys.items() if not isinstance(index.get(key), kind)]
    if index.get("format_version") != _FORMAT_VERSION or wrong:
        raise UserError(
            f"`{path / _INDEX}` has format version {index.get('format_version')}, and "
            f"{f'lacks {_some(wrong)}' if wrong else 'every key'}; expected version "
            f"{_FORMAT_VERSION} with all of its keys. {_AGAIN}"
        )
    if index["encoding"] != "dense":
        raise UserError(
            f"`{path}` has encoding {index['encoding']}; expected dense, because validation and "
            "test need every logit. `soft_targets.encoding` may still be top_k."
        )
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    differing = [
        f"`{path}` has {key} {_short(index[key])}, but data/prepared {_short(expected)}."
        for key, expected in (
            ("dataset_fingerprint", dataset.fingerprint),
            ("splits", sizes),
            ("class_names", list(dataset.class_names)),
            ("num_classes", dataset.num_classes),
        )
        if index[key] != expected
    ]
    if index["num_views"] < 1:
        differing.append(f"`{path}` has num_views {index['num_views']}; expected 1 or more.")
    if differing:
        raise UserError("\n".join([*differing, _AGAIN]))
    sums = {
        (name := _shard_name(split, view, first)): _stated_sum(path / name)
        for split, size in sizes.items()
        for view in range(index["num_views"] if split == "train" else 1)
        for first in range(0, size, _CHUNK)
    }
    return Store(
        path=path,
        sha256=hashlib.sha256(canonical_json(sums).encode()).hexdigest(),
        num_views=index["num_views"],
        identity={key: index[key] for key in _IDENTITY},
        class_names=dataset.class_names,
        sizes=sizes,
    )


def _shard_name(split: str, view: int, first: int) -> str:
    return f"{split}_view{view:05d}_sample{first:09d}.h5"


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        state = "is damaged" if path.is_file() else "is absent"
        raise UserError(f"`{path}` {state} ({first_line(error)}). {_AGAIN}") from None


def _stated_sum(path: Path) -> str:
    name = "logits_sha256"
    with _opened(path) as file:
        fixed = name in file.attrs and file.attrs.get_id(name).dtype.kind == "S"
        stated = file.attrs[name] if fixed else None
    if not isinstance(stated, bytes):
        raise UserError(f"`{path}` has no attribute `{name}` of fixed length. {_AGAIN}")
    return stated.decode("ascii", "replace")


def _some(items: Sequence[Any], total: int | None = None) -> str:
    """The first few, and how many more there are."""
    more = (len(items) if total is None else total) - _SHOWN
    shown = ", ".join(f"`{item}`" for item in list(items)[:_SHOWN])
    return shown + (f" and {more:,} more" if more > 0 else "")


def _short(value: Any) -> str:
    text = str(value)
    if isinstance(value, str) and len(text) == 64:
        return f"{text[:12]}…"
    return text if len(text) <= 60 else f"{text[:57]}..."
