"""Look into the soft-target store, and prove it.

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
from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint
from pipeline.models.evaluation import BATCH_SIZE
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import STORE, TEACHER
from pipeline.runtime.params import load_section
from pipeline.store.format.encodings import decode, row_bytes
from pipeline.store.format.schema import INDEX
from pipeline.store.format.shards import read_header
from pipeline.store.reading.store import (
    Store,
    StoreIndex,
    check_purpose,
    differences,
    open_shards,
    open_store,
    read_index,
)
from pipeline.store.writing.teacher_logits import (
    ImportedLogits,
    TeacherForward,
    open_teacher_logits,
    open_views_by_split,
)
from pipeline.views.params import ViewsParams

#: How far a stored logit may be from the teacher's answer now, by the precision of the forward
#: pass, as a share of the row's largest magnitude (1 at least): the storage in float16 takes half
#: of the first; other batches, thread counts and processors the rest.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
_AT_A_TIME = 16_384  # rows that the teacher is asked for: bounds the memory
_FLAT = 1e9  # a temperature so high that a tail's every class has its mean


def inspect(directory: Path) -> Iterator[str]:
    """What a store is, line by line, without its dataset or teacher."""
    index = read_index(directory)
    store, identity = open_shards(directory, index, {}), index.identity
    keys = list(index.shards())
    files = {key: (directory / key.file_name).stat().st_size for key in keys}
    train = [key for key in keys if key.split == "train"]
    per_view = sum(files[key] for key in train) / sum(key.num_samples for key in train)
    data = row_bytes(identity.encoding, identity.num_classes, identity.k)
    k = f", k = {identity.k}" if identity.k else ""
    splits = ", ".join(
        f"{name} {size:,}" + (f" x {index.num_views} views" if name == "train" else "")
        for name, size in index.split_sizes.items()
    )
    rows = sum(key.num_samples for key in keys)
    yield f"{directory}: format {index.format_version}"
    yield f"  dataset   {identity.dataset_fingerprint}"
    yield f"  teacher   {identity.teacher_fingerprint}, forward pass in {identity.precision}"
    yield f"  views     {identity.policy}, seed {identity.seed}, {identity.image_size} pixels"
    yield f"  encoding  {identity.encoding}{k}, of {identity.num_classes:,} classes"
    yield f"  rows      {splits}: {rows:,} in all, in {len(keys)} shards"
    yield (
        f"  size      {sum(files.values()):,} bytes; {per_view:,.1f} per view of an image, "
        f"{data:,} of them its row"
    )
    measured = ", ".join(f"{key} {value}" for key, value in index.fidelity.items())
    yield f"  fidelity  {measured or 'not measured'}"
    yield from (f"  {line}" for line in _few_rows(store))


def _few_rows(store: Store) -> Iterator[str]:
    """The largest logits of the first and the last row of each split."""
    identity, names = store.identity, _class_names(store)
    for split, size in store.index.split_sizes.items():
        last = store.num_views - 1 if split == "train" else 0
        samples, views = np.array([0, size - 1]), np.array([0, last])
        arrays = store.encoded(samples, views, split=split)
        # Without labels: the k largest have their logits all the same.
        unlabelled = np.full(2, -1)
        try:
            logits, _ = decode(arrays, unlabelled, identity.num_classes, temperature=1.0)
        except ValueError as error:  # rows are not verified here
            raise UserError(
                f"`{store.directory}` is damaged in {split}: {error}. "
                "`python -m pipeline.commands.store verify` tells which shards are."
            ) from None
        for row, sample, view in zip(logits, samples, views, strict=True):
            largest = np.argsort(-row, kind="stable")[: min(3, identity.k or identity.num_classes)]
            shown = ", ".join(f"{names[c]} {row[c]:.2f}" for c in largest)
            yield f"{split} view {view} sample {sample}: {shown}"


def _class_names(store: Store) -> list[str]:
    if store.index.format_version > 1:
        return list(store.index.class_names)
    key = next(store.index.shards())
    names = read_header(store.directory / key.file_name).arrays["class_names"].map()
    return [name.decode() for name in names.tolist()]


def verify(directory: Path, recompute: int, seed: int) -> str:
    """Check all of a store against the project: what it is for, completeness, checksums, canaries,
    and rows against the teacher.

    Returns:
        what was verified.

    Raises:
        UserError: names every difference.
    """
    views = load_section(ViewsParams, "views")
    dataset = open_dataset().resized(views.image_size)
    fingerprint = checkpoint.fingerprint(TEACHER.model, produced_by="dvc repro teacher")
    index = read_index(directory)
    check_purpose(directory, index, dataset, views, fingerprint)
    found = [*differences(directory, index, dataset), *_surplus(directory, index)]
    rows = sum(key.num_samples for key in index.shards())
    verified = f"{directory}: all {rows:,} rows are as written, and for these images and views"
    if recompute and not found:
        store = open_store(dataset, views, fingerprint, directory)
        device, identity = default_device(), store.identity
        teacher = open_teacher_logits(
            dataset,
            identity,
            store.num_views,
            open_views_by_split(dataset, identity, device),
            batch_size=BATCH_SIZE,
            device=device,
        )
        count = min(recompute, len(store))
        positions = sorted(random.Random(seed).sample(range(len(store)), count))
        found = list(differences_to_teacher(store, teacher, positions))
        verified += f"; {count:,} of them are the teacher's answers"
    if found:
        raise UserError("\n".join([*found, f"{len(found)} differences."]))
    return f"{verified}."


def _surplus(directory: Path, index: StoreIndex) -> Iterator[str]:
    expected = {INDEX, *(key.file_name for key in index.shards())}
    for path in sorted(directory.iterdir()):
        if path.name not in expected:
            yield f"`{path}` is no part of the store that `{INDEX}` describes."


def differences_to_teacher(
    store: Store, teacher: TeacherForward | ImportedLogits, positions: list[int]
) -> Iterator[str]:
    """Rows that are not the teacher's answers now, within TOLERANCE.

    Args:
        positions: of training rows, as the store counts them.
    """
    views, samples = np.divmod(positions, store.index.split_sizes["train"])
    for view in np.unique(views).tolist():
        of_view = samples[views == view]
        for part in np.split(of_view, range(_AT_A_TIME, len(of_view), _AT_A_TIME)):
            answers = teacher.logits("train", view, part)
            differences = _row_differences(store, view, part, answers)
            for sample, found in zip(part, differences, strict=True):
                if found:
                    yield f"train view {view} sample {sample}: {found}."


def _row_differences(
    store: Store, view: int, samples: np.ndarray, answers: np.ndarray
) -> Iterator[str | None]:
    """For each row, what differs most, if anything does."""
    names, tolerance = _class_names(store), TOLERANCE[store.identity.precision]
    stored, kept = store.decoded_at(1.0).gather(view, samples)
    flat = store.decoded_at(_FLAT).gather(view, samples).logits
    kept = np.ones_like(answers, bool) if kept is None else kept
    scale = np.maximum(1, np.abs(answers).max(1))
    for i, answer in enumerate(answers):
        wrong = np.where(kept[i], np.abs(stored[i].astype(np.float32) - answer), 0)
        worst = int(wrong.argmax())
        allowed = tolerance * scale[i]
        if not wrong[worst] <= allowed:
            yield _told(f"the logit of {names[worst]}", stored[i, worst], answer[worst], allowed)
            continue
        tail = ~kept[i]
        if not tail.any():
            yield None
            continue
        sums = {
            "the tail's log-sum-exp": (_log_sum_exp(stored[i, tail]), _log_sum_exp(answer[tail])),
            "the tail's mean": (flat[i, tail].mean(), answer[tail].mean()),
        }
        allowed = tolerance * (scale[i] + np.log(len(answer)))
        wrong_sums = [
            _told(name, found, expected, allowed)
            for name, (found, expected) in sums.items()
            if not abs(found - expected) <= allowed
        ]
        yield wrong_sums[0] if wrong_sums else None


def _told(name: str, found: float, expected: float, allowed: float) -> str:
    return f"{name} is {found:.4f}, the teacher answers {expected:.4f} (tolerance {allowed:.4f})"


def _log_sum_exp(logits: np.ndarray) -> float:
    return float(np.logaddexp.reduce(logits.astype(np.float64)))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows; expected 0 or more")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.commands.store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("inspect", "print what a store is, and a few rows"),
        ("verify", "check a store against the project; the exit code is not 0 if anything differs"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("store", nargs="?", type=Path, default=STORE, metavar="STORE")
        if name == "verify":
            command.add_argument(
                "--recompute",
                type=_count,
                default=0,
                metavar="N",
                help="ask the teacher again for N random training rows, and compare",
            )
            command.add_argument("--seed", type=int, default=0, help="of the choice of rows")
    arguments = parser.parse_args()
    if arguments.command == "inspect":
        print("\n".join(inspect(arguments.store)))
    else:
        print(verify(arguments.store, arguments.recompute, arguments.seed))


if __name__ == "__main__":
    run_command(main)
