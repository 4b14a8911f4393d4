"""Inspect and verify the soft-target store.

python -m pipeline.commands.store inspect [STORE]
python -m pipeline.commands.store verify [STORE] [--recompute N]
"""

from pipeline.runtime.command import run_command

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.compute.device import default_device
from pipeline.data.prepared.dataset import Dataset, open_dataset
from pipeline.models import checkpoint
from pipeline.models.evaluation import BATCH_SIZE, batches_of
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.outputs import STORE, TEACHER
from pipeline.runtime.params import load_section
from pipeline.store.format.encodings import decode, row_bytes
from pipeline.store.format.schema import INDEX, StoreIndex
from pipeline.store.format.views_by_split import open_views_by_split
from pipeline.store.reading.index import check_purpose, read_index
from pipeline.store.reading.store import Store, open_shards, open_store
from pipeline.store.reading.verification import differences
from pipeline.store.writing.imported_logits import ImportedLogits
from pipeline.store.writing.teacher_logits import TeacherForward, open_teacher_logits
from pipeline.views.params import ViewsParams

#: By the precision of the forward pass: how far a stored logit may be from the recomputed one, as
#: a share of the row's largest magnitude (1 at least). Storage in float16 takes half of the first
#: value; other batches, thread counts and processors take the rest.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
_BATCH_ROWS = 16_384  # rows that are recomputed at once: bounds the memory
_FLAT = 1e9  # so high a temperature that every class of a tail has the tail's mean


def inspect(directory: Path) -> Iterator[str]:
    """Describe a store, line by line, without its dataset or teacher."""
    index = read_index(directory)
    store = open_shards(directory, index, {})
    k = f", k = {index.k}" if index.k else ""
    fidelity = ", ".join(f"{key} {value}" for key, value in index.fidelity.items())
    yield f"{directory}: format {index.format_version}"
    for name, value in {
        "dataset": index.dataset_fingerprint,
        "teacher": f"{index.teacher_fingerprint}, forward pass in {index.precision}",
        "views": f"{index.policy}, seed {index.seed}, {index.image_size} pixels",
        "encoding": f"{index.encoding}{k}, of {index.num_classes:,} classes",
        "rows": _describe_rows(index),
        "size": _describe_size(directory, index),
        "fidelity": fidelity or "not measured",
    }.items():
        yield f"  {name:10}{value}"
    yield from (f"  {line}" for line in _example_rows(store))


def _describe_rows(index: StoreIndex) -> str:
    splits = ", ".join(
        f"{name} {size:,}" + (f" x {counted(index.num_views, 'view')}" if name == "train" else "")
        for name, size in index.split_sizes.items()
    )
    keys = list(index.shards())
    rows, shards = sum(key.num_samples for key in keys), counted(len(keys), "shard")
    return f"{splits}: {rows:,} in all, in {shards}"


def _describe_size(directory: Path, index: StoreIndex) -> str:
    sizes = {key: (directory / key.file_name).stat().st_size for key in index.shards()}
    train = [key for key in sizes if key.split == "train"]
    per_view = sum(sizes[key] for key in train) / sum(key.num_samples for key in train)
    return (
        f"{sum(sizes.values()):,} bytes; {per_view:,.1f} per view of an image, "
        f"{row_bytes(index.encoding, index.num_classes, index.k):,} of them its row"
    )


def _example_rows(store: Store) -> Iterator[str]:
    """The largest logits of each split's first and last row."""
    identity, names = store.identity, store.index.class_names
    for split, size in store.index.split_sizes.items():
        last = store.num_views - 1 if split == "train" else 0
        samples, views = np.array([0, size - 1]), np.array([0, last])
        arrays = store.encoded(samples, views, split=split)
        no_labels = np.full(2, -1)  # the k largest logits do not depend on them
        try:
            logits, _ = decode(arrays, no_labels, identity.num_classes, temperature=1.0)
        except ValueError as error:  # rows are not verified here
            raise UserError(
                f"`{store.directory}` is damaged in {split}: {error}. Run "
                "`python -m pipeline.commands.store verify` to list the damaged shards."
            ) from None
        for row, sample, view in zip(logits, samples, views, strict=True):
            largest = np.argsort(-row, kind="stable")[: min(3, identity.k or identity.num_classes)]
            classes = ", ".join(f"{names[c]} {row[c]:.2f}" for c in largest)
            yield f"{split} view {view} sample {sample}: {classes}"


def verify(directory: Path, recompute: int, seed: int) -> str:
    """Check a store against the project: its identity, completeness, checksums and canaries, and
    some rows against the teacher.

    Args:
        recompute: training rows to compare with the teacher's logits.
        seed: of the choice of these rows.

    Returns:
        what was verified.

    Raises:
        UserError: lists every difference.
    """
    views = load_section(ViewsParams, "views")
    dataset = open_dataset().resized(views.image_size)
    fingerprint = checkpoint.fingerprint(TEACHER.model, produced_by="dvc repro teacher")
    index = read_index(directory)
    check_purpose(directory, index, dataset, views, fingerprint)
    problems = [*differences(directory, index, dataset), *_unknown_files(directory, index)]
    rows = sum(key.num_samples for key in index.shards())
    verified = f"{directory}: all {rows:,} rows are as written, and for these images and views"
    if recompute and not problems:
        store = open_store(dataset, views, fingerprint, directory)
        count = min(recompute, len(store))
        positions = sorted(random.Random(seed).sample(range(len(store)), count))
        problems = list(differences_to_teacher(store, _open_teacher(store, dataset), positions))
        verified += f"; {count:,} of them match the teacher's logits"
    if problems:
        raise UserError("\n".join([*problems, f"{counted(len(problems), 'difference')}."]))
    return f"{verified}."


def _unknown_files(directory: Path, index: StoreIndex) -> Iterator[str]:
    expected = {INDEX, *(key.file_name for key in index.shards())}
    for path in sorted(directory.iterdir()):
        if path.name not in expected:
            yield f"`{path}` is not part of the store that `{INDEX}` describes."


def _open_teacher(store: Store, dataset: Dataset) -> TeacherForward | ImportedLogits:
    device, identity = default_device(), store.identity
    views = open_views_by_split(dataset, identity, device)
    return open_teacher_logits(
        dataset, identity, store.num_views, views, batch_size=BATCH_SIZE, device=device
    )


def differences_to_teacher(
    store: Store, teacher: TeacherForward | ImportedLogits, positions: list[int]
) -> Iterator[str]:
    """Recompute training rows. Yield a line with the first difference of each that differs.

    Args:
        positions: of the rows, as the store counts them.
    """
    views, samples = np.divmod(positions, store.index.split_sizes["train"])
    for view in np.unique(views).tolist():
        of_view = samples[views == view]
        for batch in batches_of(of_view, _BATCH_ROWS):
            logits = teacher.logits("train", view, batch)
            yield from _batch_differences(store, view, batch, logits)


def _batch_differences(
    store: Store, view: int, samples: np.ndarray, logits: np.ndarray
) -> Iterator[str]:
    """Args: logits: [B, C] float32, the teacher's."""
    names, share = store.index.class_names, TOLERANCE[store.identity.precision]
    stored, kept = store.decoded_at(1.0).gather(view, samples)
    flat = store.decoded_at(_FLAT).gather(view, samples).logits
    tails = np.zeros_like(logits, bool) if kept is None else ~kept
    scales = np.maximum(1, np.abs(logits).max(1))
    for sample, row, flat_row, tail, expected, scale in zip(
        samples, stored, flat, tails, logits, scales, strict=True
    ):
        errors = np.where(tail, 0, np.abs(row.astype(np.float32) - expected))
        worst = int(errors.argmax())
        figures = [(f"the logit of {names[worst]}", row[worst], expected[worst], share * scale)]
        if tail.any():
            tolerance = share * (scale + np.log(len(expected)))
            sums = _log_sum_exp(row[tail]), _log_sum_exp(expected[tail])
            means = flat_row[tail].mean(), expected[tail].mean()
            figures.append(("the tail's log-sum-exp", *sums, tolerance))
            figures.append(("the tail's mean", *means, tolerance))
        for name, actual, correct, tolerance in figures:
            if not abs(actual - correct) <= tolerance:  # also if it is not a number
                yield (
                    f"train view {view} sample {sample}: {name} is {actual:.4f}, the teacher's "
                    f"{correct:.4f} (tolerance {tolerance:.4f})."
                )
                break


def _log_sum_exp(logits: np.ndarray) -> float:
    return float(np.logaddexp.reduce(logits.astype(np.float64)))


def _parse_rows(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows; expected 0 or more")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.commands.store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    location = argparse.ArgumentParser(add_help=False)
    location.add_argument("store", nargs="?", type=Path, default=STORE, metavar="STORE")
    commands.add_parser("inspect", parents=[location], help="describe a store; print a few rows")
    command = commands.add_parser(
        "verify",
        parents=[location],
        help="check a store against the project; the exit code is not 0 if anything differs",
    )
    command.add_argument(
        "--recompute",
        type=_parse_rows,
        default=0,
        metavar="N",
        help="compare N random training rows with the teacher's logits",
    )
    command.add_argument("--seed", type=int, default=0, help="of the choice of rows")
    arguments = parser.parse_args()
    if arguments.command == "inspect":
        print("\n".join(inspect(arguments.store)))
    else:
        print(verify(arguments.store, arguments.recompute, arguments.seed))


if __name__ == "__main__":
    run_command(main)
