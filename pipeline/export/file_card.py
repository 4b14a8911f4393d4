"""Describe an exported file by its model card."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.comparison.measurement import statistics
from pipeline.data.prepared.dataset import Dataset
from pipeline.export.model_card import (
    Accuracy,
    FileFacts,
    Input,
    Int8Facts,
    ModelCard,
    NetworkFacts,
    Output,
)
from pipeline.export.running.onnx_model import IMAGE, LOGITS, OnnxMetadata
from pipeline.models.spec import ModelSpec
from pipeline.runtime.outputs import ExportedFile, Start


def describe_file(
    file: ExportedFile,
    content: bytes,
    metadata: OnnxMetadata,
    spec: ModelSpec,
    dataset: Dataset,
    test_logits: np.ndarray,
    *,
    training: Mapping[str, Any],
    start: Start | None,
    teacher: Mapping[str, Any] | None,
    licence: str | None,
    int8: Int8Facts | None = None,
) -> ModelCard:
    """Describe a file.

    Args:
        test_logits: [N, num_classes], the file's.
        training: the parameters of the stage that trained the network.
        start: of that stage's network; None for the teacher.
        teacher: the network behind the soft targets, of a distilled student.
    """
    correct = test_logits.argmax(1) == dataset.splits["test"].labels
    means = statistics.bootstrap_means(correct[:, None])
    low, high = statistics.share_intervals(correct[:, None], means)[:, 0]
    return ModelCard(
        name=metadata.name,
        role=file.role,
        precision=file.precision,
        file=FileFacts(
            name=file.path.name,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            opset=metadata.opset,
        ),
        network=NetworkFacts(
            family=spec.family,
            name=spec.network,
            options=spec.options,
            input_size=spec.input.size,
            fingerprint=metadata.fingerprint,
        ),
        classes=metadata.class_names,
        input=Input(
            name=IMAGE, type="uint8", channels=metadata.channels, image_size=metadata.image_size
        ),
        output=Output(name=LOGITS, type="float32"),
        preprocessing=metadata.reading,
        description=metadata.in_words(),
        test=Accuracy(
            images=len(correct),
            accuracy=round(float(correct.mean()), 6),
            low=round(float(low), 6),
            high=round(float(high), 6),
        ),
        int8=int8,
        teacher=teacher,
        training=training,
        start=start,
        dataset_fingerprint=dataset.fingerprint,
        licence=licence,
    )
