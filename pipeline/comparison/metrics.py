"""Classification metrics from logits: arithmetic with NumPy and SciPy, no files.

Not torchmetrics: the comparison starts without torch, and the bootstrap needs each sample's value,
which torchmetrics does not give. The tests compare each metric with torchmetrics.
"""

import numpy as np
from scipy import special

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017 (arXiv:1706.04599)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Normalise rows: [N, C] -> [N, C] float64."""
    return special.log_softmax(logits.astype(np.float64), axis=1)


def top_k_correct(logits: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Check whether the label is among the k largest logits: [N] bool.

    Ties go to the lower class, as in argmax.
    """
    rows = np.arange(len(labels))
    label_logits = logits[rows, labels][:, None]
    lower = np.arange(logits.shape[1])[None, :] < labels[:, None]
    return ((logits > label_logits) | ((logits == label_logits) & lower)).sum(1) < k


def nll(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the negative log-likelihood of the label: [N], in nats."""
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def kl_divergence(teacher_logits: np.ndarray, model_logits: np.ndarray) -> np.ndarray:
    """Compute KL(teacher || model) at temperature 1: [N], in nats."""
    teacher, model = log_softmax(teacher_logits), log_softmax(model_logits)
    return (np.exp(teacher) * (teacher - model)).sum(1)


def confidences(logits: np.ndarray) -> np.ndarray:
    """Compute the probability of the predicted class at temperature 1: [N] float64."""
    return np.exp(log_softmax(logits).max(1))


def bins(confidence: np.ndarray) -> np.ndarray:
    """Number the bin of each confidence: (0, 1/15] is 0."""
    return np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)


def reliability(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Bin samples by their largest probability: (0, 1/15], ..., (14/15, 1].

    Returns:
        [NUM_BINS, 3]: number of samples, mean confidence, accuracy (0 in an empty bin).
    """
    confidence = confidences(logits)
    correct = logits.argmax(1) == labels
    of_bin = bins(confidence)
    sums = [np.bincount(of_bin, w, NUM_BINS) for w in (np.ones(len(labels)), confidence, correct)]
    counts = np.maximum(sums[0], 1)
    return np.stack([sums[0], sums[1] / counts, sums[2] / counts], 1)


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Compute the expected calibration error over 15 bins (Guo et al. 2017, equation 3)."""
    count, confidence, accuracy = reliability(logits, labels).T
    return float((count * np.abs(confidence - accuracy)).sum() / count.sum())


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Find the temperature that minimises the mean NLL of logits / temperature.

    Section 4.2 of Guo et al. 2017. NLL is convex in 1 / temperature: bisection finds the root of
    its derivative. (Not SciPy's: it stops elsewhere, and recorded temperatures would change.)

    Returns:
        None if the minimum is not between 0.01 and 100. If every label has the largest logit, for
        example, a lower temperature always lowers the NLL.
    """
    logits = logits.astype(np.float64)
    label_logits = logits[np.arange(len(labels)), labels]

    def slope(log_inverse: float) -> float:
        probabilities = np.exp(log_softmax(logits * np.exp(log_inverse)))
        return float(((probabilities * logits).sum(1) - label_logits).mean())

    low, high = -np.log(100), np.log(100)
    if slope(low) >= 0 or slope(high) <= 0:
        return None
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))
