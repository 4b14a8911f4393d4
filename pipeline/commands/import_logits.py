"""import_logits: make a store of a table of logits that another system computed.

Reads the table (docs/teachers.md defines its forms), data/prepared/ and `views`, `soft_targets` of
params.yaml; writes an ordinary store, which can be a teacher.
"""

from pipeline.runtime.command import run_command

import argparse
from pathlib import Path

import numpy as np
import torch

from pipeline.data.prepared.dataset import Dataset, open_dataset, verify_dataset
from pipeline.models.evaluation import check_imported
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import atomic_directory, sha256_of_file
from pipeline.runtime.params import load_section
from pipeline.runtime.validation import read_model
from pipeline.store.format.schema import INDEX, StoreIdentity, StoreIndex, shard_keys
from pipeline.store.format.views_by_split import canaries_of, open_views_by_split
from pipeline.store.importing.rows import MatchedTable, match
from pipeline.store.importing.table import read_table
from pipeline.store.writing.params import SoftTargetsParams
from pipeline.store.writing.shard_writer import write_index, write_shard
from pipeline.views.params import ViewsParams

DEFAULT = Path("models/imported/logits")


def import_logits(path: Path, store: Path) -> MatchedTable:
    """Check every row of a table, and write them as a store.

    Raises:
        UserError: the table is not for this dataset; lists every row, class or number that is
            wrong or missing; or the folder holds something else than a store. Nothing is written.
    """
    _check_replaceable(store)
    views = load_section(ViewsParams, "views")
    verify_dataset()
    dataset = open_dataset()
    table = match(read_table(path, dataset), dataset)
    if table.has_views and views.paired and table.num_views % 2:
        raise UserError(
            f"`{path}` has {counted(table.num_views, 'view')} of train, but in params.yaml `views` "
            "are pairs; expected both views of each: the weak one of pair p as view 2p, the strong "
            "one as view 2p + 1."
        )
    _write(table, dataset.resized(views.image_size), views, store)
    return table


def _check_replaceable(store: Path) -> None:
    """Refuse a file, and a folder that has anything but an index and the shards that it names."""
    expected = "expected a new folder, or a store, which is replaced"
    if store.is_file():
        raise UserError(f"`{store}` is a file; {expected}.")
    found = sorted(file.name for file in store.iterdir()) if store.exists() else []
    known = set()
    if INDEX in found:
        try:
            index = read_model(store / INDEX, StoreIndex, produced_by="-")
        except UserError:
            raise UserError(
                f"`{store / INDEX}` is not the index of a store that this version reads; "
                f"{expected}. Remove `{store}`, or name a new folder."
            ) from None
        known = {INDEX, *(key.file_name for key in index.shards())}
    if others := [name for name in found if name not in known]:
        raise UserError(f"`{store}` holds something else than a store, `{others[0]}`; {expected}.")


def _write(table: MatchedTable, dataset: Dataset, views: ViewsParams, store: Path) -> None:
    identity = StoreIdentity(
        dataset_fingerprint=dataset.fingerprint,
        teacher_fingerprint=sha256_of_file(table.table.path),
        policy=str(views.view_policy) if table.has_views else "none",
        seed=views.seed,
        image_size=views.image_size,
        encoding="dense",
        precision=load_section(SoftTargetsParams, "soft_targets").precision,
        num_classes=dataset.num_classes,
    )
    pixels = open_views_by_split(dataset, identity, torch.device("cpu"))
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    with atomic_directory(store) as directory:
        for key in shard_keys(sizes, table.num_views):
            samples = key.first_sample + np.arange(key.num_samples)
            split, logits = dataset.splits[key.split], table.logits(key.split, key.view, samples)
            check_imported(
                logits,
                dataset.class_names,
                str(table.table.path),
                lambda row, ids=split.sample_ids, s=samples: f"`{ids[s[row]]}`",
            )
            canaries = canaries_of(pixels, key)
            write_shard(
                directory / key.file_name, identity, key, logits, split.labels[samples], canaries
            )
        write_index(directory, identity, dataset.class_names, sizes, table.num_views, {})


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m pipeline.commands.import_logits", description=__doc__
    )
    parser.add_argument("table", type=Path, metavar="TABLE")
    parser.add_argument("store", nargs="?", type=Path, default=DEFAULT, metavar="STORE")
    arguments = parser.parse_args()
    table = import_logits(arguments.table, arguments.store)
    rows = sum(rows.size for rows in table.rows.values())
    print(f"{arguments.store}: {counted(rows, 'row')} of {arguments.table}")
    for remark in table.remarks:
        print(f"  {remark}")
    print(
        "To teach with them, set `teacher` of params.yaml to family: logits, network: (any name), "
        f"weights: logits, checkpoint: {arguments.store}"
    )


if __name__ == "__main__":
    run_command(main)
