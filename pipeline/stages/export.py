"""export: a trained student as one ONNX file, proven on the test images.

Reads data/prepared/, models/students/NAME/ and `dataset`, `views.image_size` of params.yaml; writes
models/exported/NAME.onnx and metrics/export/NAME.json. Whatever trained the student, both engines
answer here on the CPU, in float32.
"""

from pipeline.runtime.command import run_command

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline.data.prepared.dataset import Dataset, open_dataset, verify_dataset
from pipeline.data.sources.params import DatasetParams
from pipeline.export.onnx_model import OnnxMetadata, OnnxStudent
from pipeline.export.to_onnx import OPSET, to_onnx
from pipeline.models import checkpoint
from pipeline.models.evaluation import BATCH_SIZE, METRICS, predict
from pipeline.models.spec import ModelSpec
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_bytes, write_json
from pipeline.runtime.params import check_student, load_section
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.views.loader import open_views
from pipeline.views.params import ViewsParams
from pipeline.views.plan import ViewPolicy

STUDENTS, EXPORTED = Path("models/students"), Path("models/exported")

#: How far a logit of the file may be from PyTorch's, as a share of the row's largest magnitude (1
#: at least). In float32, engines that add in another order differ by some 1e-6 of it, deep networks
#: by more; a wrong size, normalisation or weight moves logits by far more than 1e-3.
TOLERANCE = 1e-3
#: Or this many times as far as float32 moves PyTorch's own logits: of some networks, as those that
#: were hardly trained, it moves them further than TOLERANCE.
ROUNDINGS = 4
#: How many test images may have another class: where two logits are nearly equal, rounding decides.
DECISIONS_PER_IMAGE = 1e-3  # at least one image


def card_of(
    name: str, description: ModelSpec, dataset: Dataset, params: DatasetParams
) -> OnnxMetadata:
    """What the file will say of itself.

    Raises:
        UserError: the student was trained for other images than the prepared ones.
    """
    directory, again = STUDENTS / name, f"dvc repro student@{name}"
    trained_for = (list(description.class_names), description.input.channels)
    if trained_for != (list(dataset.class_names), dataset.channels):
        raise UserError(
            f"`{directory}` was trained for {description.num_classes} classes and images of "
            f"{description.input.channels} channels, but data/prepared has {dataset.num_classes} "
            f"classes, of these or other names, and {dataset.channels} channels. Run `{again}`."
        )
    keys = ("storage", "image_size") + (("quality",) if params.storage == "encoded" else ())
    return OnnxMetadata(
        student=name,
        fingerprint=checkpoint.fingerprint(directory, produced_by=again),
        class_names=list(dataset.class_names),
        opset=OPSET,
        channels=dataset.channels,
        image_size=dataset.image_size,
        reading={key: getattr(params, key) for key in keys},
    )


def both_logits(
    network: torch.nn.Module, description: ModelSpec, exported: OnnxStudent, dataset: Dataset
) -> tuple[np.ndarray, np.ndarray]:
    """Raw logits of the test images, [N, num_classes] float32 each: PyTorch's, and the file's."""
    split = dataset.splits["test"]
    order = np.split(np.arange(len(split)), range(BATCH_SIZE, len(split), BATCH_SIZE))
    torchs, files = [], []
    for batch in open_views(split, ViewPolicy("none"), 0, torch.device("cpu")).batches(0, order):
        torchs.append(predict(network, description.input, batch.pixels).numpy())
        files.append(exported.logits(batch.pixels.numpy()))
    return np.concatenate(torchs), np.concatenate(files)


def float32_error(network: torch.nn.Module, description: ModelSpec, dataset: Dataset) -> float:
    """How far float32 moves PyTorch's logits from those in float64: the furthest of at most
    BATCH_SIZE test images, evenly spread."""
    split, cpu = dataset.splits["test"], torch.device("cpu")
    samples = np.unique(np.linspace(0, len(split) - 1, BATCH_SIZE).astype(int))
    (batch,) = open_views(split, ViewPolicy("none"), 0, cpu).batches(0, [samples])
    logits = predict(network, description.input, batch.pixels).double()
    with torch.inference_mode():
        exact = copy.deepcopy(network).double()(description.input.apply(batch.pixels).double())
    return (logits - exact).abs().max().item()


def verify_logits(
    name: str,
    expected: np.ndarray,
    found: np.ndarray,
    labels: np.ndarray,
    rounding_of: Callable[[], float],
) -> dict[str, float]:
    """How near the file's answers come to PyTorch's.

    Args:
        expected, found: [N, num_classes] raw logits of PyTorch and of the file.
        labels: [N].
        rounding_of: `rounding`, asked where the tolerance alone would refuse.

    Raises:
        UserError: they differ beyond TOLERANCE, or too many images have another class.
    """
    differences = np.abs(found - expected)
    allowed = TOLERANCE * np.maximum(1, np.abs(expected).max(1, keepdims=True))
    decisions = expected.argmax(1), found.argmax(1)
    if not (differences <= allowed).all():  # so that NaN is refused, too
        allowed = np.maximum(allowed, ROUNDINGS * rounding_of())
    differ = int((decisions[0] != decisions[1]).sum())
    problems = []
    if not (differences <= allowed).all():
        row, column = np.unravel_index((differences / allowed).argmax(), differences.shape)
        problems.append(
            f"of test image {row}, the logit of class {column} is {found[row, column]:.6g} where "
            f"PyTorch's is {expected[row, column]:.6g} (tolerance {allowed[row, 0]:.2g})"
        )
    limit = max(1, int(DECISIONS_PER_IMAGE * len(labels)))
    if differ > limit:
        problems.append(
            f"{differ:,} of {len(labels):,} test images have another class (tolerance {limit:,})"
        )
    if problems:
        raise UserError(
            f"student `{name}` answers otherwise as an ONNX file: {'; '.join(problems)}. Nothing "
            "was written. Its network does something else when it is exported, or torch's exporter "
            "is wrong about an operation of it: look at its file in pipeline/networks/, or try "
            "another version of torch."
        )
    return {
        "torch_accuracy": float((decisions[0] == labels).mean()),
        "onnx_accuracy": float((decisions[1] == labels).mean()),
        # More digits would depend on the number of threads.
        "largest_difference": float(f"{differences.max():.1e}"),
        "decisions_that_differ": differ,
    }


def export(name: str) -> None:
    check_student(name)  # or says which students there are
    inputs = StageInputs("export", name)
    params = load_section(DatasetParams, "dataset")
    dataset = open_dataset().resized(load_section(ViewsParams, "views").image_size)
    verify_dataset()
    network, description = checkpoint.load(STUDENTS / name, produced_by=f"dvc repro student@{name}")
    card = card_of(name, description, dataset, params)
    content = to_onnx(network, description.input, card)
    path = EXPORTED / f"{name}.onnx"
    exported = OnnxStudent(content, str(path), torch.get_num_threads())
    labels = dataset.splits["test"].labels
    figures = verify_logits(
        name,
        *both_logits(network, description, exported, dataset),
        labels,
        partial(float32_error, network, description, dataset),
    )
    inputs.check()
    write_bytes(path, content)
    described = {"opset": OPSET, "size_bytes": len(content), "test_images": len(labels)}
    write_json(METRICS / "export" / f"{name}.json", described | figures)
    print(
        f"{path}: {len(content):,} bytes, opset {OPSET}; on {len(labels):,} test images, accuracy "
        f"{figures['onnx_accuracy']:.2%} (PyTorch {figures['torch_accuracy']:.2%}), largest "
        f"difference of a logit {figures['largest_difference']:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.export", description=__doc__)
    parser.add_argument("name", help="a student in params.yaml")
    export(parser.parse_args().name)


if __name__ == "__main__":
    run_command(main)
