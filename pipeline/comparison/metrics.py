"""How good a network's answers are, from its logits: arithmetic in NumPy, no files.

Computed with NumPy, not torchmetrics: the comparison starts without torch, and the bootstrap needs
each sample's value, which torchmetrics does not give. The tests compare each with torchmetrics.
"""

import numpy as np

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[N, C] -> [N, C] float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def top_k_correct(logits: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """[N] whether fewer than k other classes have a logit above the label's; ties go to the lower
    class, as in argmax."""
    rows = np.arange(len(labels))
    own = logits[rows, labels][:, None]
    lower = np.arange(logits.shape[1])[None, :] < labels[:, None]
    return ((logits > own) | ((logits == own) & lower)).sum(1) < k


def nll(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[N] negative log-likelihood of the label, in nats."""
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def kl_divergence(teacher_logits: np.ndarray, model_logits: np.ndarray) -> np.ndarray:
    """[N] KL(teacher || model) at temperature 1, in nats."""
    teacher, model = log_softmax(teacher_logits), log_softmax(model_logits)
    return (np.exp(teacher) * (teacher - model)).sum(1)


def reliability(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[NUM_BINS, 3] of equal bins of the largest probability, (0, 1/15], ..., (14/15, 1]:
    the number of samples, their mean confidence, their accuracy (0 where there is none)."""
    confidence = np.exp(log_softmax(logits).max(1))
    right = logits.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    sums = [np.bincount(bins, w, NUM_BINS) for w in (np.ones(len(labels)), confidence, right)]
    counts = np.maximum(sums[0], 1)
    return np.stack([sums[0], sums[1] / counts, sums[2] / counts], 1)


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error over 15 bins (Guo et al. 2017, arXiv:1706.04599, equation 3)."""
    count, confidence, accuracy = reliability(logits, labels).T
    return float((count * np.abs(confidence - accuracy)).sum() / count.sum())


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """The temperature that minimises the mean NLL of logits / temperature (Guo et al. 2017, 4.2).

    NLL is convex in 1 / temperature, so the root of its derivative is found by bisection.

    Returns:
        None where the minimum is not between 0.01 and 100: every label has the largest logit, say,
        and NLL falls for ever as the temperature does.
    """
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(labels)), labels]

    def slope(log_inverse: float) -> float:
        probabilities = np.exp(log_softmax(logits * np.exp(log_inverse)))
        return float(((probabilities * logits).sum(1) - own).mean())

    low, high = -np.log(100), np.log(100)
    if slope(low) >= 0 or slope(high) <= 0:
        return None
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def confusion(rows: np.ndarray, columns: np.ndarray, num_classes: int) -> np.ndarray:
    """[C, C] how many samples have class r in `rows` and class c in `columns`."""
    flat = np.bincount(rows * num_classes + columns, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def macro_f1(decisions: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """Mean F1 of the classes that are a label or a decision at least once."""
    table = confusion(labels, decisions, num_classes)
    seen = table.sum(0) + table.sum(1)
    return float((2 * table.diagonal()[seen > 0] / seen[seen > 0]).mean())


def class_accuracy(decisions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """[C] share of each class's samples that are right; NaN for a class without a sample."""
    counts = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels[decisions == labels], minlength=num_classes)
    return np.divide(right, counts, out=np.full(num_classes, np.nan), where=counts > 0)
