"""Compare an exported file with PyTorch's network on the test images."""

import copy
from collections.abc import Callable

import numpy as np
import torch

from pipeline.data.prepared.dataset import AnySplit
from pipeline.export.running.file_images import evenly_spread
from pipeline.export.to_onnx import NotExportable
from pipeline.models.evaluation import open_clean_views, predict
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import is_out_of_memory
from pipeline.views.loader import BATCH_SIZE

#: How far a logit of the file may be from PyTorch's, as a fraction of the largest magnitude in its
#: row (at least 1). In float32, engines that add in another order differ by about 1e-6 of it, deep
#: networks by more; a wrong size, normalisation or weight moves logits by far more than 1e-3.
TOLERANCE = 1e-3
#: Or this many times the error of float32 in PyTorch: some networks, such as those hardly trained,
#: have an error above TOLERANCE.
FLOAT32_ERRORS = 4
#: How many test images may have another class: rounding decides between nearly equal logits.
OTHER_CLASSES_PER_IMAGE = 1e-3  # at least one image


def float32_error(network: torch.nn.Module, spec: InputSpec, split: AnySplit) -> float:
    """The largest difference between PyTorch's logits in float32 and in float64, on at most
    BATCH_SIZE evenly spread images; 0 of a network that does not compute in float64."""
    samples = evenly_spread(len(split), BATCH_SIZE)
    views = open_clean_views(split, spec, torch.device("cpu"))
    (batch,) = views.batches(0, [samples])
    logits = predict(network, spec, batch.pixels, clean=True).double()
    try:
        with torch.inference_mode():
            exact = copy.deepcopy(network).double()(spec.apply_clean(batch.pixels).double())
    except Exception as error:  # code of a user's, or an ONNX file, that computes in float32 alone
        if is_out_of_memory(error):
            raise
        return 0.0
    return (logits - exact).abs().max().item()


def verify_logits(
    name: str,
    expected: np.ndarray,
    actual: np.ndarray,
    labels: np.ndarray,
    float32_error: Callable[[], float],
) -> dict[str, float]:
    """Refuse a file whose logits differ from PyTorch's beyond the tolerance, or give too many
    images another class.

    Args:
        expected, actual: [N, num_classes] raw logits of PyTorch and of the file.
        labels: [N].
        float32_error: called only if TOLERANCE is exceeded.
    """
    differences = np.abs(actual - expected)
    allowed = TOLERANCE * np.maximum(1, np.abs(expected).max(1, keepdims=True))
    torch_classes, onnx_classes = expected.argmax(1), actual.argmax(1)
    if not (differences <= allowed).all():  # so that NaN is refused, too
        allowed = np.maximum(allowed, FLOAT32_ERRORS * float32_error())
    differ = int((torch_classes != onnx_classes).sum())
    problems = []
    if not (differences <= allowed).all():
        row, column = np.unravel_index((differences / allowed).argmax(), differences.shape)
        problems.append(
            f"the logit of class {column} of test image {row} is {actual[row, column]:.6g}, but "
            f"{expected[row, column]:.6g} in PyTorch (tolerance {allowed[row, 0]:.2g})"
        )
    limit = max(1, int(OTHER_CLASSES_PER_IMAGE * len(labels)))
    if differ > limit:
        problems.append(
            f"{differ:,} of {len(labels):,} test images have another class (tolerance {limit:,})"
        )
    if problems:
        raise NotExportable(
            f"PyTorch and onnxruntime disagree on {name}: {'; '.join(problems)}. Nothing "
            "was written. Its network computes something else when it is exported, or torch's "
            "exporter converts an operation wrongly: check its file in pipeline/networks/, or try "
            "another version of torch."
        )
    return {
        "torch_accuracy": float((torch_classes == labels).mean()),
        # More digits would depend on the number of threads.
        "largest_difference": float(f"{differences.max():.1e}"),
        "decisions_that_differ": differ,
    }
