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
        split_sizes: images of each split of data/prepared, and of training the `labelled` ones;
            None: there is none yet.
        has_remote: whether DVC has a remote, from which lost results may be fetched.
    """
    by_outcome: dict[Outcome, list[Forecast]] = {}
    for forecast in forecasts:
        by_outcome.setdefault(forecast.outcome, []).append(forecast)
    runs, may_run = by_outcome.get("runs", []), by_outcome.get("may run", [])
    restored, current = by_outcome.get("restored", []), by_outcome.get("up to date", [])
    if len(current) == len(forecasts):
        yield f"Nothing runs: {counted(len(current), 'stage is', 'stages are')} up to date."
        return
    yield from _teacher_lines(forecasts, teacher, num_views, split_sizes)
    yield from _training_lines(runs, may_run)
    if others := [forecast for forecast in runs if not _has_own_line(forecast)]:
        yield f"{counted(len(others), 'other stage runs', 'other stages run')}: {names(others)}."
    if others := [forecast for forecast in may_run if not _has_own_line(forecast)]:
        yield f"After these, only if what they read changes: {names(others)}."
    if restored:
        yield f"Restored from DVC's cache, without a run: {names(restored)}."
    if current:
        yield f"{counted(len(current), 'stage is', 'stages are')} up to date."
    for forecast in runs:
        for path in forecast.missing:
            yield f"`{forecast.stage}` cannot run: `{path}` is missing."
    yield from _reasons(runs, has_remote)


def _has_own_line(forecast: Forecast) -> bool:
    return forecast.stage in TEACHER or forecast.stage.startswith(("student@", "baseline@"))


def _training_lines(runs: Sequence[Forecast], may_run: Sequence[Forecast]) -> Iterator[str]:
    """Which students and baselines are trained, and which may be."""
    for kind in ("student", "baseline"):
        certain, possible = _of_kind(kind, runs), _of_kind(kind, may_run)
        if certain:
            are = counted(len(certain), f"{kind} is", f"{kind}s are")
            yield f"{are} trained: {', '.join(certain)}."
        if possible:
            are = counted(len(possible), f"{kind} is", f"{kind}s are")
            yield f"Up to {are} trained, if what they read changes: {', '.join(possible)}."
        if kind == "student" and not certain and not possible:
            yield "No student is trained."


def _of_kind(kind: str, forecasts: Sequence[Forecast]) -> list[str]:
    parts = (forecast.stage.partition("@") for forecast in forecasts)
    return [name for stage, _, name in parts if stage == kind]


def _teacher_lines(
    forecasts: Sequence[Forecast],
    teacher: TeacherParams,
    num_views: int,
    split_sizes: Mapping[str, int] | None,
) -> Iterator[str]:
    """Whether the teacher runs, why, and over how many images."""
    of_stage = {forecast.stage: forecast for forecast in forecasts}
    certain = [of_stage[stage] for stage in TEACHER if of_stage[stage].outcome == "runs"]
    possible = [of_stage[stage] for stage in TEACHER if of_stage[stage].outcome == "may run"]
    if not certain and not possible:
        yield "The teacher does not run."
        return
    if certain:
        reasons = dict.fromkeys(reason for stage in certain for reason in _reasons_of(stage))
        yield f"The teacher runs: {'; '.join(reasons)}."
    else:
        first = " or ".join(f"`{stage}`" for stage in possible[0].waits_for)
        yield f"The teacher may run: only if {first} writes other bytes than before."
    for forecast in (*certain, *possible):
        only = ", if what it reads changes" if certain and forecast in possible else ""
        work = _work(forecast.stage, teacher, num_views, split_sizes)
        yield f"  {forecast.stage}{only}: {work}"
    if split_sizes and of_stage["prepare"].outcome in ("runs", "may run"):
        yield "  (These are the images of data/prepared now; `prepare` runs first.)"


def _work(
    stage: str, teacher: TeacherParams, num_views: int, sizes: Mapping[str, int] | None
) -> str:
    """How often the stage passes over how many images."""
    train = counted(sizes["train"], "training image") if sizes else "every training image"
    held_out = sizes["validation"] + sizes["test"] if sizes else None
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
    if teacher.training is None:
        return f"{others} once; the published weights are not trained."
    epochs = counted(teacher.training.epochs, "epoch")
    if sizes and sizes.get("labelled", sizes["train"]) < sizes["train"]:
        train = f"the {sizes['labelled']:,} labelled ones of {train}"
    return f"trains for {'up to ' if teacher.weights == 'pretrained' else ''}{epochs} on {train}."


def names(forecasts: Sequence[Forecast]) -> str:
    """Name the stages, those of several students together: `export@small, second; speed`."""
    students: dict[str, list[str]] = {}
    for forecast in forecasts:
        stage, _, student = forecast.stage.partition("@")
        students.setdefault(stage, []).extend([student] if student else [])
    return "; ".join(
        f"{stage}@{', '.join(of_stage)}" if of_stage else stage
        for stage, of_stage in students.items()
    )


_LOST = "results are neither here nor in DVC's cache"


def _reasons_of(forecast: Forecast) -> list[str]:
    missing = [f"`{path}` is missing" for path in forecast.missing]
    return [*forecast.reasons, *missing, *([_LOST] if forecast.lost else [])]


def _reasons(forecasts: Sequence[Forecast], has_remote: bool) -> Iterator[str]:
    """Each reason with the stages that have it, in the order of the stages."""
    stages: dict[str, list[Forecast]] = {}
    for forecast in forecasts:
        for reason in _reasons_of(forecast):
            stages.setdefault(reason, []).append(forecast)
    if not stages:
        return
    yield "Why:"
    for reason, of_reason in stages.items():
        yield f"  {reason}: {names(of_reason)}"
    if _LOST in stages and has_remote:
        yield "  `dvc pull --allow-missing` fetches those that the remote has."
