"""Forecast what `dvc repro` will do with each stage, by DVC's own hashes, without running any.

DVC decides about a stage when its turn comes: it compares the dependencies with dvc.lock, and looks
in its cache for an earlier run with the same ones. This does so ahead of time. What a running stage
will write is not known before, so a stage that reads it *may* run. (`dvc repro --dry` lists as
running what will be restored and all that follows, gives no reason, and stops at a missing file.)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from dvc.dependency import ParamsDependency
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc.repo.reproduce import get_active_graph, plan_repro
from dvc.stage import Stage
from dvc.stage.cache import _can_hash
from dvc.stage.serialize import to_single_stage_lockfile
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta

from pipeline.runtime.errors import UserError

Outcome = Literal["up to date", "restored", "runs", "may run"]


@dataclass
class Forecast:
    """What `dvc repro` will do with one stage."""

    stage: str
    outcome: Outcome = "up to date"
    reasons: list[str] = field(default_factory=list)  # why it is not up to date, if that is known
    waits_for: list[str] = field(default_factory=list)  # stages whose new outputs it reads
    missing: list[str] = field(default_factory=list)  # inputs without which it cannot run
    lost: list[str] = field(default_factory=list)  # recorded outputs that are nowhere on this disk


@dataclass(frozen=True)
class RunForecast:
    """What `dvc repro` will do with all stages."""

    stages: list[Forecast]  # in the order in which DVC runs them
    #: Of each stage that is not up to date, those that must come first.
    waits: Mapping[str, set[str]]
    has_remote: bool  # whether DVC has a remote, from which lost results may be fetched


@dataclass(frozen=True)
class _Written:
    """An output of an earlier stage, when `dvc repro` is past that stage."""

    stage: str
    md5: str | None  # None: not known before the stage has run
    here: bool  # the workspace has it already


def forecast_stages(repo: Repo) -> list[Forecast]:
    """Forecast each stage of dvc.yaml, in the order in which DVC runs them.

    Raises:
        DvcException: DVC cannot read its files, or another DVC holds them.
    """
    with repo.lock:
        written: dict[PurePosixPath, _Written] = {}
        stages = plan_repro(get_active_graph(repo.index.graph))
        return [_forecast(stage, written) for stage in stages if stage.cmd]  # no `dvc add`


def forecast_run() -> RunForecast:
    """Forecast what `dvc repro` will do here.

    Raises:
        UserError: DVC cannot read its files, or another DVC holds them.
    """
    try:
        with Repo() as repo:
            forecasts = forecast_stages(repo)
            return RunForecast(forecasts, _waits(repo, forecasts), bool(repo.config["remote"]))
    except DvcException as error:
        raise UserError(f"DVC cannot say what it would run: {error}") from None


def _waits(repo: Repo, forecasts: Sequence[Forecast]) -> dict[str, set[str]]:
    """`RunForecast.waits`, by DVC's graph."""
    graph = get_active_graph(repo.index.graph)
    stale = {forecast.stage for forecast in forecasts if forecast.outcome != "up to date"}
    pending = {stage: stage.addressing for stage in graph if stage.addressing in stale}
    return {
        name: {pending[each] for each in graph.successors(stage) if each in pending}
        for stage, name in pending.items()
    }


def _forecast(stage: Stage, written: dict[PurePosixPath, _Written]) -> Forecast:
    """Forecast one stage, and note its outputs in `written`, which has those of earlier stages."""
    forecast = Forecast(stage.addressing)
    recorded = all(out.hash_info for out in stage.outs)
    if not recorded:
        forecast.reasons.append("it has never run")
    elif stage.cmd_changed:
        forecast.reasons.append("its command in dvc.yaml changed")
    changed = [_compare(dep, written, recorded, forecast) for dep in stage.deps]
    outs, here = {}, False
    if not recorded or stage.cmd_changed or any(changed):
        forecast.outcome, entry = "runs", None
        if not forecast.waits_for and all(dep.exists for dep in stage.deps):
            entry = _earlier_run(stage, written)
        if entry:
            forecast.outcome = "restored"
            outs = {PurePosixPath(out["path"]): out["md5"] for out in entry["outs"]}
    elif lost := [out for out in stage.outs if out.status()]:
        if not _is_cached(stage, to_single_stage_lockfile(stage)):
            forecast.outcome = "runs"
            forecast.lost = [str(_path(out)) for out in lost]
        elif forecast.waits_for:
            forecast.outcome = "may run"
        else:
            forecast.outcome = "restored"
            outs = {_path(out): out.hash_info.value for out in stage.outs}
    elif forecast.waits_for:
        forecast.outcome = "may run"
    else:
        outs, here = {_path(out): out.hash_info.value for out in stage.outs}, True
    for out in stage.outs:
        written[_path(out)] = _Written(stage.addressing, outs.get(_path(out)), here)
    return forecast


def _compare(
    dep: Output,
    written: Mapping[PurePosixPath, _Written],
    recorded: bool,
    forecast: Forecast,
) -> bool:
    """Whether the dependency will certainly differ from dvc.lock. Note in `forecast` why, or which
    stages it waits for."""
    if isinstance(dep, ParamsDependency):
        reasons = list(changed_values(dep.hash_info.value, dep.read_params())) if recorded else []
        forecast.reasons += reasons
        return bool(reasons)
    path = _path(dep)
    output = written.get(path)
    if output and output.md5:
        changed = output.md5 != dep.hash_info.value
    elif waits_for := _unfinished(path, written):
        forecast.waits_for += [stage for stage in waits_for if stage not in forecast.waits_for]
        return False
    else:
        changed = bool(dep.status())
    if not output and not dep.exists:
        forecast.missing.append(str(path))
    elif changed and recorded:
        code = "code in " if path.parts[0] == "pipeline" else ""
        forecast.reasons.append(f"{code}`{path}` changed")
    return changed


def _unfinished(path: PurePosixPath, written: Mapping[PurePosixPath, _Written]) -> list[str]:
    """The stages that will change something in the folder, or something that contains the file."""
    found = (
        output.stage
        for place, output in written.items()
        if place.is_relative_to(path) or path.is_relative_to(place)
        if not (output.md5 and output.here)
    )
    return list(dict.fromkeys(found))


def changed_values(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """Name each value that differs, by its keys joined with dots: `views.count`: 8 -> 4."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in {**old, **new}:
            where = f"{key}.{name}" if key else str(name)
            if name not in new:
                yield f"`{where}` is removed"
            elif name not in old:
                yield f"`{where}` is new"
            else:
                yield from changed_values(old[name], new[name], where)
    elif old != new:
        yield f"`{key}`: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return text if len(text) <= 40 else f"{text[:37]}..."


def _earlier_run(stage: Stage, written: Mapping[PurePosixPath, _Written]) -> dict | None:
    """DVC's record of a run with the dependencies that the stage will have, if its outputs are in
    DVC's cache."""
    for dep in stage.deps:
        if output := written.get(_path(dep)):
            dep.hash_info, dep.meta = HashInfo("md5", output.md5), Meta()
        else:
            dep.save()
    if not _can_hash(stage):  # such as a stage without dependencies, which always runs
        return None
    entry = stage.repo.stage_cache._load(stage)  # `restore` returns no record
    return entry if entry and _is_cached(stage, entry) else None


def _is_cached(stage: Stage, entry: dict) -> bool:
    """Whether DVC's cache has the outputs of a record, with metrics, which DVC caches too."""
    return stage.repo.stage_cache._create_stage(entry, stage.wdir).outs_cached()


def _path(file: Output) -> PurePosixPath:
    """The path from the project's folder, as dvc.yaml has it."""
    return PurePosixPath(file.def_path)
