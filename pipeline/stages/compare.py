"""compare: what distillation gained and lost, each student beside its baseline and the teacher.

Reads metrics, histories and predictions of the teacher and of each student in params.yaml, by
name, the networks' speed, and the test images; writes metrics/comparison.json and .csv,
metrics/training_curves.csv, and the report in reports/. What a clock measured is in reports/ alone.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pipeline.comparison import Answers, Comparison, compare
from pipeline.costs import Costs
from pipeline.dataset import AGAIN, AnySplit, Dataset, EncodedSplit, open_dataset
from pipeline.decoding import UNREADABLE, clean_boxes, decode_view
from pipeline.economics import Economics
from pipeline.errors import UserError, reported
from pipeline.files import atomic_directory, atomic_file, read_json, write_json
from pipeline.params.loading import read_params
from pipeline.params.students import student_names
from pipeline.report import THUMBNAIL, Origin, html_report
from pipeline.speed import SPEED, DeviceSpeed
from pipeline.summary import compact, markdown, on_screen

METRICS, PREDICTIONS, REPORTS = Path("metrics"), Path("predictions"), Path("reports")
STORE_INDEX = Path("data/soft_targets/store.json")
ORIGIN_KEYS = ("dataset_fingerprint", "teacher_fingerprint")
COSTS = ("parameters", "macs", "size_bytes")
KINDS = {"distilled": "students", "baseline": "baselines"}
COMPARED = ("validation", "test")


def read_costs(path: Path, stage: str) -> dict[str, int]:
    """Parameters, MACs and bytes, as the stage measured them.

    Raises:
        UserError: the file is absent, or lacks one of them; names the stage that writes it.
    """
    metrics = read_json(path, made_by=f"dvc repro {stage}")
    missing = [name for name in COSTS if name not in metrics]
    if missing:
        raise UserError(f"`{path}` lacks {', '.join(missing)}. Run `dvc repro --force {stage}`.")
    return {name: metrics[name] for name in COSTS}


def read_logits(path: Path, stage: str, dataset: Dataset) -> dict[str, np.ndarray]:
    """[N, C] raw logits of validation and test.

    Raises:
        UserError: the file is absent, damaged, or not of these images; says how to have it again.
    """
    again = f"Run `dvc pull {path}` if a remote holds it, or `dvc repro --force {stage}`."
    try:
        logits = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"`{path}` is absent or damaged ({error}). {again}") from None
    for name in COMPARED:
        expected = (len(dataset.splits[name]), dataset.num_classes)
        found = logits[name].shape if name in logits else None
        if found != expected:
            shown = "nothing" if found is None else list(found)
            raise UserError(
                f"`{path}` holds {shown} for {name}; expected logits {list(expected)} for "
                f"the images of data/prepared. {again}"
            )
        if not np.isfinite(logits[name]).all():
            raise UserError(
                f"`{path}` holds logits for {name} that are not finite: the training diverged. "
                "Lower its learning rate in params.yaml."
            )
    return logits


def read_answers(name: str, role: str, dataset: Dataset) -> Answers:
    if role == "teacher":
        place, stage = "teacher", "teacher"
    else:
        kind = KINDS[role]
        place, stage = f"{kind}/{name}", f"{kind.removesuffix('s')}@{name}"
    costs = read_costs(METRICS / f"{place}.json", stage)
    logits = read_logits(PREDICTIONS / f"{place}.safetensors", stage, dataset)
    return Answers(name, role, **{split: logits[split] for split in COMPARED}, **costs)


def training_curves(names: list[str]) -> pd.DataFrame:
    """Every epoch of every student and baseline."""
    curves = []
    for name in names:
        for role, kind in KINDS.items():
            path = METRICS / "history" / kind / f"{name}.csv"
            try:
                history = pd.read_csv(path)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"`{path}` cannot be read ({error}). Run "
                    f"`dvc repro --force {kind.removesuffix('s')}@{name}`."
                ) from None
            history.insert(0, "student", name)
            history.insert(1, "role", role)
            curves.append(history)
    return pd.concat(curves, ignore_index=True)


def read_store(dataset: Dataset) -> dict[str, Any]:
    """The index of the store that the students learned from.

    Raises:
        UserError: the students learned from a store of other images than these.
    """
    again = "dvc repro soft_targets"
    index = read_json(STORE_INDEX, made_by=again)
    missing = [key for key in ORIGIN_KEYS if key not in index]
    if missing:
        raise UserError(f"`{STORE_INDEX}` lacks {', '.join(missing)}. Run `{again}`.")
    if index["dataset_fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"`data/soft_targets`, from which the students learned, was written for dataset "
            f"{index['dataset_fingerprint'][:12]}…, but data/prepared is "
            f"{dataset.fingerprint[:12]}…. Run `dvc repro`."
        )
    return index


def economics(index: Mapping[str, Any], curves: pd.DataFrame) -> Economics:
    """
    Args:
        index: of the store.
        curves: one row per epoch of each training.

    Raises:
        UserError: the index does not say how much the store holds.
    """
    epochs = curves[curves["role"] == "distilled"].groupby("student", sort=False).size()
    try:
        return Economics(
            views=index["num_views"],
            training_images=index["splits"]["train"],
            held_out_images=sum(index["splits"][name] for name in COMPARED),
            epochs=epochs.to_dict(),
            bytes_per_row=index["fidelity"].get("bytes_per_row"),
        )
    except (KeyError, TypeError, AttributeError, ValidationError):
        raise UserError(
            f"`{STORE_INDEX}` does not say how many views of how many images the store holds; "
            "expected `num_views`, `splits` and `fidelity` as docs/soft_targets_format.md has "
            "them. Run `dvc repro --force soft_targets`."
        ) from None


def read_speed(names: list[str]) -> dict[str, DeviceSpeed]:
    """How fast the networks are, by the device's type.

    Raises:
        UserError: the file is absent, no such file, or of other students.
    """
    path, stage = METRICS / "speed.json", "speed"
    content = read_json(path, made_by=f"dvc repro {stage}")
    again = f"Run `dvc repro --force {stage}`."
    try:
        speed = SPEED.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise UserError(
            f"`{path}` is not what the stage `{stage}` writes: `{where}`: {first['msg']}. {again}"
        ) from None
    missing = [name for name in names if any(name not in d.students for d in speed.values())]
    if missing:
        raise UserError(f"`{path}` has no figures of {', '.join(missing)}. {again}")
    return speed


def clean_pixels(split: AnySplit, sample: int) -> np.ndarray:
    """[C, H, W] uint8, an image as networks are tested on it; decoded at the report's size.

    Raises:
        UserError: an encoded image cannot be read.
    """
    if not isinstance(split, EncodedSplit):
        return split.images[sample]
    size = split.sizes[sample]
    (box,) = clean_boxes(size[None], split.image_size)
    try:
        return decode_view(split.content(sample), size, box, THUMBNAIL, split.channels)
    except UNREADABLE as error:
        raise UserError(
            f"`{split.sample_ids[sample]}` of test cannot be read ({error}). Run `{AGAIN}`."
        ) from None


def models_table(comparison: Comparison) -> pd.DataFrame:
    """One row per model."""
    return pd.DataFrame([{"model": m.name, **m.figures} for m in comparison.models]).drop(
        columns="name"
    )


def class_table(comparison: Comparison) -> pd.DataFrame:
    """One row per class, one column of accuracies per model."""
    columns: dict[str, Any] = {
        "class": comparison.class_names,
        "test_images": np.bincount(comparison.labels, minlength=len(comparison.class_names)),
    }
    for model in comparison.models:
        name = model.name if model.role == "teacher" else f"{model.role}/{model.name}"
        columns[name] = model.class_accuracy
    return pd.DataFrame(columns)


def write_table(path: Path, table: pd.DataFrame) -> None:
    with atomic_file(path) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.compare", description=__doc__)
    parser.add_argument("--show", action="store_true", help="print the last comparison again")
    if parser.parse_args().show:
        print(on_screen(read_json(METRICS / "comparison.json", made_by="dvc repro compare")))
        return
    names, dataset = student_names(), open_dataset()
    index = read_store(dataset)
    teacher = read_answers("teacher", "teacher", dataset)
    students = {name: tuple(read_answers(name, role, dataset) for role in KINDS) for name in names}
    labels = {name: np.asarray(dataset.splits[name].labels) for name in COMPARED}
    comparison = compare(teacher, students, labels, dataset.class_names)
    if comparison.teacher.accuracy == 0:
        raise UserError(
            "the teacher names no test image's class, so nothing can be retained of its accuracy. "
            "Look at `teacher` in params.yaml: the order of the classes, `mean`, `std`, training."
        )
    curves = training_curves(names)
    pixels_of = partial(clean_pixels, dataset.splits["test"])
    costs = Costs(read_speed(names), economics(index, curves))
    fingerprints = {"dataset": dataset.fingerprint, "teacher": index["teacher_fingerprint"]}
    origin = Origin(params=read_params(), fingerprints=fingerprints)
    page = html_report(comparison, curves, pixels_of, origin, costs)
    with atomic_directory(REPORTS) as folder:
        (folder / "index.html").write_text(page, "utf-8")
        (folder / "comparison.md").write_text(markdown(comparison, costs), "utf-8")
        write_table(folder / "class_accuracy.csv", class_table(comparison))
    write_table(METRICS / "training_curves.csv", curves)
    write_table(METRICS / "comparison.csv", models_table(comparison))
    figures = compact(comparison) | {"cache": costs.economics.figures}
    write_json(METRICS / "comparison.json", figures)
    print(on_screen(figures))


if __name__ == "__main__":
    with reported():
        main()
