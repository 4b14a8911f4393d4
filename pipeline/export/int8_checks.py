"""Decide whether an int8 file may ship: its kernels compute its graph, and it loses little."""

from dataclasses import dataclass

import numpy as np

from pipeline.comparison.measurement.statistics import Gain, bootstrap_means, interval
from pipeline.export.to_onnx import NotExportable
from pipeline.runtime.errors import counted

#: Of how many test images the two are compared, evenly spread: the unoptimised graph is slow.
KERNEL_IMAGES = 500
#: How many images integer kernels may give another class than the graph as it is written, at least
#: one. Kernels round at other places: for three students of digits that decided for at most one
#: of 359 test images; kernels that saturate change 16 to 49 (`python -m benchmarks.int8`).
OTHER_CLASSES_PER_IMAGE = 0.01
#: How far logits may be apart (root mean square) as a share of their spread. The same students:
#: 0.006 at most; kernels that saturate: 0.25 to 0.49.
APART = 0.05


def verify_kernels(name: str, optimised: np.ndarray, unoptimised: np.ndarray) -> dict[str, float]:
    """Refuse an int8 file on which onnxruntime's integer kernels part from the graph as it is
    written, which every engine must follow.

    Args:
        name: of the network, for messages.
        optimised, unoptimised: [N, num_classes] logits of `ExportedNetwork` with and without
            `optimised`, of KERNEL_IMAGES test images.

    Raises:
        NotExportable: with the numbers.
    """
    differ = int((optimised.argmax(1) != unoptimised.argmax(1)).sum())
    limit = max(1, int(OTHER_CLASSES_PER_IMAGE * len(optimised)))
    spread = np.sqrt(((unoptimised - unoptimised.mean(1, keepdims=True)) ** 2).mean())
    apart = float(np.sqrt(((optimised - unoptimised) ** 2).mean()) / max(spread, 1e-12))
    if not (differ <= limit and apart <= APART):  # so that NaN is refused, too
        raise NotExportable(
            f"on the int8 file of {name}, onnxruntime's integer kernels and the unoptimised graph "
            f"give {differ:,} of {counted(len(optimised), 'test image')} another class (tolerance "
            f"{limit:,}), and logits that are {apart:.1%} of their spread apart (tolerance "
            f"{APART:.0%}). It would classify differently on other processors: ship the float32 "
            "file, or try another version of onnxruntime."
        )
    return {"kernel_decisions_that_differ": differ, "kernel_difference": float(f"{apart:.1e}")}


@dataclass(frozen=True)
class Int8Accuracy:
    """The accuracy of an int8 file beside that of its float32 file, on the same test images."""

    images: int
    float32: float  # shares in [0, 1]
    int8: float
    gain: Gain  # int8 minus float32, with its 95 % interval
    largest_loss: float  # points; `export.largest_loss`

    @property
    def refused(self) -> bool:
        """Whether the test images leave a loss beyond `largest_loss` possible: the interval of the
        difference reaches below it."""
        return -100 * self.gain.low > self.largest_loss + 1e-9

    @property
    def sentence(self) -> str:
        """Say what was measured and what follows."""
        loss, most = -100 * self.gain.gain, f"`export.largest_loss`, {self.largest_loss:g} points"
        change = f"{'loses' if loss >= 0 else 'gains'} {abs(loss):.2f}"
        measured = (
            f"int8 {change} points of accuracy against the float32 file ({self.float32:.2%} to "
            f"{self.int8:.2%}; 95 % interval of the difference {100 * self.gain.low:+.2f} to "
            f"{100 * self.gain.high:+.2f}) on {counted(self.images, 'test image')}"
        )
        if self.refused:
            return f"{measured}, which leave a loss beyond {most}, possible"
        return f"{measured}: within {most}"


def int8_accuracy(
    float32_logits: np.ndarray, int8_logits: np.ndarray, labels: np.ndarray, largest_loss: float
) -> Int8Accuracy:
    """Compare the accuracy of an int8 file with that of its float32 file, in pairs of test images.

    Args:
        float32_logits, int8_logits: [N, num_classes].
        labels: [N].
        largest_loss: points.
    """
    correct = [logits.argmax(1) == labels for logits in (float32_logits, int8_logits)]
    difference = correct[1].astype(float) - correct[0]
    low, high = interval(bootstrap_means(difference[:, None]))[:, 0]
    return Int8Accuracy(
        images=len(labels),
        float32=float(correct[0].mean()),
        int8=float(correct[1].mean()),
        gain=Gain(gain=float(difference.mean()), low=float(low), high=float(high)),
        largest_loss=largest_loss,
    )
