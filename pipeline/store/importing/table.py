"""Read a table of logits that another system wrote. docs/teachers.md defines its forms."""

import csv
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch

from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.errors import UserError, first_line

_SHOWN = 3  # examples in a message
_TEXTS = (".csv", ".tsv", ".txt")
_BESIDE = ("id", "split", "view")  # the columns of a text that are not classes


@dataclass(frozen=True)
class Table:
    path: Path
    ids: np.ndarray  # [rows] text
    logits: np.ndarray  # [rows, columns] numbers
    class_names: Sequence[str]  # of the columns
    splits: np.ndarray | None = None  # [rows] text
    views: np.ndarray | None = None  # [rows] int64, -1 for none
    remark: str = ""  # what was assumed


def read_table(path: Path, dataset: Dataset) -> Table:
    """Read a table, in the form that its suffix says.

    Raises:
        UserError: the file is absent, cannot be read, or lacks a part of a table.
    """
    if not path.is_file() or path.suffix not in (*_TEXTS, *_ARRAY_READERS):
        raise UserError(
            f"`{path}` is no table of logits; expected a file ({', '.join(_TEXTS)}, "
            f"{', '.join(_ARRAY_READERS)}), as docs/teachers.md defines it."
        )
    table = (_read_text if path.suffix in _TEXTS else _read_arrays)(path, dataset)
    if not len(table.ids):
        count = sum(len(split) for split in dataset.splits.values())
        raise UserError(f"`{path}` has no rows; expected one for each of the {count:,} images.")
    return table


def some(items: Sequence[Any], total: int | None = None) -> str:
    """The first few items, and how many more there are."""
    more = (len(items) if total is None else total) - _SHOWN
    shown = ", ".join(f"`{item}`" for item in list(items)[:_SHOWN])
    return shown + (f" and {more:,} more" if more > 0 else "")


def _read_text(path: Path, dataset: Dataset) -> Table:
    try:
        form = _text_form(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file, delimiter=form["sep"]), [])
        beside = _columns_beside_classes(path, names, dataset.class_names)
        classes = [name for name in names if name not in beside]
        frame = pd.read_csv(
            path,
            **form,
            encoding="utf-8-sig",
            names=names,
            header=0,
            dtype=dict.fromkeys(classes, np.float64) | {"id": str, "split": str, "view": "Int64"},
            keep_default_na=False,  # `NA` may be an id
            na_values={key: ["", "nan", "NaN"] for key in classes} | {"view": [""]},
        )
        if not isinstance(frame.index, pd.RangeIndex):
            raise ValueError("its rows have more fields than its first line")
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"`{path}` cannot be read as a table ({first_line(error)}). Expected UTF-8 text, "
            "the columns' names in its first line, numbers, and views counted from 0."
        ) from None
    columns = {name: frame[name].to_numpy(object) for name in beside}
    views = frame["view"].fillna(-1).to_numpy(np.int64) if "view" in beside else None
    with np.errstate(over="ignore"):  # refused as too large
        logits = frame[classes].to_numpy(np.float32)
    return Table(path, columns["id"], logits, classes, columns.get("split"), views)


def _text_form(path: Path) -> dict[str, str]:
    """The delimiter that the first line has most of, and the decimal sign of the second: with
    semicolons or tabs it may be a comma."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        first, second = file.readline(), file.readline()
    delimiter = max(",;\t", key=first.count)
    return {"sep": delimiter, "decimal": "," if delimiter != "," and "," in second else "."}


def _columns_beside_classes(
    path: Path, names: Sequence[str], class_names: Sequence[str]
) -> list[str]:
    beside = [name for name in _BESIDE if name in names]
    ambiguous = [name for name in beside if name in class_names]
    if ambiguous:
        raise UserError(
            f"`{path}`: the column `{ambiguous[0]}` may be the class of that name or not. Save the "
            "table as .npz."
        )
    if names.count("id") != 1 or len(set(names)) < len(names):
        raise UserError(
            f"`{path}` has the columns {some(names)}; expected each once: `id`, one for each "
            "class, and `split` and `view` where they are needed."
        )
    return beside


#: The arrays of a table: kinds of NumPy's types, dimensions, and whether they must be there.
_ARRAYS = {
    "ids": ("Uiu", 1, True),
    "logits": ("fiu", 2, True),
    "class_names": ("U", 1, True),
    "splits": ("U", 1, False),
    "views": ("iu", 1, False),
}


def _npz(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not an .npz file")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _npy(path: Path) -> dict[str, np.ndarray]:
    return {"logits": np.load(path, allow_pickle=False)}


def _pt(path: Path) -> dict[str, np.ndarray]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    content = content if isinstance(content, dict) else {"logits": content}
    return {name: _as_array(value) for name, value in content.items()}


def _as_array(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.array(value)
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).numpy()  # NumPy has no bfloat16


def _h5(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        return {
            name: (array.asstr()[()].astype(str) if array.dtype.kind in "OS" else array[()])
            for name, array in file.items()
        }


_ARRAY_READERS = {".npz": _npz, ".npy": _npy, ".pt": _pt, ".pth": _pt, ".h5": _h5, ".hdf5": _h5}


def _read_arrays(path: Path, dataset: Dataset) -> Table:
    try:
        arrays = _ARRAY_READERS[path.suffix](path)
    except Exception as error:  # of NumPy, zipfile, zlib, torch or HDF5
        if "allow_pickle" in str(error) or "weights_only" in str(error):
            raise UserError(
                f"`{path}` holds pickled objects, which could run code, and was not loaded. Save "
                "names and ids as text: `np.array(ids, dtype=str)`."
            ) from None
        raise UserError(
            f"`{path}` cannot be read ({first_line(error)}). Expected a whole {path.suffix} file."
        ) from None
    if arrays.keys() == {"logits"}:
        return _in_order_of_dataset(path, arrays["logits"], dataset)
    missing = [name for name, (*_, needed) in _ARRAYS.items() if needed > (name in arrays)]
    if missing or not arrays.keys() <= _ARRAYS.keys():
        raise UserError(
            f"`{path}` has the arrays {some(list(arrays))}; expected `ids`, `logits` and "
            "`class_names`, and `splits` and `views` where they are needed; or `logits` alone, in "
            "the order of data/prepared."
        )
    _check_shapes(path, arrays)
    ids, splits, views = arrays["ids"], arrays.get("splits"), arrays.get("views")
    return Table(
        path,
        ids.astype(str).astype(object),
        arrays["logits"],
        arrays["class_names"].tolist(),
        None if splits is None else splits.astype(object),
        None if views is None else views.astype(np.int64),
    )


def _check_shapes(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
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
    if arrays["logits"].shape[1] != len(arrays["class_names"]):
        raise UserError(
            f"`{path}` has {arrays['logits'].shape[1]} columns of logits, but "
            f"{len(arrays['class_names'])} class_names; expected one for each."
        )


def _in_order_of_dataset(path: Path, logits: np.ndarray, dataset: Dataset) -> Table:
    """A bare array: rows of all splits one after the other, columns in the order of the classes."""
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    expected = (sum(sizes.values()), dataset.num_classes)
    if logits.shape != expected or logits.dtype.kind not in "fiu":
        parts = " + ".join(f"{size:,} of {name}" for name, size in sizes.items())
        raise UserError(
            f"`{path}` is {logits.dtype} {list(logits.shape)} without ids; expected numbers "
            f"{list(expected)}: a row for each image of data/prepared ({parts}) and a column for "
            "each class folder, in their order. Or save `ids`, `logits` and `class_names`."
        )
    ids = [sample_id for split in dataset.splits.values() for sample_id in split.sample_ids]
    return Table(
        path,
        np.array(ids, object),
        logits,
        list(dataset.class_names),
        splits=np.repeat(np.array(list(sizes), object), list(sizes.values())),
        remark="no ids: its rows were taken in the order of data/prepared (train, validation, "
        "test), its columns in the order of the class folders",
    )
