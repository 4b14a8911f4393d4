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
from pipeline.models.raw_logits import check_raw
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.outputs import STORE, TEACHER
from pipeline.runtime.params import load_section
from pipeline.store.format.encodings import decode, row_bytes
from pipeline.store.format.schema import INDEX, StoreIndex
from pipeline.store.format.views_by_split import open_views_by_split
from pipeline.store.reading.index import AGAIN, check_purpose, read_index
from pipeline.store.reading.store import Store, open_shards, open_store
from pipeline.store.reading.verification import differences
from pipeline.store.writing.fidelity import check_fidelity, store_fidelity
from pipeline.store.writing.imported_logits import ImportedLogits
from pipeline.store.writing.job import fidelity_advice
from pipeline.store.writing.teacher_logits import TeacherForward, open_teacher_logits
from pipeline.views.loader import BATCH_SIZE, batches_of
from pipeline.views.params import ViewsParams

#: By the precision of the forward pass: how far a stored logit may be from the recomputed one, as
#: a share of the row's span (1 at least). Storage in float16 takes half of the first value; other
#: batches, thread counts and processors take the rest.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
_OF_FLOAT32 = 1e-6  # beside it, a share of the row's largest magnitude: rounding of large offsets
_MEASURED_ROWS = 512  # of a store whose writer measured nothing
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
        no_labels = np.full(2, -1)  # then `decode` puts the label's logit at the largest class
        if identity.k:
            arrays["values"][:, identity.k] = arrays["values"][:, 0]
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
    """Check a store against the project: its identity, completeness, checksums and canaries, its
    numbers and their fidelity, and some rows against the teacher.

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
    if not problems:
        store = open_store(dataset, views, fingerprint, directory)
        _check_numbers(store)
        check_fidelity(
            _fidelity(store, dataset), f"the rows of `{directory}`", fidelity_advice(index)
        )
    if recompute and not problems:
        count = min(recompute, len(store))
        positions = sorted(random.Random(seed).sample(range(len(store)), count))
        problems = list(differences_to_teacher(store, _open_teacher(store, dataset), positions))
        verified += f"; {count:,} of them match the teacher's logits"
    if problems:
        raise UserError("\n".join([*problems, f"{counted(len(problems), 'difference')}."]))
    return f"{verified}."


def _check_numbers(store: Store) -> None:
    """Raise UserError if the rows are no logits: of each split, some of the first view."""
    for split, size in store.index.split_sizes.items():
        samples = np.arange(0, size, -(-size // _MEASURED_ROWS))
        rows = store.decoded_at(_FLAT).gather(0, samples, split=split).logits
        check_raw(
            rows,
            f"`{store.directory}` holds",
            f"Fix the teacher, then remove `{store.directory}` and run `{AGAIN}`.",
            lambda row, s=split, numbers=samples: f"{s}, sample {numbers[row]}",
        )


def _fidelity(store: Store, dataset: Dataset) -> dict[str, float]:
    """What the writer measured; measured now if it did not."""
    recorded = dict(store.index.fidelity)
    if "agreement" in recorded:
        if store.identity.encoding == "dense":  # an older store has this figure alone
            recorded.setdefault("kl_tail_as_one", recorded.get("kl_at_temperature_1", 0))
        return recorded
    teacher, samples = _open_teacher(store, dataset), store.index.split_sizes["train"]
    samples = np.arange(0, samples, -(-samples // _MEASURED_ROWS))
    exact = teacher.in_float32("train", 0, samples)
    return store_fidelity(
        teacher.logits("train", 0, samples) if exact is None else exact,
        dataset.splits["train"].labels[samples],
        store.encoded(samples, np.zeros_like(samples)),
    )


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
    """Compare rows up to a number that is the same for all of a row.

    Args:
        logits: [B, C] float32, the teacher's.
    """
    names, share = store.index.class_names, TOLERANCE[store.identity.precision]
    stored, kept = store.decoded_at(1.0).gather(view, samples)
    flat = store.decoded_at(_FLAT).gather(view, samples).logits
    tails = np.zeros_like(logits, bool) if kept is None else ~kept
    allowed = share * np.maximum(1, np.ptp(logits, axis=1)) + _OF_FLOAT32 * np.abs(logits).max(1)
    stored, logits = stored.astype(np.float64), logits.astype(np.float64)
    for sample, row, flat_row, tail, expected, width in zip(
        samples, stored, flat, tails, logits, allowed, strict=True
    ):
        differences, sums = (row - expected)[~tail], []
        if tail.any():
            lse = _log_sum_exp(row[tail]), _log_sum_exp(expected[tail])
            means = float(flat_row[tail].mean()), float(expected[tail].mean())
            wider = width + share * np.log(len(expected))
            sums = [("the tail's log-sum-exp", *lse, wider), ("the tail's mean", *means, wider)]
            differences = np.append(differences, [a - b for _, a, b, _ in sums])
        offset = np.median(differences)  # few wrong figures do not move it
        errors = np.where(tail, -1, np.abs(row - expected - offset))
        worst = int(errors.argmax())
        figure = (f"the logit of {names[worst]}", row[worst], expected[worst], width)
        for name, actual, unshifted, tolerance in (figure, *sums):
            correct = unshifted + offset
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
