"""Speed and the savings of the cache, in sentences."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.comparison.cache_economics import CacheFigures, Economics
from pipeline.comparison.measurement.latency import DeviceSpeed, NetworkSpeed
from pipeline.comparison.report.numbers import duration, si3, three_digits


@dataclass(frozen=True)
class Costs:
    """Figures that depend on a clock."""

    speed: Mapping[str, DeviceSpeed]  # by the device's type: cpu, cuda
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
    outcome = f"{saved:,} saved" if saved > 0 else f"the cache took {-saved:,} more"
    return (
        f"The cache took {made:,} teacher passes, a live teacher would have taken "
        f"{made + saved:,}: {outcome}. Caching is cheaper from {figures.break_even_epochs:,} "
        f"epochs of one student, or from {from_students} trained as long as these."
    )


def cost_sentences(costs: Costs) -> list[str]:
    """The speed of the students, and what the cache cost and saved."""
    economics, device = costs.economics, costs.of_teacher
    lines = [speed_sentence(of_device) for of_device in costs.speed.values()]
    if economics is None:
        return lines
    cache = cache_sentence(economics.figures)
    if device is not None:
        made, online = economics.teacher_passes, economics.online_passes
        cache += (
            f" At the teacher's {device.teacher.images_per_second:,.0f} images/s "
            f"({device.label}, batches of {device.batch_size}) that is "
            f"{duration(costs.seconds(made))} and {duration(costs.seconds(online))}."
        )
    if economics.store_bytes is not None:
        cache += f" The store takes about {si3(economics.store_bytes)}B."
    return [*lines, cache]


def speed_sentence(device: DeviceSpeed) -> str:
    networks = ", ".join(
        f"{name} {three_digits(speed.latency_ms)} ms"
        if speed.speedup is None
        else f"{name} {speedup(speed)} times as fast"
        for name, speed in device.networks
    )
    return f"One image on {device.label}: {networks}."


def speedup(speed: NetworkSpeed) -> str:
    low, high = three_digits(speed.speedup_low), three_digits(speed.speedup_high)
    return f"{three_digits(speed.speedup)} ({low} to {high})"
