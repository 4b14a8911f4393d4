"""Measure where a student's training spends its time: each part of a step, and the cold start.

    python -m benchmarks.parts

Two cases: ResNet-20, 32 pixels, 100 classes, batches of 128; MobileNetV3-small, 224 pixels, 1,000
classes, batches of 32. The benchmark writes a step out and times its parts one by one, beside whole
steps of the loop that students run. Decoding is that of `prepare`, which decodes once. The cold
start is that of the real stage in a fresh process, in a project that the real stages have made. Its
files are in the page cache, and its teacher is untrained, which does not affect the speed.
"""

from pipeline.runtime.command import run_command

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks import loops
from benchmarks.loops import Case, Loop
from benchmarks.pairs import median
from benchmarks.reading import write_store
from pipeline.compute.device import default_device, depthwise_in_float32, training_autocast
from pipeline.data.prepared.dataset import Dataset
from pipeline.data.prepared.image_decoding import eight_bits
from pipeline.data.sources.archives import read_files
from pipeline.data.sources.image_reading import to_pixels
from pipeline.distillation.losses import kd
from pipeline.networks import cifar_resnet
from pipeline.runtime.errors import UserError
from pipeline.store.reading.store import Store
from pipeline.students.label_loss import label_loss
from pipeline.students.params import TrainingParams
from pipeline.training.optimisation import make_optimizer

ROOT = Path(__file__).parents[1]
K = 10  # of the top_k store
#: The teacher's stage without its gate, which would refuse an untrained teacher.
UNTRAINED = (
    "from pipeline.teacher import accuracy_gate; accuracy_gate.check = lambda *_, **__: None; "
    "from pipeline.stages import teacher; teacher.main()"
)


class Step:
    """A training step, part by part; each part uses the result of the one before."""

    def __init__(
        self, case: Case, dataset: Dataset, stores: dict[str, Store], encoded: list[bytes]
    ):
        self._device = default_device()
        self._case, self._dataset, self._encoded = case, dataset, encoded
        self._views = loops.training_views(dataset, self._device)
        self._stores = {name: store.decoded_at(loops.TEMPERATURE) for name, store in stores.items()}
        self._labels = torch.from_numpy(dataset.splits["train"].labels).to(self._device)
        self._network, self._spec = loops.build_on_device(
            case.family, case.student, dataset, self._device
        )
        params = TrainingParams(
            epochs=1, batch_size=case.batch_size, optimizer="sgd", learning_rate=0.01, seed=0
        )
        depthwise_in_float32(self._network, self._device)
        self._optimizer = make_optimizer(self._network.train(), params)

    def parts(self, number: int) -> Iterator[tuple[str, Callable[[], None]]]:
        """The parts of step `number`, in order."""
        size, samples = self._case.batch_size, len(self._labels)
        self._samples = np.random.default_rng(number).permutation(samples)[:size]
        yield "decode (by prepare, once)", self._decode
        yield "view", self._view
        yield "normalise", self._normalise
        yield "target, top_k", lambda: self._target("top_k")
        yield "target, dense", lambda: self._target("dense")
        yield "forward", self._forward
        yield "loss", self._loss
        yield "backward", self._backward
        yield "optimiser", self._optimise

    def seconds(self, number: int) -> dict[str, float]:
        found = {}
        for name, part in self.parts(number):
            begin = time.perf_counter()
            part()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            found[name] = time.perf_counter() - begin
        return found

    def _decode(self) -> None:
        for sample in self._samples:
            content = self._encoded[sample % len(self._encoded)]
            to_pixels(eight_bits(Image.open(io.BytesIO(content))), self._case.image_size, 3)

    def _view(self) -> None:
        self._batch = next(self._views.batches(loops.VIEW, [self._samples]))

    def _normalise(self) -> None:
        self._inputs = self._spec.apply(self._batch.pixels)

    def _target(self, store: str) -> None:
        rows = self._stores[store].gather(loops.VIEW, self._samples).logits
        self._teacher_logits = torch.from_numpy(rows).to(self._device, torch.float32)

    def _forward(self) -> None:
        with training_autocast(self._device):
            self._logits = self._network(self._inputs)

    def _loss(self) -> None:
        logits = self._logits.float()
        soft = kd(logits, self._teacher_logits, temperature=loops.TEMPERATURE)
        hard = label_loss(logits, self._labels[self._samples])
        self._loss_value = loops.HARD * hard + loops.SOFT * soft

    def _backward(self) -> None:
        self._optimizer.zero_grad()
        self._loss_value.backward()

    def _optimise(self) -> None:
        self._optimizer.step()


OUTSIDE_THE_STEP = {"decode (by prepare, once)", "target, top_k"}  # the store here is dense


def measure_parts(case: Case, dataset: Dataset, encoded: list[bytes], rounds: int) -> dict:
    split, rng = dataset.splits["train"], np.random.default_rng(0)
    logits = 3 * rng.standard_normal((len(split), dataset.num_classes), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            name: write_store(Path(folder) / name, logits, split.labels, k)
            for name, k in (("dense", None), ("top_k", K))
        }
        step = Step(case, dataset, stores, encoded)
        device = default_device()
        views = loops.training_views(dataset, device)
        setup = loops.cached(views, stores["dense"].gather, device)
        loop = Loop(case.family, case.student, dataset, setup, case.batch_size, device)
        times: dict[str, list[float]] = {}
        for number in range(-2, rounds):  # the first two set things up
            begin = time.perf_counter()
            loop.run(1)
            whole = time.perf_counter() - begin
            if number >= 0:
                found = step.seconds(number) | {"a step of the loop": whole}
                for name, seconds in found.items():
                    times.setdefault(name, []).append(seconds)
            else:
                step.seconds(0)
    size, found = case.batch_size, {name: median(values) for name, values in times.items()}
    inside = {k: v.median for k, v in found.items() if k not in OUTSIDE_THE_STEP}
    whole = inside.pop("a step of the loop")
    total = sum(inside.values())
    print(
        f"\n{case.name}, batches of {size}\n{'':<28}{'ms':>9}{'images/s':>12}{'of the parts':>14}"
    )
    for name, interval in found.items():
        share = f"{inside[name] / total:14.1%}" if name in inside else ""
        print(f"  {name:<26}{1000 * interval.median:9.2f}{size / interval.median:12,.0f}{share}")
    print(
        f"  {'the parts together':<26}{1000 * total:9.2f}  {total / whole:.1%} of the loop's step"
    )
    print(f"  what binds: {max(inside, key=inside.get)}", flush=True)
    return {name: round(size / interval.median, 1) for name, interval in found.items()}


def encode_png(image: np.ndarray) -> bytes:
    """[3, H, W] uint8 -> a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def make_project(case: Case, folder: Path, files: list[bytes], suffix: str) -> None:
    """Make a project, ready for the student `case.student`: 8 views, labelled by a ResNet-8."""
    with tarfile.open(folder / "images.tar", "w") as archive:
        for number, content in enumerate(files):
            member = tarfile.TarInfo(f"train/{number % 10}/{number:06d}.{suffix}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    torch.save(cifar_resnet.build("resnet8", 10, 3).state_dict(), folder / "teacher.pt")
    training = {"epochs": 1, "batch_size": case.batch_size, "learning_rate": 0.01, "seed": 0}
    size, teacher_training = case.image_size, training | {"policy": "crop_flip"}
    params = {
        "dataset": {
            "source": "image_folder",
            "root": "images.tar",
            "storage": "pixels",
            "image_size": size,
            "validation_fraction": 0.1,
            "test_fraction": 0.1,
            "split_seed": 0,
        },
        "views": {
            "policy": "crop_flip",
            "rand_augment": "none",
            "mix": "none",
            "count": 8,
            "seed": 0,
            "image_size": size,
        },
        "teacher": {
            "family": "cifar_resnet",
            "network": {"name": "resnet8", "input_size": 32},
            "weights": "checkpoint",
            "checkpoint": "teacher.pt",
            "training": teacher_training,
        },
        "soft_targets": {"encoding": "dense", "precision": "float32", "batch_size": 256},
        "training": training | {"optimizer": "sgd"},
        "distillation": {"temperature": 4.0, "soft_label_weight": 0.9, "hard_label_weight": 0.1},
        "students": {
            case.student: {
                "family": case.family,
                "network": case.student,
                "training": {},
                "distillation": {},
            }
        },
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
    run_module(folder, "pipeline.stages.prepare")
    run_python(folder, "-c", UNTRAINED)
    run_module(folder, "pipeline.stages.soft_targets")


def run_module(folder: Path, module: str, *arguments: str) -> str:
    return run_python(folder, "-m", module, *arguments)


def run_python(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise UserError(
            f"`python {' '.join(arguments)}` failed in the benchmark's project:\n{result.stderr}"
        )
    return result.stdout


def measure_cold_start(case: Case, files: list[bytes], suffix: str, starts: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        make_project(case, Path(name), files, suffix)
        found = []
        for _ in range(starts + 1):  # the first loads the files into the page cache
            arguments = (case.student, str(time.monotonic()))
            output = run_module(Path(name), "benchmarks.cold_start", *arguments)
            found.append(json.loads(output.splitlines()[-1]))
    parts = found[0]["seconds"]
    seconds = {k: float(np.median([f["seconds"][k] for f in found[1:]])) for k in parts}
    peak = int(np.median([f["peak_bytes"] for f in found[1:]]))
    print(f"\n{case.name}: cold start, {len(files):,} images, 8 views")
    for part, value in seconds.items():
        print(f"  {part:<28}{value:8.2f} s")
    print(f"  peak memory                 {peak / 2**20:8,.0f} MiB", flush=True)
    return {"seconds": {k: round(v, 3) for k, v in seconds.items()}, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.parts", description=__doc__)
    parser.add_argument(
        "--pairs", type=int, default=100, help="rounds: a loop's step and the parts"
    )
    parser.add_argument("--starts", type=int, default=5, help="fresh processes")
    parser.add_argument("--samples", type=int, default=10_000, help="images of 32 pixels: noise")
    parser.add_argument(
        "--photographs",
        type=Path,
        default=Path("data/raw/imagenet_samples.tar"),
        help="a folder or archive of images; without it, the case of 224 pixels is skipped",
    )
    arguments = parser.parse_args()
    print(f"{default_device().type}, {torch.get_num_threads()} threads; medians")
    noise = loops.noise(arguments.samples, 32, 100)
    encoded = [encode_png(image) for image in noise.splits["train"].images]
    cases = [(loops.RESNET20, noise, encoded, encoded, "png")]
    if arguments.photographs.exists():
        jpeg = [content for _, content in read_files(arguments.photographs)]
        dataset = loops.photographs(arguments.photographs, 496, 224, 1000)
        cases.append((loops.MOBILENET, dataset, jpeg, jpeg * 8, "jpg"))
    else:
        print(f"no photographs at {arguments.photographs} (--photographs): 224 pixels are skipped")
    summary = {"benchmark": "parts", "pairs": arguments.pairs, "starts": arguments.starts}
    for case, dataset, few, files, suffix in cases:
        summary[case.student] = {
            "images_per_second": measure_parts(case, dataset, few, arguments.pairs),
            "cold_start": measure_cold_start(case, files, suffix, arguments.starts),
        }
    print(json.dumps(summary))


if __name__ == "__main__":
    run_command(main)
