"""speed: measure the latency and throughput of the teacher and each student, on the CPU and a GPU.

Reads models/teacher/, models/students/ and `students`, `views.image_size` of params.yaml; writes
metrics/speed.json. A baseline is the same network as its student and is not timed again. Only this
stage measures time: the same code writes other figures in every run.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.comparison.measurement import latency
from pipeline.comparison.measurement.latency import BATCH_SIZE, DeviceSpeed, NetworkSpeed, Speeds
from pipeline.models import checkpoint
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import counted
from pipeline.runtime.files import write_json
from pipeline.runtime.outputs import TEACHER, ModelOutputs
from pipeline.runtime.params import load_section, student_names
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.views.params import ViewsParams


@dataclass(frozen=True)
class TimedNetwork:
    name: str
    network: nn.Module
    spec: InputSpec
    runtime: str | None = None  # None: PyTorch

    @torch.inference_mode()
    def forward(self, views: Tensor) -> Tensor:
        """Compute logits as `evaluation.predict` does in float32, but without setting mode and
        precision at every call: that takes a few per cent of a small network's latency."""
        logits = self.network(self.spec.apply(views)).float()
        if views.device.type == "cuda":  # a call returns before its work is done
            torch.cuda.synchronize(views.device)
        return logits


def load_network(outputs: ModelOutputs) -> TimedNetwork:
    network, spec = checkpoint.load(outputs.model, produced_by=f"dvc repro {outputs.stage}")
    runtime = "onnxruntime" if spec.family == "onnx" else None
    return TimedNetwork(outputs.name or "teacher", network.eval(), spec.input, runtime)


def devices() -> list[torch.device]:
    return [torch.device(name) for name in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]]


def time_networks(
    teacher: TimedNetwork | None, students: Sequence[TimedNetwork], size: int, device: torch.device
) -> DeviceSpeed:
    """Move all networks to the device and time them there.

    Args:
        size: of a view, in pixels.
    """
    networks = [*([teacher] if teacher else []), *students]
    tasks: dict[int, list[Callable[[], object]]] = {1: [], BATCH_SIZE: []}
    generator = torch.Generator().manual_seed(0)
    for timed in networks:
        timed.network.to(device)
        shape = (BATCH_SIZE, timed.spec.channels, size, size)
        # Noise: speed does not depend on what an image shows.
        views = torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)
        for count, calls in tasks.items():
            calls.append(lambda t=timed, v=views[:count]: t.forward(v))
    latencies = latency.time_interleaved(tasks[1], **latency.SINGLE_IMAGE)
    batch_times = latency.time_interleaved(tasks[BATCH_SIZE], **latency.FULL_BATCH)[..., 0]
    teacher_latencies = latencies[0] if teacher else None
    figures = [
        latency.network_speed(
            *times, BATCH_SIZE, None if timed is teacher else teacher_latencies
        ).model_copy(update={"runtime": timed.runtime})
        for timed, *times in zip(networks, latencies, batch_times, strict=True)
    ]
    on_cpu = device.type == "cpu"
    return DeviceSpeed(
        name=latency.cpu_name() if on_cpu else torch.cuda.get_device_name(device),
        cores=latency.this_machine().cores if on_cpu else None,
        threads=torch.get_num_threads() if on_cpu else None,
        system=latency.system(),
        torch=torch.__version__,
        batch_size=BATCH_SIZE,
        teacher=figures[0] if teacher else None,
        students={t.name: f for t, f in zip(networks, figures, strict=True) if t is not teacher},
    )


def format_speed(name: str, speed: NetworkSpeed) -> str:
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
    size, names = load_section(ViewsParams, "views").image_size, student_names()
    imported_logits = checkpoint.logit_source(TEACHER.model, produced_by="dvc repro teacher")
    teacher = load_network(TEACHER) if imported_logits is None else None
    students = [load_network(ModelOutputs("distilled", name)) for name in names]
    speeds = {}
    for device in devices():
        speed = speeds[device.type] = time_networks(teacher, students, size, device)
        threads = "" if speed.threads is None else f", {counted(speed.threads, 'thread')}"
        print(f"speed of one image, and in batches of {BATCH_SIZE}, on {speed.name}{threads}:")
        for name, figures in speed.networks:
            print(format_speed(name, figures))
    inputs.check()
    write_json(latency.SPEED_FILE, Speeds(**speeds).model_dump(exclude_none=True))


if __name__ == "__main__":
    run_command(main)
