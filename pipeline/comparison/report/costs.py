"""Speed and the savings of the cache, in sentences."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.comparison.cache_economics import CacheFigures, Economics
from pipeline.comparison.measurement.latency import (
    MEASURE_AGAIN,
    DeviceSpeed,
    Machine,
    NetworkSpeed,
)
from pipeline.comparison.report.numbers import duration, si3, three_digits
from pipeline.runtime.errors import counted


@dataclass(frozen=True)
class Costs:
    """Figures that depend on a clock."""

    speed: Mapping[str, DeviceSpeed]  # by the device's type: cpu, cuda
    timed: Machine  # on which `speed` was measured
    here: Machine  # which writes the report
    economics: Economics | None  # None for imported logits: no teacher pass

    @property
    def of_teacher(self) -> DeviceSpeed | None:
        """The device on which the teacher would run, CUDA before the CPU; None without a figure."""
        device = self.speed.get("cuda") or self.speed["cpu"]
        return device if device.teacher else None

    def seconds(self, passes: int) -> float:
        """Seconds of as many teacher passes, at the rate measured on `of_teacher`."""
        return passes / self.of_teacher.teacher.images_per_second


def cache_sentence(figures: CacheFigures) -> str:
    """What the cache cost and saved."""
    made, saved = figures.teacher_passes, figures.passes_saved
    students = figures.break_even_students
    from_students = "the first student" if students == 1 else f"{students:,} students"
    epochs = counted(figures.break_even_epochs, "epoch")
    outcome = f"{saved:,} saved" if saved > 0 else f"the cache took {-saved:,} more"
    return (
        f"The cache took {counted(made, 'teacher pass')}, a live teacher would have taken "
        f"{made + saved:,}: {outcome}. Caching takes fewer passes from {epochs} of one student, or "
        f"from {from_students} trained as long as these."
    )


def cost_sentences(costs: Costs) -> list[str]:
    """The speed of the students, where it was measured, and what the cache cost and saved."""
    economics, device = costs.economics, costs.of_teacher
    lines = [speed_sentence(of_device) for of_device in costs.speed.values()]
    lines.append(measured_sentence(costs))
    if economics is None:
        return lines
    cache = cache_sentence(economics.figures)
    if device is not None:
        made, online = economics.teacher_passes, economics.online_passes
        cache += (
            f" At the teacher's {device.teacher.images_per_second:,.0f} images/s "
            f"({device_label(device)}, batches of {device.batch_size}) that would be "
            f"{duration(costs.seconds(made))} and {duration(costs.seconds(online))}."
        )
    if economics.store_bytes is not None:
        cache += f" The store takes about {si3(economics.store_bytes)}B."
    return [*lines, cache]


def speed_sentence(device: DeviceSpeed) -> str:
    """The latency of the teacher, and how many times as fast each student is."""
    networks = ", ".join(
        f"{network_label(name, speed)} {three_digits(speed.latency_ms)} ms"
        if speed.speedup is None
        else f"{network_label(name, speed)} {speedup(speed)} times as fast"
        for name, speed in device.networks
    )
    return f"One image in PyTorch on {device_label(device)}: {networks}."


def measured_sentence(costs: Costs) -> str:
    """The machine that was timed and, if the report is written on another, how to time that."""
    timed, here = machine_label(costs.timed), machine_label(costs.here)
    if timed == here:
        return f"All times were measured on {timed}."
    return (
        f"All times were measured elsewhere, on {timed}; this report was written on {here}. To "
        f"measure there, run `{MEASURE_AGAIN}` and then `dvc repro compare`."
    )


def machine_label(machine: Machine) -> str:
    """`AMD EPYC (2 cores, Linux x86_64, torch 2.15.0)`"""
    cores = counted(machine.cores, "core")
    return f"{machine.cpu} ({cores}, {machine.system}, torch {machine.torch})"


def device_label(device: DeviceSpeed) -> str:
    """`AMD EPYC, 2 threads`"""
    if device.threads is None:
        return device.name
    return f"{device.name}, {counted(device.threads, 'thread')}"


def network_label(name: str, speed: NetworkSpeed) -> str:
    """`resnet8`; with the runtime where that is not PyTorch: `teacher (onnxruntime)`"""
    return name if speed.runtime is None else f"{name} ({speed.runtime})"


def speedup(speed: NetworkSpeed) -> str:
    low, high = three_digits(speed.speedup_low), three_digits(speed.speedup_high)
    return f"{three_digits(speed.speedup)} ({low} to {high})"
