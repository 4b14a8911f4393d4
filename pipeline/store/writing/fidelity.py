"""Compare stored rows with the teacher's logits."""

from collections.abc import Mapping

import numpy as np
from scipy.special import log_softmax

from pipeline.store.format.encodings import decode

TEMPERATURES = (1, 2, 4)


def store_fidelity(
    logits: np.ndarray, labels: np.ndarray, stored: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """KL(teacher || stored) in nats, mean over rows, and agreement: the share of equal argmax.

    Rounded to four digits: more would depend on the number of threads.

    Args:
        logits: [n, C] float32, the teacher's.
        labels: [n] int64.
        stored: the same rows as `encode` returns them; decoded with the tail spread evenly.
    """
    measured = {}
    for temperature in TEMPERATURES:
        decoded, _ = decode(stored, labels, logits.shape[1], temperature=temperature)
        teacher = log_softmax(logits.astype(np.float64) / temperature, 1)
        difference = teacher - log_softmax(decoded.astype(np.float64) / temperature, 1)
        divergence = (np.exp(teacher) * difference).sum(1).mean()
        measured[f"kl_at_temperature_{temperature}"] = float(f"{divergence:.3e}")
    agreement = (logits.argmax(1) == decoded.argmax(1)).mean()
    return measured | {"agreement": float(f"{agreement:.4g}")}
