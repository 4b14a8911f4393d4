"""Read a table of logits that another system wrote. docs/teachers.md defines its forms."""

import csv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch

from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.errors import UserError, first_line, is_out_of_memory

_SHOWN = 3  # examples in a message
_COLUMNS = ("id", "split", "view")  # of a text, beside those of classes


@dataclass(frozen=True)
class Table:
    path: Path
    ids: np.ndarray  # [rows] text
    logits: np.ndarray  # [rows, columns] numbers
    class_names: Sequence[str]  # of the columns
    splits: np.ndarray | None = None  # [rows] text
    views: np.ndarray | None = None  # [rows] int64, -1 for none
    in_order: bool = False  # the file has no ids: the rows are in the order of the dataset


def read_table(path: Path, dataset: Dataset) -> Table:
    """Read a table, in the form that its suffix says.

    Raises:
        UserError: the file is absent, cannot be read, or lacks a part of a table.
    """
    if path.suffix not in _READERS or not path.is_file():
        raise UserError(
            f"`{path}` is no table of logits; expected a file ({', '.join(_READERS)}), as "
            "docs/teachers.md defines it."
        )
    taken = [name for name in dataset.class_names if name in _COLUMNS]
    if taken and _READERS[path.suffix] is _text:
        raise UserError(
            f"`{path}` is a text, in which the column `{taken[0]}` cannot be a class, but a class "
            "folder has that name. Save the table as .npz."
        )
    try:
        arrays = _READERS[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # of pandas, NumPy, zipfile, zlib, torch or HDF5
        if is_out_of_memory(error):
            raise
        if "allow_pickle" in str(error) or "weights_only" in str(error):
            raise UserError(
                f"`{path}` holds pickled objects, which could run code, and was not loaded. Save "
                "names and ids as text: `np.array(ids, dtype=str)`."
            ) from None
        raise UserError(
            f"`{path}` cannot be read ({first_line(error)}). Expected a table as docs/teachers.md "
            "defines it; a text in UTF-8, with the columns' names in its first line."
        ) from None
    in_order = arrays.keys() == {"logits"}
    if in_order:
        arrays |= _in_order_of_dataset(path, arrays["logits"], dataset)
    _check(path, arrays)
    if not len(arrays["ids"]):
        count = sum(len(split) for split in dataset.splits.values())
        raise UserError(f"`{path}` has no rows; expected one for each of the {count:,} images.")
    return Table(path, **arrays, in_order=in_order)


def some(items: Sequence[Any], total: int | None = None) -> str:
    """The first few items, and how many more there are."""
    more = (len(items) if total is None else total) - _SHOWN
    shown = ", ".join(f"`{item}`" for item in list(items)[:_SHOWN])
    return shown + (f" and {more:,} more" if more > 0 else "")


def _text(path: Path) -> dict[str, np.ndarray]:
    """Read a text. Its delimiter is the comma, semicolon or tab that makes one field of the first
    line `id`, because names of classes may have the others. With semicolons or tabs, a comma in a
    number of the second line is a decimal comma."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        first, second = file.readline(), file.readline()
    delimiter = max(",;\t", key=lambda d: (_fields(first, d).count("id") == 1, first.count(d)))
    names = _fields(first, delimiter)
    if names.count("id") != 1 or len(set(names)) < len(names):
        raise UserError(
            f"`{path}` has the columns {some(names)}; expected each once: `id`, one for each "
            "class, and `split` and `view` where they are needed."
        )
    classes = [name for name in names if name not in _COLUMNS]
    row = zip(names, _fields(second, delimiter), strict=False)
    has_commas = any("," in field for name, field in row if name in classes)
    frame = pd.read_csv(
        path,
        sep=delimiter,
        decimal="," if delimiter != "," and has_commas else ".",
        encoding="utf-8-sig",
        names=names,
        header=0,
        dtype=dict.fromkeys(classes, np.float64) | {"id": str, "split": str, "view": "Int64"},
        keep_default_na=False,  # `NA` may be an id
        na_values={key: ["", "nan", "NaN"] for key in classes} | {"view": [""]},
    )
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError("its rows have more fields than its first line")
    with np.errstate(over="ignore"):  # refused as too large
        logits = frame[classes].to_numpy(np.float32)
    arrays = {"ids": frame["id"].to_numpy(str), "logits": logits, "class_names": np.array(classes)}
    if "split" in names:
        arrays["splits"] = frame["split"].to_numpy(str)
    if "view" in names:
        arrays["views"] = frame["view"].fillna(-1).to_numpy(np.int64)
    return arrays


def _fields(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


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
    return {name: _array(value) for name, value in content.items()}


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.array(value)
    return value.detach().to(torch.float32 if value.is_floating_point() else value.dtype).numpy()


def _h5(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        return {name: _h5_array(item) for name, item in file.items()}


def _h5_array(item: h5py.Dataset | h5py.Group) -> np.ndarray:
    if isinstance(item, h5py.Group) or item.shape is None:
        kind = "a group" if isinstance(item, h5py.Group) else "empty"
        raise ValueError(f"`{item.name}` is {kind}; expected arrays alone")
    return np.array(item.asstr()[()], str) if item.dtype.kind in "OS" else np.array(item[()])


_READERS = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), _text),
    **{".npz": _npz, ".npy": _npy, ".pt": _pt, ".pth": _pt, ".h5": _h5, ".hdf5": _h5},
}
#: The arrays of a table: kinds of NumPy's types, dimensions, and whether they must be there.
_ARRAYS = {
    "ids": ("Uiu", 1, True),
    "logits": ("fiu", 2, True),
    "class_names": ("U", 1, True),
    "splits": ("U", 1, False),
    "views": ("iu", 1, False),
}


def _check(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Raise UserError if an array is missing, unknown, or of another shape or type."""
    missing = [name for name, (*_, needed) in _ARRAYS.items() if needed > (name in arrays)]
    if missing or not arrays.keys() <= _ARRAYS.keys():
        raise UserError(
            f"`{path}` has the arrays {some(list(arrays))}; expected `ids`, `logits` and "
            "`class_names`, and `splits` and `views` where they are needed; or `logits` alone, in "
            "the order of data/prepared."
        )
    shape = arrays["logits"].shape
    rows, columns = shape if len(shape) == 2 else (None, None)
    for name in ("logits", *arrays):
        array = arrays[name]
        kinds, dimensions, _ = _ARRAYS[name]
        length = columns if name == "class_names" else rows
        if array.dtype.kind not in kinds or array.ndim != dimensions or len(array) != length:
            raise UserError(
                f"`{path}` has {name} {array.dtype} {list(array.shape)} and logits "
                f"{list(shape)}; expected ids [rows] of text, logits [rows, "
                "classes] of numbers, class_names [classes] of text, splits [rows] of text, views "
                "[rows] of integers."
            )
    arrays["ids"] = arrays["ids"].astype(str).astype(object)
    if "views" in arrays:  # places of rows are computed from them
        arrays["views"] = arrays["views"].astype(np.int64)


def _in_order_of_dataset(path: Path, logits: np.ndarray, dataset: Dataset) -> dict[str, np.ndarray]:
    """The ids, splits and classes of a bare array: rows of all splits one after the other."""
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    expected = (sum(sizes.values()), dataset.num_classes)
    if logits.shape != expected:
        parts = " + ".join(f"{size:,} of {name}" for name, size in sizes.items())
        raise UserError(
            f"`{path}` is {logits.dtype} {list(logits.shape)} without ids; expected numbers "
            f"{list(expected)}: a row for each image of data/prepared ({parts}) and a column for "
            "each class folder, in their order. Or save `ids`, `logits` and `class_names`."
        )
    ids = [sample_id for split in dataset.splits.values() for sample_id in split.sample_ids]
    return {
        "ids": np.array(ids),
        "splits": np.repeat(list(sizes), list(sizes.values())),
        "class_names": np.array(dataset.class_names),
    }
