"""compare: what distillation gained and lost, each student beside its baseline and the teacher.

Reads metrics, histories and predictions of the teacher and of each student in params.yaml, by
name, the networks' speed, and the test images; writes metrics/comparison.json and .csv,
metrics/training_curves.csv, and the report in reports/. What a clock measured is in reports/ alone.
"""

from pipeline.runtime.command import run_command

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from pipeline.comparison.cache_economics import Economics
from pipeline.comparison.compare import Comparison, Predictions, compare
from pipeline.comparison.measurement.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    chosen_samples,
    corrupted,
)
from pipeline.comparison.measurement.latency import SPEED, DeviceSpeed
from pipeline.comparison.report.costs import Costs
from pipeline.comparison.report.html import THUMBNAIL
from pipeline.comparison.report.page import Origin, html_report
from pipeline.comparison.report.robustness import SHOWN_SEVERITY
from pipeline.comparison.report.summary import (
    console_table,
    headline_figures,
    markdown,
    robust_figures,
)
from pipeline.comparison.robustness import (
    CorruptionPredictions,
    RobustComparison,
    compare_robustness,
)
from pipeline.data.prepared.dataset import (
    AGAIN,
    AnySplit,
    Dataset,
    EncodedSplit,
    open_dataset,
    verify_dataset,
)
from pipeline.data.prepared.image_decoding import UNREADABLE, clean_boxes, decode_view
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import (
    atomic_directory,
    canonical_json,
    read_json,
    recovery_hint,
    write_bytes,
    write_json,
)
from pipeline.runtime.params import PARAMS_FILE, read_params, student_names
from pipeline.runtime.stage_inputs import StageInputs

METRICS, PREDICTIONS, REPORTS = Path("metrics"), Path("predictions"), Path("reports")
STORE_INDEX = Path("data/soft_targets/store.json")
ORIGIN_KEYS = ("dataset_fingerprint", "teacher_fingerprint")
COSTS = ("parameters", "macs", "size_bytes")
KINDS = {"distilled": "students", "baseline": "baselines"}
COMPARED = ("validation", "test")


def read_costs(path: Path, stage: str) -> dict[str, int]:
    """Parameters, MACs and bytes, as the stage measured them.

    Raises:
        UserError: the file, or one of them, is absent or damaged; names the stage that writes it.
    """
    metrics = read_json(path, produced_by=f"dvc repro {stage}")
    missing = [name for name in COSTS if name not in metrics]
    if missing:
        raise UserError(f"`{path}` lacks {', '.join(missing)}. Run `dvc repro --force {stage}`.")
    wrong = [name for name in COSTS if type(metrics[name]) is not int or metrics[name] < 0]
    if wrong:
        raise UserError(
            f"`{path}` has {wrong[0]} {metrics[wrong[0]]!r}; expected a whole number. Run "
            f"`dvc repro --force {stage}`."
        )
    return {name: metrics[name] for name in COSTS}


def remedy(path: Path, stage: str) -> str:
    """How to have a stage's predictions again."""
    return recovery_hint(path, f"dvc repro --force {stage}")


def read_tensors(path: Path, again: str) -> dict[str, np.ndarray]:
    """Raises: UserError: the file is absent or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"`{path}` is absent or damaged ({error}). {again}") from None


def read_logits(path: Path, stage: str, dataset: Dataset) -> dict[str, np.ndarray]:
    """[N, C] raw logits of validation and test.

    Raises:
        UserError: the file is absent, damaged, or not of these images; says how to have it again.
    """
    again = remedy(path, stage)
    logits = read_tensors(path, again)
    for name in COMPARED:
        expected = (len(dataset.splits[name]), dataset.num_classes)
        found = logits[name].shape if name in logits else None
        if found != expected:
            shown = "nothing" if found is None else list(found)
            raise UserError(
                f"`{path}` holds {shown} for {name}; expected logits {list(expected)} for "
                f"the images of data/prepared. {again}"
            )
        if logits[name].dtype != np.float32:
            raise UserError(
                f"`{path}` holds {logits[name].dtype} for {name}; expected float32. {again}"
            )
        if not np.isfinite(logits[name]).all():
            raise UserError(
                f"`{path}` holds logits for {name} that are not finite: the training diverged. "
                "Lower its learning rate in params.yaml."
            )
    return logits


def check_made_from(path: Path, stage: str, inputs: StageInputs) -> None:
    """Args: inputs: of the stage that writes the predictions, as they are now.

    Raises:
        UserError: the predictions are not of these parameters, whatever DVC has recorded.
    """
    with safe_open(path, "numpy") as file:
        made_from = json.loads((file.metadata() or {}).get("made_from", "{}"))
    for key, now in json.loads(canonical_json(inputs.params)).items():
        if key in made_from and made_from[key] != now:
            raise UserError(
                f"`{path}` was made when `{PARAMS_FILE}: {key}` was {json.dumps(made_from[key])}; "
                f"now that is {json.dumps(now)}. Run `dvc repro --force --single-item {stage}`, "
                "then `dvc repro`."
            )


def read_answers(name: str, role: str, dataset: Dataset) -> Predictions:
    if role == "teacher":
        place, stage, inputs = "teacher", "teacher", StageInputs("teacher")
    else:
        kind = KINDS[role]
        singular = kind.removesuffix("s")
        place, stage, inputs = f"{kind}/{name}", f"{singular}@{name}", StageInputs(singular, name)
    no_network = role == "teacher" and read_params()["teacher"]["weights"] == "logits"
    costs = dict.fromkeys(COSTS) if no_network else read_costs(METRICS / f"{place}.json", stage)
    predictions = PREDICTIONS / f"{place}.safetensors"
    logits = read_logits(predictions, stage, dataset)
    check_made_from(predictions, stage, inputs)
    return Predictions(name, role, **{split: logits[split] for split in COMPARED}, **costs)


def read_history(path: Path, kind: str, name: str) -> pd.DataFrame:
    """A training's epochs, one a row.

    Raises:
        UserError: the file is absent, or is not what a training writes.
    """
    again = f"Run `dvc repro --force {kind.removesuffix('s')}@{name}`."
    if not path.is_file():
        raise UserError(f"`{path}` is absent. {again}")
    try:
        history = pd.read_csv(path)
        epochs, accuracies = history["epoch"].tolist(), history["validation_accuracy"]
        whole = epochs == list(range(1, len(epochs) + 1)) and accuracies.between(0, 1).all()
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise UserError(f"`{path}` cannot be read ({error}). {again}") from None
    if not (epochs and whole):
        raise UserError(
            f"`{path}` is damaged; expected a row for each epoch from 1, and in each "
            f"`validation_accuracy` from 0 to 1. {again}"
        )
    return history


def read_decisions(place: str, stage: str, dataset: Dataset) -> CorruptionPredictions | None:
    """What a network names for corrupted test images; None for a teacher without a network.

    Raises:
        UserError: the file is absent, damaged, or not of these images and corruptions.
    """
    path = PREDICTIONS / "robustness" / f"{place}.safetensors"
    again = remedy(path, stage)
    found = read_tensors(path, again)
    samples = chosen_samples(len(dataset.splits["test"]))
    if place == "teacher" and list(found) == ["samples"]:
        return None
    clean = list(samples.shape)
    expected = {
        "clean": f"int32 {clean}",
        "decisions": f"int32 {[len(CORRUPTIONS), len(SEVERITIES), *clean]}",
        "samples": f"int32 {clean}",
    }
    held = {name: f"{found[name].dtype} {list(found[name].shape)}" for name in sorted(found)}
    if held != expected or not np.array_equal(found["samples"], samples):
        other = ", of other test images" if held == expected else ""
        raise UserError(
            f"`{path}` holds {told(held)}{other}; expected {told(expected)}, of "
            f"{len(samples):,} test images of data/prepared, evenly spread. {again}"
        )
    return CorruptionPredictions(found["clean"], found["decisions"])


def told(arrays: Mapping[str, str]) -> str:
    return ", ".join(" ".join(item) for item in arrays.items())


def read_robustness(names: list[str], dataset: Dataset) -> RobustComparison:
    test = dataset.splits["test"]
    return compare_robustness(
        read_decisions("teacher", "robustness_teacher", dataset),
        {
            name: tuple(
                read_decisions(f"{kind}/{name}", f"robustness@{name}", dataset)
                for kind in KINDS.values()
            )
            for name in names
        },
        np.asarray(test.labels)[chosen_samples(len(test))],
    )


def training_curves(names: list[str]) -> pd.DataFrame:
    """Every epoch of every student and baseline."""
    curves = []
    for name in names:
        for role, kind in KINDS.items():
            history = read_history(METRICS / "history" / kind / f"{name}.csv", kind, name)
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
    index = read_json(STORE_INDEX, produced_by=again)
    missing = [key for key in ORIGIN_KEYS if not isinstance(index.get(key), str)]
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
    content = read_json(path, produced_by=f"dvc repro {stage}")
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


def clean_pixels(split: AnySplit, sample: int, side: int = THUMBNAIL) -> np.ndarray:
    """[C, H, W] uint8, an image as networks are tested on it; an encoded one of `side` pixels.

    Raises:
        UserError: an encoded image cannot be read.
    """
    if not isinstance(split, EncodedSplit):
        return split.images[sample]
    size = split.sizes[sample]
    (box,) = clean_boxes(size[None], split.image_size)
    try:
        return decode_view(split.content(sample), size, box, side, split.channels)
    except UNREADABLE as error:
        raise UserError(
            f"`{split.sample_ids[sample]}` of test cannot be read ({error}). Run `{AGAIN}`."
        ) from None


def corrupted_pictures(split: AnySplit) -> dict[str, np.ndarray]:
    """The first test image as networks were shown it, by corruption."""
    side = split.image_size if isinstance(split, EncodedSplit) else split.images.shape[-1]
    pixels = clean_pixels(split, 0, side)
    return {
        name: corrupted(pixels, 0, corruption=name, severity=SHOWN_SEVERITY) for name in CORRUPTIONS
    }


def models_table(comparison: Comparison) -> pd.DataFrame:
    """One row per model."""
    rows = []
    for model in comparison.models:
        robust = robust_figures(model, comparison.robustness).get("robust_accuracy")
        rows.append({"model": model.name, **model.figures, "robust_accuracy": robust})
    whole = dict.fromkeys(COSTS, "Int64")  # though a teacher without a network has none
    return pd.DataFrame(rows).drop(columns="name").astype(whole)


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
    write_bytes(path, table.to_csv(index=False, lineterminator="\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.compare", description=__doc__)
    parser.add_argument("--show", action="store_true", help="print the last comparison again")
    if parser.parse_args().show:
        print(
            console_table(read_json(METRICS / "comparison.json", produced_by="dvc repro compare"))
        )
        return
    inputs = StageInputs("compare")
    names, dataset = student_names(), open_dataset()
    verify_dataset()
    index = read_store(dataset)
    teacher = read_answers("teacher", "teacher", dataset)
    students = {name: tuple(read_answers(name, role, dataset) for role in KINDS) for name in names}
    labels = {name: np.asarray(dataset.splits[name].labels) for name in COMPARED}
    comparison = replace(
        compare(teacher, students, labels, dataset.class_names),
        robustness=read_robustness(names, dataset),
    )
    if comparison.teacher.accuracy == 0:
        raise UserError(
            "the teacher names no test image's class, so nothing can be retained of its accuracy. "
            "Look at `teacher` in params.yaml: the order of the classes, `mean`, `std`, training."
        )
    curves = training_curves(names)
    ran = teacher.parameters is not None  # and was no table of logits
    costs = Costs(read_speed(names), economics(index, curves) if ran else None)
    fingerprints = {"dataset": dataset.fingerprint, "teacher": index["teacher_fingerprint"]}
    origin = Origin(params=read_params(), fingerprints=fingerprints)
    test = dataset.splits["test"]
    pixels_of = partial(clean_pixels, test)
    page = html_report(comparison, curves, pixels_of, corrupted_pictures(test), origin, costs)
    inputs.check()
    with atomic_directory(REPORTS) as folder:
        write_bytes(folder / "index.html", page.encode())
        write_bytes(folder / "comparison.md", markdown(comparison, costs).encode())
        write_table(folder / "class_accuracy.csv", class_table(comparison))
    write_table(METRICS / "training_curves.csv", curves)
    write_table(METRICS / "comparison.csv", models_table(comparison))
    figures = headline_figures(comparison)
    if costs.economics is not None:
        figures["cache"] = costs.economics.figures
    write_json(METRICS / "comparison.json", figures)
    print(console_table(figures))


if __name__ == "__main__":
    run_command(main)
