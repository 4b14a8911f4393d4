"""How long each stage took, by what its time depends on, to estimate later runs.

The times are in .scratch, outside DVC's outputs: results never depend on them. Where a file is
absent, damaged or of other parameters, no time is known, and that is all.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runtime.environment import JOBS, OF_STAGE, SEED_JOBS
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json, read_json, write_json
from pipeline.runtime.outputs import PREPARED
from pipeline.runtime.params import paired_views

FOLDER = Path(".scratch/stage_times")


@dataclass(frozen=True)
class Work:
    """What a stage has to do."""

    alike: str  # a digest of what decides the time of a unit; equal for a student and its baseline
    similar: str | None  # as `alike`, whatever the network; None where the network decides the time
    units: int | None  # of a training: images x epochs; None: not known without data/prepared
    epochs: int = 0  # of a training, of all seeds


def split_sizes() -> dict[str, int] | None:
    """The number of images of each split of data/prepared; None if that is unknown."""
    try:
        return read_json(PREPARED / "dataset.json", produced_by="-")["splits"]
    except (UserError, KeyError):
        return None


def work_of(stage: str, params: Mapping[str, Any], sizes: Mapping[str, int] | None) -> Work | None:
    """Find what a stage has to do by params.yaml; None if that is not valid, which the stage says.

    Args:
        sizes: of `split_sizes`.
    """
    kind, _, name = stage.partition("@")
    try:
        train = sizes["train"] if sizes else None
        others = sizes["validation"] + sizes["test"] if sizes else None
        if name:
            alike, epochs = _work_of_student(kind, name, params)
        else:
            alike, epochs = _work_of_teacher(kind, params)
        units = 1
        if epochs:
            units = train and epochs * train
        elif kind == "soft_targets":
            units = train and params["views"]["count"] * train + others
        elif kind in ("speed", "compare"):
            units = 1 + len(params["students"])
        if not epochs and kind not in ("prepare", "soft_targets"):
            alike.append(others)
        similar = None
        if kind.startswith(("export", "robustness")):
            similar = _digest([kind.removesuffix("_teacher"), *_images(params), others])
        return Work(_digest(alike), similar, units, epochs)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _images(params: Mapping[str, Any]) -> list[Any]:
    """What decides the time of one image, whichever it is."""
    views = {key: value for key, value in params["views"].items() if key not in ("count", "seed")}
    return [views, *(params["dataset"].get(key) for key in ("storage", "image_size", "channels"))]


def _work_of_teacher(kind: str, params: Mapping[str, Any]) -> tuple[list[Any], int]:
    """What decides the time of a unit, and the epochs, of a stage of the teacher or of all
    networks."""
    if kind == "prepare":
        return [kind, params["dataset"]], 0
    teacher = params["teacher"]
    alike = [kind, *_images(params), *(teacher[key] for key in ("family", "network", "weights"))]
    if kind == "teacher" and teacher["weights"] in ("train", "pretrained"):
        training = teacher["training"]
        labelled = params["dataset"].get("labels_per_class")  # it sees no other image
        return [*alike, training["batch_size"], training["policy"], labelled], training["epochs"]
    return [*alike, params["soft_targets"] if kind == "soft_targets" else None], 0


def _work_of_student(kind: str, name: str, params: Mapping[str, Any]) -> tuple[list[Any], int]:
    """As `_work_of_teacher`, of a stage of one student."""
    student = params["students"][name]
    training = {**params["training"], **student["training"]}
    export = {**params["export"], **(student.get("export") or {})}
    alike = [*_images(params), student["family"], student["network"]]
    if kind in ("student", "baseline"):
        seeds = training["seeds"]
        trainings = len(seeds) if isinstance(seeds, list) else 1
        # Of pairs of views: one forward pass a step, of two that its baseline makes.
        crossed = kind == "student" and paired_views(params, name) == "weak_to_strong"
        alike += ["weak_to_strong"] if crossed else []
        return ["training", *alike, training["batch_size"]], trainings * training["epochs"]
    int8 = export["int8_training"] if export["precision"] == "int8" else None
    epochs = int8.get("epochs", 2) if isinstance(int8, Mapping) else 0  # 2 by default
    if kind == "int8_training":
        return [kind, *alike, training["batch_size"], epochs > 0], epochs
    return [kind, *alike, export["precision"]], 0


def _started(stage: str) -> Path:
    return FOLDER / f"{stage}.started"


def start(stage: str) -> None:
    """Note that the stage has started: its time is remembered only if it does all of its work."""
    with suppress(OSError):
        FOLDER.mkdir(parents=True, exist_ok=True)
        _started(stage).touch()


def does_all(stage: str) -> bool:
    """Whether the stage, which has started, has done all of its work itself so far."""
    return _started(stage).exists()


def resumed() -> None:
    """Note that the stage that DVC runs continues from the work of an earlier run, so that its time
    is not that of all its work. Any process of the stage may call this."""
    if stage := os.environ.get(OF_STAGE) or os.environ.get("DVC_STAGE"):
        with suppress(OSError):
            _started(stage).unlink()


def finish(stage: str, work: Work | None, startup: float, seconds: float) -> None:
    """Remember how long the stage took, if it did all of its work.

    Of stages that run at once, each is remembered with its share of the machine's time: one job's,
    or that of the seeds that it trains at once.

    Args:
        startup: seconds until the modules were loaded.
        seconds: after that.
    """
    with suppress(OSError, UserError, ValueError):
        _started(stage).unlink()
        if work is not None and work.units:
            jobs, taken = (int(os.environ.get(key) or 1) for key in (JOBS, SEED_JOBS))
            share = min(1, taken / jobs)
            times = {"startup": startup * share, "seconds": seconds * share}
            write_json(FOLDER / f"{stage}.json", vars(work) | times)


def known_seconds(works: Mapping[str, Work | None]) -> dict[str, float | None]:
    """Estimate the seconds of each stage from its last run, or from that of another stage whose
    work is alike or similar; None if there is none."""
    times: dict[Any, tuple[float, float]] = {}  # seconds to start, and per unit
    for path in sorted(FOLDER.glob("*.json")):
        with suppress(OSError, UserError, KeyError, TypeError, ValueError, ZeroDivisionError):
            content = read_json(path, produced_by="-")
            of_stage = float(content["startup"]), content["seconds"] / content["units"]
            if all(math.isfinite(value) and value >= 0 for value in of_stage):
                keys = (path.stem, content["alike"]), content["alike"], content["similar"]
                times |= dict.fromkeys(keys, of_stage)
    found: dict[str, float | None] = {}
    for stage, work in works.items():
        found[stage] = None
        if work is not None and work.units:
            keys = ((stage, work.alike), work.alike, work.similar or "none")
            known = next((times[key] for key in keys if key in times), None)
            found[stage] = known and known[0] + known[1] * work.units
    return found
