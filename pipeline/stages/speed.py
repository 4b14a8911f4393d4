"""speed: measure the latency and throughput of the exported files, and of PyTorch on a GPU.

Reads models/exported/ and `students` of params.yaml; on a machine with a GPU also models/teacher/
and models/students/. Writes metrics/speed.json. All files run in onnxruntime: on the CPU with one
thread and with all cores, and on a GPU where onnxruntime was installed for one. A baseline is the
same graph as its student and is not timed again. Only this stage measures time: the same code
writes other figures in every run.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.comparison.measurement import latency
from pipeline.comparison.measurement.latency import (
    BATCH_SIZE,
    EngineSpeed,
    FileSpeed,
    Speeds,
    rate,
    three_digits,
)
from pipeline.compute.device import default_device
from pipeline.data.prepared.image_decoding import available_cores
from pipeline.export.model_card import NoFile, read_card
from pipeline.export.running.onnx_model import CPU, CUDA, open_file
from pipeline.models import checkpoint
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import counted
from pipeline.runtime.files import write_json
from pipeline.runtime.locks import only_run_of
from pipeline.runtime.outputs import TEACHER, ExportedFile, ModelOutputs, Precision
from pipeline.runtime.params import student_names
from pipeline.runtime.stage_inputs import StageInputs

#: From images in memory, [B, C, S, S] uint8, to logits in memory.
Forward = Callable[[np.ndarray], object]


@dataclass(frozen=True)
class TimedNetwork:
    name: str | None  # of the student; None for the teacher
    precision: Precision
    image_shape: tuple[int, int, int]  # [C, S, S]
    forward: Forward
    provider: str = CPU


def files_to_time(names: Sequence[str]) -> list[ExportedFile]:
    """The teacher's file if it has one, then each student's: float32, and int8 if there is one."""
    teacher = ExportedFile("teacher")
    card = read_card(teacher.card, produced_by="dvc repro export_teacher")
    if isinstance(card, NoFile):
        print(f"the teacher has no file to compare with: {card.no_file}")
    files = [] if isinstance(card, NoFile) else [teacher]
    for name in names:
        files.append(ExportedFile("distilled", name))
        int8 = ExportedFile("distilled", name, "int8")
        files += [int8] if int8.path.is_file() else []
    return files


def open_files(files: Sequence[ExportedFile], threads: int, provider: str) -> list[TimedNetwork]:
    networks = []
    for file in files:
        exported = open_file(file.path, threads, provider=provider)
        side = exported.metadata.image_size
        shape = (exported.metadata.channels, side, side)
        networks.append(
            TimedNetwork(file.name, file.precision, shape, exported.logits, exported.provider)
        )
    return networks


def open_in_pytorch(
    names: Sequence[str],
    image_shapes: Mapping[str | None, tuple[int, int, int]],
    device: torch.device,
) -> list[TimedNetwork]:
    """The teacher, if PyTorch runs it, and the students.

    Args:
        image_shapes: of each network's file, by name; a teacher without a file gets the students'.
    """
    models = [ModelOutputs("distilled", name) for name in names]
    if checkpoint.logit_source(TEACHER.model, produced_by="dvc repro teacher") is None:
        models.insert(0, TEACHER)
    networks = []
    for outputs in models:
        network, spec = checkpoint.load(outputs.model, produced_by=f"dvc repro {outputs.stage}")
        if spec.family != "onnx":
            shape = image_shapes.get(outputs.name, image_shapes[names[-1]])
            forward = pytorch_forward(network.eval().to(device), spec.input, device)
            networks.append(TimedNetwork(outputs.name, "float32", shape, forward))
    return networks


def pytorch_forward(network: nn.Module, spec: InputSpec, device: torch.device) -> Forward:
    """The forward pass of `evaluation.predict` in float32, which sets mode and precision at every
    call: that takes a few per cent of a small network's latency."""

    @torch.inference_mode()
    def forward(images: np.ndarray) -> torch.Tensor:
        return network(spec.apply_clean(torch.from_numpy(images).to(device))).float().cpu()

    return forward


def time_networks(
    networks: Sequence[TimedNetwork], *, engine: str, device: str, threads: int | None
) -> EngineSpeed:
    """Time all networks in turn."""
    tasks: dict[int, list[Callable[[], object]]] = {1: [], BATCH_SIZE: []}
    generator = np.random.default_rng(0)
    for timed in networks:
        # Noise: speed does not depend on what an image shows.
        images = generator.integers(256, size=(BATCH_SIZE, *timed.image_shape), dtype=np.uint8)
        for count, calls in tasks.items():
            calls.append(lambda run=timed.forward, images=images[:count]: run(images))
    latencies = latency.time_interleaved(tasks[1], **latency.SINGLE_IMAGE)
    batch_times = latency.time_interleaved(tasks[BATCH_SIZE], **latency.FULL_BATCH)[..., 0]
    of_teacher = (latencies[0], batch_times[0]) if networks[0].name is None else None
    teacher: FileSpeed | None = None
    students: dict[str, dict[Precision, FileSpeed]] = {}
    for timed, *times in zip(networks, latencies, batch_times, strict=True):
        if timed.name is None:
            teacher = latency.file_speed(*times, BATCH_SIZE)
        else:
            figures = latency.file_speed(*times, BATCH_SIZE, of_teacher)
            students.setdefault(timed.name, {})[timed.precision] = figures
    return EngineSpeed(
        engine=engine,
        device=device,
        threads=threads,
        rounds=latencies.shape[1],
        batch_size=BATCH_SIZE,
        teacher=teacher,
        students=students,
    )


def settings(names: Sequence[str]) -> Iterator[tuple[str, EngineSpeed]]:
    """Measure in each setting of this machine."""
    files, cores = files_to_time(names), available_cores()
    machine = latency.this_machine()
    engine = f"onnxruntime {machine.onnxruntime}"
    threads = {"onnxruntime_1_thread": 1, "onnxruntime_all_cores": cores}
    for setting, count in threads.items():
        if setting == "onnxruntime_1_thread" or cores > 1:
            networks = open_files(files, count, CPU)
            yield setting, time_networks(networks, engine=engine, device=machine.cpu, threads=count)
    if not torch.cuda.is_available():
        return
    gpu = torch.cuda.get_device_name()
    networks = open_files(files, cores, CUDA)
    if networks[0].provider == CUDA:
        yield "onnxruntime_cuda", time_networks(networks, engine=engine, device=gpu, threads=None)
    shapes, cuda = {n.name: n.image_shape for n in networks}, default_device()
    release = torch.__version__.partition("+")[0]
    yield (
        "pytorch_cuda",
        time_networks(
            open_in_pytorch(names, shapes, cuda),
            engine=f"PyTorch {release}",
            device=gpu,
            threads=None,
        ),
    )


def describe(name: str, speed: FileSpeed) -> str:
    line = (
        f"  {name}: {three_digits(speed.latency_ms)} ms (95th percentile "
        f"{three_digits(speed.latency_p95_ms)}), {rate(speed.images_per_second)} images/s"
    )
    if speed.speedup is None:
        return line
    return f"{line}; {speed.speedup.than_the_teacher}, in batches {speed.batch_speedup}"


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.stages.speed", description=__doc__).parse_args()
    with only_run_of("speed"):
        measure(StageInputs("speed"))


def measure(inputs: StageInputs) -> None:
    """Time all files, print their figures, and write them."""
    speeds = {}
    for setting, speed in settings(student_names()):
        speeds[setting] = speed
        threads = "" if speed.threads is None else f", {counted(speed.threads, 'thread')}"
        print(
            f"speed of one image, and in batches of {BATCH_SIZE}, in {speed.engine} on "
            f"{speed.device}{threads} ({counted(speed.rounds, 'round')}):"
        )
        for name, figures in speed.files:
            print(describe(name, figures), flush=True)
    inputs.check()
    content = Speeds(machine=latency.this_machine(), **speeds)
    write_json(latency.SPEED_FILE, content.model_dump(exclude_none=True))


if __name__ == "__main__":
    run_command(main)
