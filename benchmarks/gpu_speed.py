"""How fast is CUDA beside its own kernels, a live teacher, torchdistill, a bare forward pass?"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import epoch, loops, step, writing
from benchmarks.gpu_correctness import Setting
from benchmarks.harness import Row, alternate, median, seconds
from benchmarks.loops import RESNET20, Case, Loop
from benchmarks.reading import random_logits, write_store
from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.errors import UserError

MOBILENET_V2 = Case("MobileNetV2, 224 pixels", "torchvision", "mobilenet_v2", "resnet50", 224, 128)
SHORT, LONG = 1, 1000  # epochs: on CUDA, only long runs are compiled


def teacher_stage(setting: Setting) -> Iterator[Row]:
    """The stage's rate over the bare forward pass, in full shards."""
    size = {"rows": 64, "classes": 10} if setting.quick else {"rows": 16_384, "classes": 1000}
    yield from writing.measure(argparse.Namespace(pairs=2 if setting.quick else 5, **size))


def resnet20(setting: Setting) -> Iterator[Row]:
    case, samples = RESNET20, 45_000
    if setting.quick:
        case, samples = replace(case, student="resnet8", teacher="resnet8", batch_size=16), 64
    yield from _steps(setting, case, loops.noise(samples, 32, 100))


def mobilenet_v2(setting: Setting) -> Iterator[Row]:
    case, samples = MOBILENET_V2, 2048
    if setting.quick:
        small = {"teacher": "mobilenet_v3_small", "image_size": 32, "batch_size": 4}
        case, samples = replace(case, **small), 16
    yield from _steps(setting, case, loops.noise(samples, case.image_size, 1000))


def _steps(setting: Setting, case: Case, dataset: Dataset) -> Iterator[Row]:
    """A step of a run that is not compiled: cached, supervised and online; and its kernels."""
    pairs, steps = (2, 2) if setting.quick else (7, 60)
    yield from step.measure_case(case, dataset, setting.device, pairs, steps, epochs=SHORT)
    with tempfile.TemporaryDirectory() as folder:
        loop = _cached_loop(setting, case, dataset, Path(folder), SHORT)
        yield kernels(f"{case.name}: kernels", "cached", loop, steps, setting.device)


def _cached_loop(setting: Setting, case: Case, dataset: Dataset, folder: Path, epochs: int) -> Loop:
    store = write_store(folder, *random_logits(dataset), None).decoded_at(loops.TEMPERATURE)
    views, device = loops.training_views(dataset, setting.device), setting.device
    samples = len(dataset.splits["train"])
    steps = epochs * samples // case.batch_size
    setup = loops.cached(views, store.gather, device, (store.num_views, samples), steps)
    network = (case.family, case.student)
    return Loop(*network, dataset, setup, case.batch_size, device, epochs=epochs)


def kernels(table: str, name: str, loop: Loop, steps: int, device: torch.device) -> Row:
    """The share of a step in which the device computes or copies, by torch's profiler; on a CPU,
    the share in torch's operators."""
    loop.run(steps)
    taken = seconds(lambda: loop.run(steps))
    on_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        loop.run(steps)
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events = [
        event
        for event in found.key_averages()
        if event.device_type == wanted and not event.is_user_annotation
    ]
    times = (e.self_device_time_total if on_cuda else e.self_cpu_time_total for e in events)
    busy = sum(times) / 1e6  # of microseconds
    return {
        table: name,
        "ms a step": 1000 * taken / steps,
        "ms in kernels": 1000 * busy / steps,
        "share in kernels": busy / taken,
        "kernels a step": sum(event.count for event in events) / steps,
    }


def compiled(setting: Setting) -> Iterator[Row]:
    """A step of a long run, which CUDA compiles, over that of a short one."""
    case, samples, steps = RESNET20, 45_000, 60
    if setting.quick:
        case, samples, steps = replace(case, student="resnet8", batch_size=16), 64, 2
    dataset, device = loops.noise(samples, 32, 100), setting.device
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: _cached_loop(setting, case, dataset, Path(folder, name), epochs)
            for name, epochs in (("short", SHORT), ("long", LONG))
        }
        sides = {name: lambda _, loop=loop: loop.run(steps) for name, loop in found.items()}
        times = alternate(sides, 2 if setting.quick else 7)
        yield {
            case.name: "short run over long run",
            "ratio": median(times["short"] / times["long"]),
        }
        yield kernels(f"{case.name}: kernels", "long run", found["long"], steps, device)


def whole_epoch(setting: Setting) -> Iterator[Row]:
    """An epoch of CIFAR-100's size against torchdistill, if it is installed; of noise, whose
    content does not matter to speed."""
    samples, sizes = (128, (1, 1, 0)) if setting.quick else (50_000, (3, 60, 16))
    try:
        yield from epoch.compare(loops.noise(samples, 32, epoch.CLASSES), *sizes)
    except UserError as error:
        yield {"epoch": "torchdistill", "not measured": str(error).partition("(")[0]}
