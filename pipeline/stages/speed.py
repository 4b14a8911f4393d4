"""speed: how long the teacher and each student take to answer, on the CPU and on a GPU if any.

Reads models/teacher/, models/students/ and `students`, `views.image_size` of params.yaml; writes
metrics/speed.json. A baseline is the same network as its student, and is not measured again.
Everything that a clock touches is here: the same code writes other figures in every run.
"""

from pipeline.runtime.command import run_command

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.comparison.measurement.latency import SPEED, DeviceSpeed, NetworkSpeed, network_speed
from pipeline.models import checkpoint
from pipeline.models.spec import InputSpec
from pipeline.runtime.files import write_json
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section, student_names
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.views.params import ViewsParams

STUDENTS, OUTPUT = Path("models/students"), Path("metrics/speed.json")
ROUNDS, CALLS, BATCH_SIZE = 20, 5, 64
#: Fewer rounds where ROUNDS would take longer, per network. Fewer than 6 give a median no interval.
OF_ONE_IMAGE = {"calls": CALLS, "least": 6, "seconds": 30}
OF_A_BATCH = {"calls": 1, "least": 3, "seconds": 10}


@dataclass(frozen=True)
class TimedNetwork:
    """A network to be measured."""

    name: str
    network: nn.Module
    spec: InputSpec

    @torch.inference_mode()
    def answer(self, views: Tensor) -> Tensor:
        """As `evaluation.predict` in float32, less the setting of mode and precision at every
        call, which takes some per cent of a small network's time for one image."""
        logits = self.network(self.spec.apply(views)).float()
        if views.device.type == "cuda":  # where a call returns before its work is done
            torch.cuda.synchronize(views.device)
        return logits


def read_teacher() -> TimedNetwork | None:
    """None where the teacher is no network."""
    produced_by = "dvc repro teacher"
    if checkpoint.logit_source(TEACHER.model, produced_by=produced_by) is not None:
        return None
    return read_network("teacher", TEACHER.model, produced_by)


def read_network(name: str, directory: Path, produced_by: str) -> TimedNetwork:
    network, description = checkpoint.load(directory, produced_by=produced_by)
    return TimedNetwork(name, network.eval(), description.input)


def devices() -> list[torch.device]:
    return [torch.device(kind) for kind in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())


def time_interleaved(
    tasks: Sequence[Callable[[], object]], *, calls: int, least: int, seconds: float
) -> np.ndarray:
    """[tasks, rounds, calls] seconds of each call: all tasks in every round, another one first each
    time, so that what disturbs the machine falls on all alike.

    Makes ROUNDS rounds, or fewer where that would take more than `seconds` per task, but not fewer
    than `least`. A turn of several calls begins with one that is not counted: until then another
    network's weights are in the processor's cache.
    """
    for task in tasks:
        task()  # whatever is made at the first call
    start, times = time.perf_counter(), []
    while len(times) < ROUNDS and (
        len(times) < least or time.perf_counter() - start < seconds * len(tasks)
    ):
        taken = np.empty((len(tasks), calls))
        first = len(times) % len(tasks)
        for number in [*range(first, len(tasks)), *range(first)]:
            if calls > 1:
                tasks[number]()
            for call in range(calls):
                begin = time.perf_counter()
                tasks[number]()
                taken[number, call] = time.perf_counter() - begin
        times.append(taken)
    return np.stack(times, 1)


def time_networks(
    teacher: TimedNetwork | None, students: Sequence[TimedNetwork], size: int, device: torch.device
) -> DeviceSpeed:
    """The speed of all networks, which are moved to the device.

    Args:
        size: of a view, in pixels.
    """
    subjects = [*([teacher] if teacher else []), *students]
    tasks: dict[int, list[Callable[[], object]]] = {1: [], BATCH_SIZE: []}
    generator = torch.Generator().manual_seed(0)
    for subject in subjects:
        subject.network.to(device)
        shape = (BATCH_SIZE, subject.spec.channels, size, size)
        # Noise: what an image shows does not matter to speed.
        views = torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)
        for count, of_count in tasks.items():
            of_count.append(lambda s=subject, v=views[:count]: s.answer(v))
    latencies = time_interleaved(tasks[1], **OF_ONE_IMAGE)
    batches = time_interleaved(tasks[BATCH_SIZE], **OF_A_BATCH)[..., 0]
    of_teacher = latencies[0] if teacher else None
    figures = [
        network_speed(*times, BATCH_SIZE, None if subject is teacher else of_teacher)
        for subject, *times in zip(subjects, latencies, batches, strict=True)
    ]
    return DeviceSpeed(
        name=device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        torch=torch.__version__,
        batch_size=BATCH_SIZE,
        teacher=figures[0] if teacher else None,
        students={s.name: f for s, f in zip(subjects, figures, strict=True) if s is not teacher},
    )


def told(name: str, speed: NetworkSpeed) -> str:
    line = (
        f"  {name}: {speed.latency_ms:.4g} ms (95th percentile {speed.latency_p95_ms:.4g}), "
        f"{speed.images_per_second:,.0f} images/s"
    )
    if speed.speedup is None:
        return line
    interval = f"{speed.speedup_low:.3g} to {speed.speedup_high:.3g}"
    return f"{line}, {speed.speedup:.3g} x as fast as the teacher ({interval})"


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.stages.speed", description=__doc__).parse_args()
    inputs = StageInputs("speed")
    size = load_section(ViewsParams, "views").image_size
    names, teacher = student_names(), read_teacher()
    students = [read_network(name, STUDENTS / name, f"dvc repro student@{name}") for name in names]
    speed = {}
    for device in devices():
        measured = time_networks(teacher, students, size, device)
        speed[device.type] = measured
        print(f"speed of one image, and in batches of {BATCH_SIZE}, on {measured.described}:")
        if measured.teacher:
            print(told("teacher", measured.teacher))
        for name, figures in measured.students.items():
            print(told(name, figures))
    inputs.check()
    write_json(OUTPUT, SPEED.dump_python(speed, exclude_none=True))


if __name__ == "__main__":
    run_command(main)
