"""export: write a trained student as one ONNX file, and compare it with PyTorch on the test images.

Reads data/prepared/, models/students/NAME/ and `dataset`, `views.image_size` of params.yaml; writes
models/exported/NAME.onnx and metrics/export/NAME.json. Both engines run on the CPU, in float32.
"""

from pipeline.runtime.command import run_command

import argparse
from functools import partial
from pathlib import Path

import torch

from pipeline.data.prepared.dataset import Dataset, open_dataset, verify_dataset
from pipeline.data.sources.params import DatasetParams
from pipeline.export.onnx_model import OnnxMetadata, OnnxStudent
from pipeline.export.to_onnx import OPSET, to_onnx
from pipeline.export.verification import both_logits, float32_error, verify_logits
from pipeline.models import checkpoint
from pipeline.models.spec import ModelSpec
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import write_bytes, write_json
from pipeline.runtime.outputs import ModelOutputs
from pipeline.runtime.params import check_student, load_section
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.views.params import ViewsParams

EXPORTED = Path("models/exported")


def student_metadata(
    outputs: ModelOutputs, spec: ModelSpec, dataset: Dataset, params: DatasetParams
) -> OnnxMetadata:
    """The metadata of the file. Refuses a student of other images than the prepared ones."""
    again = f"dvc repro {outputs.stage}"
    trained_for = (list(spec.class_names), spec.input.channels)
    if trained_for != (list(dataset.class_names), dataset.channels):
        raise UserError(
            f"`{outputs.model}` was trained for {spec.num_classes} classes and images of "
            f"{spec.input.channels} channels, but data/prepared has {dataset.num_classes} "
            f"classes, of these or other names, and {dataset.channels} channels. Run `{again}`."
        )
    keys = ("storage", "image_size") + (("quality",) if params.storage == "encoded" else ())
    keys += () if params.bit_depth is None else ("bit_depth",)
    return OnnxMetadata(
        student=outputs.name,
        fingerprint=checkpoint.fingerprint(outputs.model, produced_by=again),
        class_names=list(dataset.class_names),
        opset=OPSET,
        channels=dataset.channels,
        image_size=dataset.image_size,
        reading={key: getattr(params, key) for key in keys},
    )


def export(name: str) -> None:
    check_student(name)
    inputs = StageInputs("export", name)
    params = load_section(DatasetParams, "dataset")
    dataset = open_dataset().resized(load_section(ViewsParams, "views").image_size)
    verify_dataset()
    outputs = ModelOutputs("distilled", name)
    network, spec = checkpoint.load(outputs.model, produced_by=f"dvc repro {outputs.stage}")
    content = to_onnx(network, spec.input, student_metadata(outputs, spec, dataset, params))
    path = EXPORTED / f"{name}.onnx"
    exported = OnnxStudent(content, str(path), torch.get_num_threads())
    labels = dataset.splits["test"].labels
    figures = verify_logits(
        name,
        *both_logits(network, spec, exported, dataset),
        labels,
        partial(float32_error, network, spec, dataset),
    )
    inputs.check()
    write_bytes(path, content)
    file_facts = {"opset": OPSET, "size_bytes": len(content), "test_images": len(labels)}
    write_json(Path("metrics/export") / f"{name}.json", file_facts | figures)
    print(
        f"{path}: {len(content):,} bytes, opset {OPSET}; on {counted(len(labels), 'test image')}, "
        f"accuracy {figures['onnx_accuracy']:.2%} (PyTorch {figures['torch_accuracy']:.2%}), "
        f"largest difference of a logit {figures['largest_difference']:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.export", description=__doc__)
    parser.add_argument("name", help="a student in params.yaml")
    export(parser.parse_args().name)


if __name__ == "__main__":
    run_command(main)
