"""Speed and the savings of the cache, in sentences."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.comparison.cache_economics import CacheFigures, Economics
from pipeline.comparison.measurement.latency import (
    MEASURE_AGAIN,
    EngineSpeed,
    Machine,
    rate,
    three_digits,
)
from pipeline.comparison.report.numbers import duration, si3
from pipeline.runtime.errors import counted

#: Where the teacher would run, best first: the settings of metrics/speed.json.
OF_TEACHER = ("pytorch_cuda", "onnxruntime_cuda", "onnxruntime_all_cores", "onnxruntime_1_thread")


NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Costs:
    """Figures that depend on a clock."""

    speed: Mapping[str, EngineSpeed]  # by setting: onnxruntime_1_thread, ...
    no_teacher: str | None  # why the teacher has no file, and so no student a ratio
    timed: Machine  # on which `speed` was measured
    here: Machine  # which writes the report
    economics: Economics | None  # None for imported logits: no teacher pass

    @property
    def of_teacher(self) -> EngineSpeed | None:
        """The setting in which the teacher would run, a GPU before the CPU; None without one."""
        found = (self.speed.get(setting) for setting in OF_TEACHER)
        return next((speed for speed in found if speed and speed.teacher), None)

    def seconds(self, passes: int) -> float:
        """Seconds of as many teacher passes, at the rate measured on `of_teacher`."""
        return passes / self.of_teacher.teacher.images_per_second


def speed_of(speed: Mapping[str, EngineSpeed], name: str, precision: str = "float32") -> str:
    """One student's file against the teacher's, on one image: `4.4 x faster than the teacher (4.31
    to 4.52)`; its milliseconds where the teacher has no file; `not measured` without figures.

    Args:
        speed: `Costs.speed`.
    """
    measured = speed.get("onnxruntime_1_thread")
    figures = measured and measured.find(name, precision)
    if figures is None:
        return NOT_MEASURED
    if figures.speedup is None:
        return f"{three_digits(figures.latency_ms)} ms"
    return figures.speedup.than_the_teacher


def cache_sentence(figures: CacheFigures) -> str:
    """Say what the cache cost and saved."""
    made, saved = figures.teacher_passes, figures.passes_saved
    students = figures.break_even_students
    as_long = "as long as the average student here"
    if students > 1:
        as_long = f"once {students:,} students train as long as the average one here"
    epochs = counted(figures.break_even_epochs, "epoch")
    outcome = f"{saved:,} saved" if saved >= 0 else f"the cache took {-saved:,} more"
    return (
        f"The cache took {counted(made, 'teacher pass')}, a live teacher would have taken "
        f"{made + saved:,}: {outcome}. Caching takes fewer passes once one student trains for "
        f"{epochs}, or {as_long}."
    )


def cost_sentences(costs: Costs) -> list[str]:
    """The speed of the students, where it was measured, and what the cache cost and saved."""
    economics, device = costs.economics, costs.of_teacher
    lines = [speed_sentence(costs), measured_sentence(costs)]
    if economics is None:
        return lines
    cache = cache_sentence(economics.figures)
    if device is not None:
        made, online = economics.teacher_passes, economics.online_passes
        cache += (
            f" At the teacher's {rate(device.teacher.images_per_second)} images/s "
            f"({setting_label(device)}, batches of {device.batch_size}) that would be "
            f"{duration(costs.seconds(made))} and {duration(costs.seconds(online))}."
        )
    if economics.store_bytes is not None:
        cache += f" The store takes about {si3(economics.store_bytes)}B."
    return [*lines, cache]


def speed_sentence(costs: Costs) -> str:
    """In one thread: the latency of the teacher, and how much faster or slower each student's files
    are."""
    speed = costs.speed["onnxruntime_1_thread"]
    files = ", ".join(
        f"{label} {figures.speedup or f'{three_digits(figures.latency_ms)} ms'}"
        for label, figures in speed.files
    )
    return f"One image in {setting_label(speed)}: {files}.{_no_teacher(speed, costs)}"


def speed_note(speed: EngineSpeed, costs: Costs) -> str:
    """Say what a table of speed shows."""
    rounds = counted(speed.rounds, "round")
    return f"{setting_label(speed)}; medians of {rounds}.{_no_teacher(speed, costs)}"


def _no_teacher(speed: EngineSpeed, costs: Costs) -> str:
    """Why there are no ratios, where there are none."""
    if speed.teacher is not None:
        return ""
    reason = costs.no_teacher or "PyTorch does not run it"  # an ONNX teacher
    return f" There is no ratio to the teacher, which was not timed: {reason.rstrip('.')}."


def measured_sentence(costs: Costs) -> str:
    """The machine that was timed and, if the report is written on another, how to time that."""
    timed, here = machine_label(costs.timed), machine_label(costs.here)
    if timed == here:
        return f"All times were measured on {timed}."
    if costs.timed.model_copy(update={"onnxruntime": costs.here.onnxruntime}) == costs.here:
        return (
            f"All times were measured on {timed}. Now onnxruntime is {costs.here.onnxruntime}; to "
            f"measure again, run `{MEASURE_AGAIN}` and then `dvc repro compare`."
        )
    return (
        f"All times were measured elsewhere, on {timed}; this report was written on {here}. To "
        f"measure there, run `{MEASURE_AGAIN}` and then `dvc repro compare`."
    )


def machine_label(machine: Machine) -> str:
    """`AMD EPYC (2 cores, Linux x86_64, onnxruntime 1.32.0)`"""
    cores = counted(machine.cores, "core")
    return f"{machine.cpu} ({cores}, {machine.system}, onnxruntime {machine.onnxruntime})"


def setting_label(speed: EngineSpeed) -> str:
    """`onnxruntime 1.32.0 on AMD EPYC, 2 threads`"""
    label = f"{speed.engine} on {speed.device}"
    return label if speed.threads is None else f"{label}, {counted(speed.threads, 'thread')}"
