"""Say in words what `dvc repro` will do, by the forecast of its stages."""

from collections.abc import Iterator, Mapping, Sequence

from pipeline.plan.forecast import Forecast, Outcome
from pipeline.runtime.errors import counted
from pipeline.teacher.params import TeacherParams

#: The stages that run the teacher's network on many images.
TEACHER = ("teacher", "soft_targets")


def lines(
    forecasts: Sequence[Forecast],
    teacher: TeacherParams,
    num_views: int,
    split_sizes: Mapping[str, int] | None,
    has_remote: bool = False,
) -> Iterator[str]:
    """Yield the lines of the plan; what the teacher does is first.

    Args:
        num_views: cached views of every training image.
        split_sizes: images of each split of data/prepared; None: there is none yet.
        has_remote: whether DVC has a remote, from which lost results may be fetched.
    """
    by_outcome: dict[Outcome, list[Forecast]] = {}
    for forecast in forecasts:
        by_outcome.setdefault(forecast.outcome, []).append(forecast)
    runs, may_run = by_outcome.get("runs", []), by_outcome.get("may run", [])
    if not runs and not may_run and "restored" not in by_outcome:
        yield f"Nothing runs: all {counted(len(forecasts), 'stage')} are up to date."
        return
    yield from _teacher_lines(forecasts, teacher, num_views, split_sizes)
    yield _trained("student", runs, "No student is trained.")
    if baselines := _trained("baseline", runs):
        yield baselines
    others = [forecast for forecast in runs if not _is_training(forecast)]
    if others:
        yield f"{_verb(others, 'runs', 'run')}: {stage_list(others)}."
    for forecast in runs:
        if forecast.missing:
            named = ", ".join(f"`{path}`" for path in forecast.missing)
            yield f"`{forecast.stage}` cannot run without {named}, which is not here."
    if may_run := [forecast for forecast in may_run if forecast.stage not in TEACHER]:
        yield f"After these, only if what they read changes: {stage_list(may_run)}."
    if restored := by_outcome.get("restored"):
        yield f"Restored from DVC's cache, without a run: {stage_list(restored)}."
    if current := by_outcome.get("up to date"):
        yield f"{counted(len(current), 'stage is', 'stages are')} up to date."
    yield from _reasons(runs, has_remote)


def _teacher_lines(
    forecasts: Sequence[Forecast],
    teacher: TeacherParams,
    num_views: int,
    split_sizes: Mapping[str, int] | None,
) -> Iterator[str]:
    """Whether the teacher runs, why, and over how many images."""
    outcomes = {forecast.stage: forecast.outcome for forecast in forecasts}
    certain = [stage for stage in TEACHER if outcomes[stage] == "runs"]
    possible = [stage for stage in TEACHER if outcomes[stage] == "may run"]
    if not certain and not possible:
        yield "The teacher does not run."
        return
    if certain:
        yield f"THE TEACHER RUNS, in {' and '.join(f'`{stage}`' for stage in certain)}."
    else:
        reads = next(forecast for forecast in forecasts if forecast.stage == possible[0])
        first = " or ".join(f"`{stage}`" for stage in reads.waits_for)
        yield f"THE TEACHER MAY RUN: if {first} writes other bytes than before."
    for stage in [*certain, *possible]:
        after = " (only if what it reads changes)" if stage in possible and certain else ""
        yield f"  {stage}{after}: {_work(stage, teacher, num_views, split_sizes)}"
    if outcomes["prepare"] in ("runs", "may run") and split_sizes:
        yield "  These are the images of data/prepared as they are now; `prepare` runs first."


def _work(
    stage: str, teacher: TeacherParams, num_views: int, sizes: Mapping[str, int] | None
) -> str:
    """How often the stage passes over how many images."""
    train = counted(sizes["train"], "training image") if sizes else "every training image"
    held_out = sum(number for split, number in sizes.items() if split != "train") if sizes else None
    others = f"{held_out:,} held-out images" if sizes else "every held-out image"
    if teacher.weights == "logits":
        return "no pass; the teacher is a store of logits."
    if stage == "soft_targets":
        text = f"up to {counted(num_views, 'view')} of {train}, and {others} once"
        if sizes:
            text += f": {num_views * sizes['train'] + held_out:,} passes"
        return f"{text}. Views that are in .scratch are not computed again."
    if teacher.weights == "checkpoint":
        return f"{others} once; the checkpoint is not trained."
    epochs = counted(teacher.training.epochs, "epoch")
    return f"trains for {'up to ' if teacher.weights == 'pretrained' else ''}{epochs} on {train}."


def _is_training(forecast: Forecast) -> bool:
    return forecast.stage.startswith(("student@", "baseline@"))


def _trained(kind: str, forecasts: Sequence[Forecast], otherwise: str = "") -> str:
    names = [f.stage.partition("@")[2] for f in forecasts if f.stage.startswith(f"{kind}@")]
    if not names:
        return otherwise
    are = "is" if len(names) == 1 else "are"
    return f"{counted(len(names), kind)} {are} trained: {', '.join(names)}."


def _verb(items: Sequence, one: str, several: str) -> str:
    return f"{counted(len(items), 'other stage')} {one if len(items) == 1 else several}"


def stage_list(forecasts: Sequence[Forecast]) -> str:
    """Name the stages, those of several students together: `export@a, b`, `speed`."""
    names: dict[str, list[str]] = {}
    for forecast in forecasts:
        stage, _, student = forecast.stage.partition("@")
        names.setdefault(stage, []).extend([student] if student else [])
    return "; ".join(
        f"{stage}@{', '.join(students)}" if students else stage for stage, students in names.items()
    )


def _reasons(forecasts: Sequence[Forecast], has_remote: bool) -> Iterator[str]:
    """Each reason with the stages that have it, in the order of the stages."""
    stages: dict[str, list[Forecast]] = {}
    for forecast in forecasts:
        for reason in forecast.reasons:
            stages.setdefault(reason, []).append(forecast)
    lost = [forecast for forecast in forecasts if forecast.lost]
    if not stages and not lost:
        return
    yield "Why:"
    for reason, of_reason in stages.items():
        yield f"  {reason}: {stage_list(of_reason)}"
    if lost:
        yield f"  results are neither here nor in DVC's cache: {stage_list(lost)}"
        if has_remote:
            yield "  `dvc pull --allow-missing` fetches those that the remote has."
