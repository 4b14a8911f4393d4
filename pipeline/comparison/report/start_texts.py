"""What students started from, in sentences, and warnings where compared networks started
differently."""

from pipeline.comparison.figures import Figures
from pipeline.comparison.report.numbers import join_and
from pipeline.comparison.starts import FROM_SCRATCH, different_starts
from pipeline.runtime.outputs import ModelOutputs


def scratch_sentence(figures: Figures) -> list[str]:
    """Say that every student started from scratch, if so."""
    starts = set(_starts(figures).values())
    return [_describe(figures)] if starts == {FROM_SCRATCH} else []


def start_sentences(figures: Figures) -> list[str]:
    """Say what students started from, unless all did from scratch; warnings where a student and its
    baseline, or two students, started differently."""
    starts = _starts(figures)
    lines = _different_baselines(figures)
    if different_starts(starts):
        lines.append(
            f"Warning: {_describe(figures)} Where two students started differently, their "
            "difference is not the effect of their networks alone. To compare networks, set the "
            "same kind of `weights` in each `students.NAME.network` of params.yaml, then run "
            "`dvc repro`."
        )
    elif set(starts.values()) - {None, FROM_SCRATCH}:
        lines.append(_describe(figures))
    return lines


def _different_baselines(figures: Figures) -> list[str]:
    """A warning if a student and its baseline started from different bytes."""
    unequal = {name: s for name, s in figures.students.items() if s.baseline_start is not None}
    if not unequal:
        return []
    starts = "; ".join(
        f"{name} and its baseline started {_from(s.start)}, but not with the same values"
        if s.start == s.baseline_start
        else f"{name} started {_from(s.start)}, but its baseline {_from(s.baseline_start)}"
        for name, s in unequal.items()
    )
    gains = "Its gain is" if len(unequal) == 1 else "Their gains are"
    roles = ("baseline", "distilled")
    stages = " ".join(ModelOutputs(role, name).stage for name in unequal for role in roles)
    return [
        f"Warning: {starts}. {gains} not the effect of the teacher alone. Run `dvc repro --force "
        f"--single-item {stages}`, which trains them again, then `dvc repro`."
    ]


def _describe(figures: Figures) -> str:
    """`mobilenet started from published weights; squeezenet and resnet8 started from scratch.`"""
    by_start: dict[str, list[str]] = {}
    for name, text in _starts(figures).items():
        if text is not None:
            by_start.setdefault(text, []).append(name)
    if len(figures.students) > 1 and [*by_start.values()] == [[*figures.students]]:
        by_start = {text: ["Every student"] for text in by_start}
    started = (f"{join_and(names)} started {_from(text)}" for text, names in by_start.items())
    return f"{'; '.join(started)}."


def _starts(figures: Figures) -> dict[str, str | None]:
    return {name: student.start for name, student in figures.students.items()}


def _from(text: str) -> str:
    return text if text.startswith("from ") else f"from {text}"
