"""Find the row of every image in a table of logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.data.prepared.dataset import SPLITS, Dataset
from pipeline.runtime.errors import UserError, counted, did_you_mean, look_alike
from pipeline.store.importing.table import Table, some


@dataclass(frozen=True)
class MatchedTable:
    """A table, and the place in it of every logit of the dataset."""

    table: Table
    columns: np.ndarray  # [C] the column of each class
    rows: Mapping[str, np.ndarray]  # by split, [views or 1, N] the row of each sample
    remarks: Sequence[str]  # for the user

    @property
    def has_views(self) -> bool:
        return self.table.views is not None

    @property
    def num_views(self) -> int:
        return len(self.rows["train"])

    def logits(self, split: str, view: int, samples: np.ndarray) -> np.ndarray:
        """[n, C] float32."""
        with np.errstate(over="ignore"):  # refused as too large
            rows = self.table.logits[self.rows[split][view, samples]]
            return rows[:, self.columns].astype(np.float32)


def match(table: Table, dataset: Dataset) -> MatchedTable:
    """Find the column of each class and the row of each image, or of each view of it.

    Raises:
        UserError: lists every class and row that is missing, unknown or there twice.
    """
    columns = _columns_of_classes(table, dataset.class_names)
    samples = _samples_of_rows(table, dataset)
    num_views = 1 if table.views is None else _number_of_views(table, samples)
    rows, problems = {}, []
    for name, split in dataset.splits.items():
        views = num_views if name == "train" else 1
        rows[name], found = _one_row_each(table, samples[name], split.sample_ids, name, views)
        problems += found
    unknown = np.flatnonzero(np.all([numbers < 0 for numbers in samples.values()], 0))
    surplus = counted(len(unknown), "row is", "rows are")
    surplus += f" of no image of data/prepared: {some(table.ids[unknown])}"
    if problems:
        known = (sample_id for split in dataset.splits.values() for sample_id in split.sample_ids)
        alike = look_alike(known, table.ids[unknown])
        problems += [surplus + alike] if len(unknown) else []
        raise UserError(
            "\n  ".join([f"`{table.path}` has not one row for every image:", *problems])
            + "\nThe ids are those of data/prepared/train_ids.json, and of the other splits'."
        )
    remarks = [surplus] if len(unknown) else []
    if table.in_order:
        remarks.append(
            "no ids: its rows were taken in the order of data/prepared (train, validation, test), "
            "its columns in the order of the class folders"
        )
    if table.views is None:
        remarks.append("one row per image, which is used for every view of it")
    return MatchedTable(table, columns, rows, remarks)


def _columns_of_classes(table: Table, expected: Sequence[str]) -> np.ndarray:
    """[C] the column of each class, by name."""
    number = {name: column for column, name in enumerate(table.class_names)}
    missing = [name for name in expected if name not in number]
    known = set(expected)
    unknown = [name for name in number if name not in known]
    if missing or unknown or len(number) < len(table.class_names):
        advice = look_alike(missing, unknown)
        advice = advice or (did_you_mean(missing[0], unknown) if missing else "")
        raise UserError(
            f"`{table.path}` has logits for {len(table.class_names)} classes: {len(missing)} of "
            f"the {len(expected)} class folders are not among them"
            f"{f' ({some(missing)}{advice})' if missing else ''}, {len(unknown)} are no class "
            f"folder{f' ({some(unknown)})' if unknown else ''}. Expected each class folder's name "
            "once."
        )
    return np.array([number[name] for name in expected])


def _samples_of_rows(table: Table, dataset: Dataset) -> dict[str, np.ndarray]:
    """By split, [rows] the sample number of each row, -1 for none."""
    if table.splits is not None:
        unknown = [split for split in pd.unique(table.splits) if split not in SPLITS]
        if unknown:
            raise UserError(
                f"`{table.path}` has the split {some(unknown)}; expected {some(SPLITS)}."
            )
    samples = {}
    for name, split in dataset.splits.items():
        samples[name] = pd.Index(split.sample_ids, dtype=object).get_indexer(table.ids)
        if table.splits is not None:
            samples[name][table.splits != name] = -1
    several = np.sum([numbers >= 0 for numbers in samples.values()], 0) > 1
    if several.any():
        number = counted(np.count_nonzero(several), "id is", "ids are")
        raise UserError(
            f"`{table.path}`: {number} in two splits: "
            f"{some(table.ids[several])}. Name the split of each row: add a column `split` (in a "
            f"file of arrays: `splits`) of {some(SPLITS)}."
        )
    return samples


def _number_of_views(table: Table, samples: Mapping[str, np.ndarray]) -> int:
    """The number of views of the training images; the others have one, without augmentation.

    Raises:
        UserError: a view is impossible, or there is a gap between views.
    """
    train = samples["train"] >= 0
    held_out = (samples["validation"] >= 0) | (samples["test"] >= 0)
    for wrong, problem in (
        (train & (table.views < 0), "of train without a view; expected numbers from 0"),
        (held_out & (table.views > 0), "of validation and test with a view; expected none, or 0"),
    ):
        if wrong.any():
            raise UserError(
                f"`{table.path}`: {counted(np.count_nonzero(wrong), 'row')} {problem}: "
                f"{some(table.ids[wrong])}."
            )
    views = np.unique(table.views[train])
    if not np.array_equal(views, np.arange(len(views))):
        raise UserError(
            f"`{table.path}` has the views {some(views)} of train; expected 0, 1 and so on, none "
            "left out."
        )
    return max(1, len(views))


def _one_row_each(
    table: Table, samples: np.ndarray, sample_ids: Sequence[str], split: str, num_views: int
) -> tuple[np.ndarray, list[str]]:
    """The row of each sample in each view, [num_views, N]; and the problems."""
    size, known = len(sample_ids), np.flatnonzero(samples >= 0)
    views = table.views[known] if num_views > 1 else 0
    places = views * size + samples[known]  # [known rows]
    rows = np.full(num_views * size, -1)
    rows[places] = known
    problems = []
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        of_view = [
            sample_ids[place % size] + (f" in view {place // size}" if num_views > 1 else "")
            for place in missing[:3].tolist()
        ]
        images = counted(size, "image") + (f" in {num_views} views" if num_views > 1 else "")
        problems.append(
            f"{counted(len(missing), 'row is', 'rows are')} missing of {split}, {images}: "
            f"{some(of_view, len(missing))}"
        )
    twice = known[rows[places] != known]
    if len(twice):
        number = counted(len(twice), f"row of {split} is", f"rows of {split} are")
        problems.append(f"{number} there twice: {some(table.ids[twice])}")
    return rows.reshape(num_views, size), problems
