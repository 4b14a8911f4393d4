"""Compare stored rows with the teacher's logits, and refuse rows that do not say what it says.

What a reader decodes is compared with the teacher in float32, whatever the precision of the
store's own forward pass, by probabilities: a number that is added to a row changes nothing.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import log_softmax, logsumexp

from pipeline.runtime.errors import UserError
from pipeline.store.format.encodings import decode

TEMPERATURES = (1, 2, 4)
#: Below this agreement, or above this divergence, a store is refused.
MINIMUM_AGREEMENT = 0.95
_TIE = 1 / 64  # logits so near each other can be one number of float16 (in a row within ±32)
MAXIMUM_KL = 0.01  # nats, of `kl_tail_as_one`


def compare_rows(
    logits: np.ndarray, labels: np.ndarray, stored: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Compare each row, [n] each: KL(teacher || stored) in nats, and whether they agree.

    `kl_at_temperature_T` spreads the tail of a top_k row evenly, as a student that reads it does.
    `kl_tail_as_one`, at T = 1, counts the tail as one class: what a row says apart from what top_k
    leaves out by design. They agree if the stored row's largest class is the teacher's largest,
    or is equal to it up to float16's rounding.

    Args:
        logits: [n, C] float32, the teacher's.
        labels: [n] int64.
        stored: the same rows as `encode` returns them.
    """
    num_classes, of_rows = logits.shape[1], {}
    for temperature in TEMPERATURES:
        decoded, kept = decode(stored, labels, num_classes, temperature=temperature)
        teacher = log_softmax(logits.astype(np.float64) / temperature, 1)
        student = log_softmax(decoded.astype(np.float64) / temperature, 1)
        of_rows[f"kl_at_temperature_{temperature}"] = _kl(teacher, student)
        if temperature == 1:
            pair = (teacher, student) if kept is None else _tail_as_one(teacher, student, kept)
            of_rows["kl_tail_as_one"] = _kl(*pair)
    first = decoded.argmax(1)[:, None]
    of_rows["agreement"] = logits.max(1) - np.take_along_axis(logits, first, 1)[:, 0] <= _TIE
    return of_rows


def _kl(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Of log-probabilities, [n, C] -> [n]; a class that the teacher gives none counts 0."""
    probabilities = np.exp(teacher)
    with np.errstate(invalid="ignore"):
        terms = probabilities * (teacher - student)
    return np.where(probabilities > 0, terms, 0).sum(1)


def _tail_as_one(*args: np.ndarray) -> Sequence[np.ndarray]:
    """[n, C] -> [n, C + 1]: the classes outside `kept` have none, and the last all of theirs."""
    *both, kept = args
    with np.errstate(divide="ignore"):
        return [
            np.concatenate(
                [
                    np.where(kept, rows, -np.inf),
                    logsumexp(np.where(kept, -np.inf, rows), axis=1, keepdims=True),
                ],
                axis=1,
            )
            for rows in both
        ]


def store_fidelity(
    logits: np.ndarray, labels: np.ndarray, stored: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """The means of `compare_rows`, rounded."""
    return rounded({name: v.mean() for name, v in compare_rows(logits, labels, stored).items()})


def check_fidelity(fidelity: Mapping[str, float], subject: str, advice: str) -> None:
    """Refuse rows that agree with the teacher too rarely, or diverge too far from it.

    Args:
        fidelity: as `store_fidelity` returns it; what is not in it is not checked.
        subject: where the rows are.
        advice: what to do.

    Raises:
        UserError: a bound is exceeded; says the figures.
    """
    agreement, divergence = fidelity.get("agreement", 1), fidelity.get("kl_tail_as_one", 0)
    if agreement >= MINIMUM_AGREEMENT and divergence <= MAXIMUM_KL:
        return
    found = [f"KL(teacher || stored) is {divergence:.3g} nats at T = 1"]
    if "agreement" in fidelity:
        found.insert(0, f"the largest class is the teacher's in {agreement:.2%}")
    raise UserError(
        f"{subject} do not hold what the teacher in float32 says: of their measured rows "
        f"{', and '.join(found)}; expected at least {MINIMUM_AGREEMENT:.0%}, and at most "
        f"{MAXIMUM_KL} nats (the tail of top_k counted as one class). {advice}"
    )


def rounded(means: Mapping[str, float]) -> dict[str, float]:
    """To four digits: more would depend on the number of threads."""
    return {
        name: float(f"{value:.4g}" if name == "agreement" else f"{value:.3e}")
        for name, value in means.items()
    }
