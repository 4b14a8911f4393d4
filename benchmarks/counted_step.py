"""Count what a training asks of an emulated CUDA device; a program that `device_operations` starts.

    python -P benchmarks/counted_step.py EMULATOR NETWORK PIXELS BATCH

`pipeline` and `benchmarks` are those on PYTHONPATH, this or another checkout. Writes JSON: for each
case the device operations, and the crossings between host and device with their place and bytes.
"""

import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch.optim import optimizer

POLICIES = (
    *("none", "crop", "crop_flip", "random_resized_crop", "crop_flip+rand_augment(2,9)"),
    *("crop_flip+mixup(0.2)", "crop_flip+cutmix(1.0)"),
)
CLASSES = 100


def get_item(tensor: torch.Tensor, index: object) -> torch.Tensor:
    """Index as torch does on CUDA: a list is copied to the device, inside C++, where the emulation
    cannot follow."""
    parts = index if isinstance(index, tuple) else (index,)
    moved = [torch.tensor(it).to(tensor.device) if isinstance(it, list) else it for it in parts]
    return torch.Tensor.__getitem__(tensor, tuple(moved))


def main() -> None:
    emulator, network, pixels, batch_size = sys.argv[1:]
    sys.path.insert(0, str(Path(emulator).parent))
    emulated = importlib.import_module(Path(emulator).stem)
    emulated.install()
    # Optimisers then treat the emulated tensors as CUDA's: many in one operation.
    optimizer._foreach_supported_types.append(emulated.P)
    emulated.P.__getitem__ = get_item
    torch.set_num_threads(1)
    with emulated.MODE, redirect_stdout(sys.stderr):  # `fit` prints its epochs
        cases = Cases(emulated.REC, network, int(pixels), int(batch_size))
        found = {
            "policies": cases.policies(),
            "network": cases.network(),
            "losses": cases.losses(),
            "training": cases.training(),
        }
    print(json.dumps(found))


class Cases:
    """The counted pieces of a training."""

    def __init__(self, record, network: str, pixels: int, batch_size: int):
        from benchmarks import loops  # noqa: PLC0415  (after the device is emulated)
        from pipeline.compute.device import default_device  # noqa: PLC0415

        self._record, self._network, self._batch_size = record, network, batch_size
        self._loops, self._device = loops, default_device()
        self._dataset = loops.noise(2 * batch_size, pixels, CLASSES)
        rng = np.random.default_rng(0)
        self._rows = rng.normal(size=(2 * batch_size, CLASSES)).astype(np.float16)

    def count(self, task: Callable[[], object]) -> dict:
        crossings, sizes = Counter(), Counter()

        def add(what: str, size: int = 0) -> None:
            crossings[what, self._record.where()] += 1
            sizes[what, self._record.where()] += size

        self._record.add = add
        self._record.clear()
        task()
        operations = sum(n for name, n in self._record.ops.items() if name != "h2d")
        listed = [[what, place, n, sizes[what, place]] for (what, place), n in crossings.items()]
        return {"operations": operations, "crossings": listed}

    def soft_targets(self, view: int, samples: np.ndarray) -> tuple[np.ndarray, None]:
        return self._rows[samples], None

    def _cached(self, views: object) -> object:
        """A student's setup as its stage makes it; older checkouts keep no rows on the device."""
        cached = self._loops.cached
        stored = [(2, len(self._rows))] if "stored" in signature(cached).parameters else []
        return cached(views, self.soft_targets, self._device, *stored)

    def policies(self) -> dict[str, dict]:
        """Steps of a student by `kd`: within an epoch, and the first of an epoch."""
        from pipeline.views.loader import Views  # noqa: PLC0415
        from pipeline.views.policy import ViewPolicy  # noqa: PLC0415

        found = {}
        for text in POLICIES:
            split = self._dataset.splits["train"]
            views = Views(split, ViewPolicy.parse(text), 0, self._device)
            setup = self._cached(views)
            loop = self._loops.Loop(
                *("cifar_resnet", self._network, self._dataset, setup, self._batch_size),
                self._device,
            )
            self.count(lambda loop=loop: loop.run(1))
            for name in (text, f"{text}, first step of an epoch"):  # of two steps
                found[name] = self.count(lambda loop=loop: loop.run(1))
        return found

    def network(self) -> dict[str, dict]:
        """The forward and the backward pass of the network, which CUDA graphs replay."""
        from pipeline.compute.device import training_autocast  # noqa: PLC0415

        network, _ = self._loops.build_on_device(
            "cifar_resnet", self._network, self._dataset, self._device
        )
        pixels = self._dataset.splits["train"].images.shape[-1]
        inputs = torch.zeros((self._batch_size, 3, pixels, pixels), device=self._device)
        gradient = torch.zeros((self._batch_size, CLASSES), device=self._device)

        def passes() -> None:
            with training_autocast(self._device):
                logits = network(inputs)
            logits.float().backward(gradient)

        network.train()
        return {"forward, backward": self.count(passes)}

    def losses(self) -> dict[str, dict]:
        """The targets and loss of a step, forward and backward to the logits."""
        from benchmarks.losses import variants  # noqa: PLC0415
        from pipeline.distillation.objective import student_loss  # noqa: PLC0415
        from pipeline.students.label_loss import label_loss  # noqa: PLC0415
        from pipeline.students.loop import TrainingBatch  # noqa: PLC0415

        samples, found = np.arange(self._batch_size), {}
        labels = torch.zeros(len(samples), dtype=torch.int64, device=self._device)
        shape = len(samples), CLASSES
        logits = torch.zeros(shape, device=self._device).requires_grad_()
        batch = TrainingBatch(1, 0, samples, labels)
        losses = {"labels alone": lambda logits, batch: label_loss(logits, batch.labels)}
        for name, params in variants().items():
            losses[name] = student_loss(params, self.soft_targets, self._device)
        for name, loss in losses.items():
            found[name] = self.count(lambda loss=loss: loss(logits, batch).backward())
        return found

    def training(self) -> dict[str, dict]:
        """All of `fit`, from the upload of the images to the last validation."""
        from pipeline.students.loop import TrainingData, fit  # noqa: PLC0415
        from pipeline.students.params import TrainingParams  # noqa: PLC0415

        loops, device, count = self._loops, self._device, len(self._rows)
        held_out = replace(loops.noise(16, 8, CLASSES).splits["train"], name="validation")
        train = loops.noise(count, 8, CLASSES)
        dataset = replace(train, splits={**train.splits, "validation": held_out})
        params = TrainingParams(
            epochs=2, batch_size=count // 3 + 1, optimizer="sgd", learning_rate=0.01, seed=0
        )
        network, spec = loops.build_on_device("cifar_resnet", "resnet8", dataset, device)
        loss = self._cached(None).loss

        def run() -> None:
            views = loops.training_views(dataset, device)
            data = TrainingData(dataset, views, lambda number: number - 1, np.arange(count))
            fit(network, spec, data, loss, params, device)

        return {"2 epochs of 3 steps": self.count(run)}


if __name__ == "__main__":
    main()
