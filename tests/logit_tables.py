"""Tables of a teacher's logits in every form, and the command that makes a store of them."""

import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.commands import import_logits
from pipeline.data.prepared.dataset import open_dataset

VIEWS = 3


def made_up_logits() -> dict[str, np.ndarray]:
    """By split, [views, N, C] float32: the labels, and noise."""
    rng = np.random.default_rng(2)
    return {
        name: (
            4 * np.eye(3)[split.labels]
            + rng.standard_normal((VIEWS if name == "train" else 1, len(split), 3))
        ).astype(np.float32)
        for name, split in open_dataset().splits.items()
    }


def table(logits: dict[str, np.ndarray], *, by_view: bool = True) -> dict[str, np.ndarray]:
    """The arrays of an .npz, rows and classes in another order."""
    dataset = open_dataset()
    parts = [
        (sample_id, name, view, row)
        for name, split in dataset.splits.items()
        for view in range(len(logits[name]) if by_view else 1)
        for sample_id, row in zip(split.sample_ids, logits[name][view], strict=True)
    ]
    order = np.random.default_rng(0).permutation(len(parts))
    ids, splits, views, rows = zip(*(parts[n] for n in order), strict=True)
    classes = [2, 0, 1]
    arrays = {
        "ids": np.array(ids),
        "logits": np.stack(rows)[:, classes],
        "class_names": np.array(dataset.class_names)[classes],
    }
    return arrays | ({"splits": np.array(splits), "views": np.array(views)} if by_view else {})


def write_text(path: str, arrays: dict[str, np.ndarray], **form: str) -> str:
    frame = pd.DataFrame(arrays["logits"], columns=arrays["class_names"])
    for column, name in (("id", "ids"), ("split", "splits"), ("view", "views")):
        if name in arrays:
            frame.insert(0, column, arrays[name])
    frame.to_csv(path, index=False, **form)
    return path


def write_npz(arrays: dict[str, np.ndarray]) -> str:
    np.savez("mine.npz", **arrays)
    return "mine.npz"


def write_pt(arrays: dict[str, np.ndarray]) -> str:
    content = {name: array.tolist() for name, array in arrays.items()}
    torch.save(content | {"logits": torch.from_numpy(arrays["logits"])}, "mine.pt")
    return "mine.pt"


def write_h5(arrays: dict[str, np.ndarray]) -> str:
    with h5py.File("mine.h5", "w") as file:
        for name, array in arrays.items():
            text = array.dtype.kind == "U"
            file.create_dataset(name, data=array.astype(object) if text else array)
    return "mine.h5"


WRITERS = {
    "csv": lambda arrays: write_text("mine.csv", arrays),
    "csv of a spreadsheet with decimal commas": lambda arrays: write_text(
        "mine.csv", arrays, sep=";", decimal=",", encoding="utf-8-sig"
    ),
    "tsv": lambda arrays: write_text("mine.tsv", arrays, sep="\t"),
    "npz": write_npz,
    "pt": write_pt,
    "h5": write_h5,
}


def import_table(path: str, store: str = "mine") -> str:
    """Run the command in this process; return the store's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["import_logits", path, store])
        import_logits.main()
    assert (Path(store) / "store.json").is_file()
    return store
