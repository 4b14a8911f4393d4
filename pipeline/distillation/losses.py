"""Distillation losses: one plain function of tensors per method.

Formulas, sources and defaults: docs/losses.md. Each agrees with its authors' code (`pld`: with its
formula) to 1e-10 in float64 (tests/distillation) and stays finite where that code overflows: no
probability is formed before its logarithm. Throughout, student_logits and teacher_logits are [B, C]
raw scores and labels [B] int64 in 0 ... C - 1; a loss is a mean over B, in nats where it is one.
Half-precision logits are computed in float32, inside an autocast region too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_STANDARDIZATION_EPSILON = 1e-7  # as in the authors' code, added to the standard deviation
_STRONG_TEMPERATURES = 3  # in the authors' code of MLKD, of its five
_CORRELATION_EPSILON = 1e-8  # in the authors' code, added to the product of the norms


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    standardize: bool = False,
    kept: Tensor | None = None,
) -> Tensor:
    """T² · KL(teacher || student), both at temperature T.

    T² keeps the gradients' scale beside the label term (Hinton et al. 2015, arXiv:1503.02531,
    section 2).

    Args:
        standardize: of both rows' `standardized` logits.
        kept: [B, C] bool; if given, the classes of a row that are not kept count as one, with the
            sum of their probabilities, in the teacher and in the student.
    """
    rows = _prepared(student_logits, teacher_logits, standardize)
    student, teacher = _log_probabilities(rows, temperature, kept)
    return temperature**2 * _kl(student, teacher).mean()


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    kept: Tensor | None = None,
) -> Tensor:
    """T² · cross-entropy of the student to the teacher's probabilities, both at temperature T.

    Its gradient is that of `kd`; its value keeps the teacher's entropy (Beyer et al. 2022,
    arXiv:2106.05237: function matching, at T = 1 and without labels).

    Args:
        kept: as in `kd`.
    """
    rows = _prepared(student_logits, teacher_logits)
    student, teacher = _log_probabilities(rows, temperature, kept)
    return -(temperature**2) * (teacher.exp() * student).sum(1).mean()


def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared difference of the logits less their row's mean, mean over B and C.

    Ba and Caruana 2014, arXiv:1312.6184, have C / 2 times this: half the sum over C. Less the mean,
    as in Hinton et al. 2015, arXiv:1503.02531, section 2.1, because the number that a store
    subtracts from a row is arbitrary.
    """
    student, teacher = _prepared(student_logits, teacher_logits)
    return F.mse_loss(_centred(student), _centred(teacher))


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    standardize: bool = False,
) -> Tensor:
    """T² · (alpha · KL of (label, all others) + beta · KL among the others).

    Zhao et al. 2022, arXiv:2203.08679: knowledge about the target class, and about the
    classes that are not.
    """
    student, teacher = _prepared(student_logits, teacher_logits, standardize)
    student, teacher = student / temperature, teacher / temperature
    target = _one_hot(labels, student)
    target_class = _kl(_in_or_out(student, target), _in_or_out(teacher, target))
    other_classes = _kl(
        _log_softmax_outside(student, target), _log_softmax_outside(teacher, target)
    )
    return temperature**2 * (alpha * target_class + beta * other_classes).mean()


def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float,
    temperature: float,
) -> Tensor:
    """Cross-entropy to the teacher's probability of the label (T = 1), and gamma · T² ·
    cross-entropy among the other classes, their probabilities normalised.

    Yang et al. 2023, arXiv:2303.13005, less its cross-entropy to the label.
    """
    student, teacher = _prepared(student_logits, teacher_logits)
    target = _one_hot(labels, student)
    student_label, teacher_label = (
        F.log_softmax(logits, 1).gather(1, labels[:, None])[:, 0] for logits in (student, teacher)
    )
    target_class = teacher_label.exp() * student_label
    others = _log_softmax_outside(teacher / temperature, target).exp()
    other_classes = (others * _log_softmax_outside(student / temperature, target)).sum(1)
    return -(target_class + gamma * temperature**2 * other_classes).mean()


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    gamma: float,
    temperature: float,
) -> Tensor:
    """T² · (beta · (1 - mean correlation of rows) + gamma · (1 - mean correlation of columns)) of
    the probabilities at temperature T.

    Huang et al. 2022, arXiv:2205.10536: Pearson's correlation between classes
    for each sample, and between samples for each class. Computed in float64: rows and columns
    without contrast are all rounding in less.
    """
    student, teacher = (
        F.softmax(logits.double() / temperature, 1) for logits in (student_logits, teacher_logits)
    )
    rows = 1 - _correlation(student, teacher).mean()
    columns = 1 - _correlation(student.T, teacher.T).mean()
    loss = temperature**2 * (beta * rows + gamma * columns)
    return loss.to(_at_least_float32(student_logits).dtype)


def ttm(student_logits: Tensor, teacher_logits: Tensor, *, gamma: float) -> Tensor:
    """KL(teacher's probabilities to the power gamma, normalised || student at T = 1).

    Zheng and Yang 2024, arXiv:2402.11148: temperature 1 / gamma for the teacher alone.
    """
    student, teacher = _prepared(student_logits, teacher_logits)
    return _kl(F.log_softmax(student, 1), F.log_softmax(gamma * teacher, 1)).mean()


def wttm(student_logits: Tensor, teacher_logits: Tensor, *, gamma: float) -> Tensor:
    """`ttm` with each sample weighted by the sum of the teacher's probabilities to the power gamma.

    Zheng and Yang 2024, arXiv:2402.11148: the flatter the teacher's answer, the heavier.
    """
    student, teacher = _prepared(student_logits, teacher_logits)
    weights = (gamma * F.log_softmax(teacher, 1)).logsumexp(1).exp()
    return (weights * _kl(F.log_softmax(student, 1), F.log_softmax(gamma * teacher, 1))).mean()


def rld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    alpha_temperature: float,
    standardize: bool = False,
) -> Tensor:
    """alpha · Tₐ² · KL of (teacher's first class, all others) from the student's (label, all
    others) at Tₐ, and beta · T² · KL among the classes that the teacher ranks below the label.

    Sun et al. 2025, arXiv:2408.07703, refined logit distillation: what the teacher says against
    the label is left out. A row where it ranks nothing below the label has no second term.
    """
    student, teacher = _prepared(student_logits, teacher_logits, standardize)
    label, first = _one_hot(labels, student), _one_hot(teacher.argmax(1), student)
    confidence = _kl(
        _in_or_out(student / alpha_temperature, label),
        _in_or_out(teacher / alpha_temperature, first),
    )
    misleading = teacher >= teacher.gather(1, labels[:, None])
    ranking = _kl(
        _log_softmax_outside(student / temperature, misleading),
        _log_softmax_outside(teacher / temperature, misleading),
    )
    return (alpha * alpha_temperature**2 * confidence + beta * temperature**2 * ranking).mean()


def mlkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperatures: Sequence[float],
    standardize: bool = False,
) -> Tensor:
    """The sum over temperatures of `kd`, `class_correlation` and `batch_correlation`.

    Jin et al. 2023, CVPR, multi-level logit distillation: instances, classes and the batch.

    Args:
        standardize: in `kd` alone, as in the code of Sun et al. 2024.
    """
    return sum(
        kd(student_logits, teacher_logits, temperature=temperature, standardize=standardize)
        + class_correlation(student_logits, teacher_logits, temperature=temperature)
        + batch_correlation(student_logits, teacher_logits, temperature=temperature)
        for temperature in temperatures
    )


def paired_mlkd(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    *,
    temperatures: Sequence[float],
    standardize: bool = False,
) -> Tensor:
    """`mlkd` of a weak and a strong view of each image, as in the code of Jin et al. 2023.

    On the weak view, `kd` and `batch_correlation` count by the share of samples of which the
    teacher is no surer than of the median sample, and `class_correlation` by the share of classes
    whose summed probability is at most the median: the code masks with these what it has averaged
    before. It adds `kd` once more: of the strong view at the first three temperatures, of the weak
    view at the others.

    Args:
        student_logits, teacher_logits: of the weak view and of the strong view, [B, C] each.
        standardize: in `kd` alone, as in the code of Sun et al. 2024.
    """
    weak, strong = zip(student_logits, teacher_logits, strict=True)
    probabilities = F.softmax(_at_least_float32(weak[1]), 1)
    samples = _share_up_to_median(probabilities.amax(1))
    classes = _share_up_to_median(probabilities.sum(0))
    total = 0
    for place, temperature in enumerate(temperatures):
        view = strong if place < _STRONG_TEMPERATURES else weak
        instances = kd(*weak, temperature=temperature, standardize=standardize)
        total = (
            total
            + samples * (instances + batch_correlation(*weak, temperature=temperature))
            + classes * class_correlation(*weak, temperature=temperature)
            + kd(*view, temperature=temperature, standardize=standardize)
        )
    return total


def paired_crld(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    *,
    temperature: float,
    within_view_weight: float,
    cross_view_weight: float,
    weak_confidence: float,
    strong_confidence: float,
) -> Tensor:
    """T² · KL of each view from its own row, and from the other view's row, summed over the views.

    Zhang et al. 2024, ACM MM, cross-view consistency: each of the two terms has a weight, and takes
    the images of which the teacher is sure, the first on the weak view and the second on the strong
    one. The others count as 0 in its mean.

    Args:
        student_logits, teacher_logits: of the weak view and of the strong view, [B, C] each.
        weak_confidence, strong_confidence: the teacher's largest probability, at T = 1, from which
            on it is sure.
    """
    (weak, strong), (weak_teacher, strong_teacher) = (
        [F.log_softmax(_at_least_float32(logits) / temperature, 1) for logits in both]
        for both in (student_logits, teacher_logits)
    )
    confidences = [F.softmax(_at_least_float32(logits), 1).amax(1) for logits in teacher_logits]
    within = _kl(weak, weak_teacher) + _kl(strong, strong_teacher)
    within = within * (confidences[0] >= weak_confidence)
    across = _kl(strong, weak_teacher) + _kl(weak, strong_teacher)
    across = across * (confidences[1] >= strong_confidence)
    return temperature**2 * (within_view_weight * within + cross_view_weight * across).mean()


def pld(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking under the student, its choices weighted by the teacher.

    Bassam et al. 2025, arXiv:2506.12542, Plackett-Luce distillation: the label first, then the
    other classes as the teacher ranks them. The student chooses each among those not yet chosen,
    with its softmax; the weight is the teacher's probability of that class. The first choice is
    cross-entropy to the label. Equal logits of the teacher are ranked by their class number.
    """
    student, teacher = _prepared(student_logits, teacher_logits)
    ranking = _ranking(teacher, labels)
    ranked = student.gather(1, ranking)
    unchosen = ranked.flip(1).logcumsumexp(1).flip(1)  # [B, C] log of the sum of exponentials
    weights = F.softmax(teacher, 1).gather(1, ranking)
    return (weights * (unchosen - ranked)).sum(1).mean()


def sld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperatures: Sequence[float],
    student_teaches: bool = False,
) -> Tensor:
    """The sum over temperatures of `kd` by a teacher whose largest logit is always the label's.

    Limantoro et al. 2025, arXiv:2504.20108, swapped logit distillation: where another class has
    the largest logit, it and the label's are swapped.

    Args:
        student_teaches: add the same terms with the student's own logits, swapped, as the teacher.
            As in the authors' code, gradients flow through both sides.
    """
    rows = [_label_first(teacher_logits, labels)]
    if student_teaches:
        rows.append(_label_first(student_logits, labels))
    return sum(kd(student_logits, row, temperature=t) for row in rows for t in temperatures)


def class_correlation(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float
) -> Tensor:
    """||Pₜ'Pₜ - Pₛ'Pₛ||² / C of the probabilities P [B, C] at temperature T, without T²."""
    both = _prepared(student_logits, teacher_logits)
    return _gram_difference(*(F.softmax(logits / temperature, 1).T for logits in both))


def batch_correlation(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float
) -> Tensor:
    """||PₜPₜ' - PₛPₛ'||² / B of the probabilities P [B, C] at temperature T, without T²."""
    both = _prepared(student_logits, teacher_logits)
    return _gram_difference(*(F.softmax(logits / temperature, 1) for logits in both))


def standardized(logits: Tensor) -> Tensor:
    """Each row minus its mean, divided by its standard deviation (of C - 1) plus 1e-7.

    Sun et al. 2024, arXiv:2403.01427, as in their code. Computed in float64: on a row without
    contrast the division magnifies rounding ten million times.
    """
    rows = logits.double()
    rows = (rows - rows.mean(1, keepdim=True)) / (
        rows.std(1, keepdim=True) + _STANDARDIZATION_EPSILON
    )
    return rows.to(_at_least_float32(logits).dtype)


def sorted_by_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Each row's logits in another order: the label gets the largest, and the other classes keep
    their ranking, [B, C] -> [B, C].

    Limantoro 2025, arXiv:2508.16544: corrects a teacher that is wrong. The classes that it ranks
    above the label move down by one.
    """
    return logits.scatter(1, _ranking(logits, labels), logits.sort(dim=1, descending=True).values)


def _ranking(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, C] class numbers: the label's, then the others by falling logit; equal ones by number."""
    first = _one_hot(labels, logits)
    return logits.masked_fill(first, torch.inf).sort(dim=1, descending=True, stable=True).indices


def _share_up_to_median(values: Tensor) -> Tensor:
    """The share of values that are at most the median; of an even number, the lower middle one."""
    return (values <= values.median()).to(values.dtype).mean()


def _prepared(student: Tensor, teacher: Tensor, standardize: bool = False) -> tuple[Tensor, Tensor]:
    if standardize:
        return standardized(student), standardized(teacher)
    return _at_least_float32(student), _at_least_float32(teacher)


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype.itemsize >= 4 else logits.float()


def _log_probabilities(
    both_logits: Sequence[Tensor], temperature: float, kept: Tensor | None
) -> list[Tensor]:
    both = [F.log_softmax(logits / temperature, 1) for logits in both_logits]
    return both if kept is None else [_with_bucket(rows, kept) for rows in both]


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities, [B, C] -> [B]."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, C] bool."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, labels[:, None], True)


def _label_first(logits: Tensor, labels: Tensor) -> Tensor:
    """Each row with the logit of its label and its largest logit swapped."""
    largest, first = logits.max(1, keepdim=True)
    label = labels[:, None]
    return logits.scatter(1, first, logits.gather(1, label)).scatter(1, label, largest)


# Where a class is to have no probability it gets the lowest finite logit: exp gives 0, and
# 0 · log 0 and its gradient are 0 instead of not a number.


def _without(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(mask, torch.finfo(logits.dtype).min)


def _log_softmax_outside(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of the classes outside the mask, [B, C]; uniform if there is none."""
    return F.log_softmax(_without(logits, mask), 1)


def _in_or_out(logits: Tensor, mask: Tensor) -> Tensor:
    """[B, C] -> [B, 2]: log of the probability inside the mask, and outside it."""
    log_probabilities = F.log_softmax(logits, 1)
    parts = [_without(log_probabilities, ~mask), _without(log_probabilities, mask)]
    return torch.stack([part.logsumexp(1) for part in parts], 1)


def _with_bucket(log_probabilities: Tensor, kept: Tensor) -> Tensor:
    """[B, C] -> [B, C + 1]: the kept classes, and last the sum of the others."""
    bucket = _without(log_probabilities, kept).logsumexp(1, keepdim=True)
    return torch.cat([_without(log_probabilities, ~kept), bucket], dim=1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of a with that of b, [N, M] -> [N]; 0 without contrast."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / (norms + _CORRELATION_EPSILON)


def _gram_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """||TT' - SS'||² / N of [N, M] matrices."""
    with torch.autocast(student.device.type, enabled=False):  # it would multiply in bfloat16
        difference = teacher @ teacher.T - student @ student.T
    return difference.square().sum() / len(student)
