"""Cross-entropy to the labels, of mixed and of unlabelled images too."""

from functools import partial

from torch import Tensor
from torch.nn import functional as F


def label_loss(
    logits: Tensor,
    labels: Tensor,
    partner_labels: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy to the labels in nats: the sum over labelled rows, divided by B, so that the
    share of a row does not depend on how many rows of its batch are labelled.

    For mixed images: weight · cross-entropy to the label + (1 - weight) · cross-entropy to the
    partner's label (Zhang et al. 2018, arXiv:1710.09412); a missing label adds nothing.

    Args:
        logits: [B, C] float32 or wider.
        labels: [B] int64; -1 for an unlabelled sample.
        partner_labels: [B] int64, of the images mixed in; -1 as above.
        weights: [B] float32, the share of the sample itself.
        label_smoothing: the share of a label's probability that is divided equally among all C
            classes (Szegedy et al. 2016, arXiv:1512.00567).
    """
    cross_entropy = partial(
        F.cross_entropy, logits, ignore_index=-1, label_smoothing=label_smoothing
    )
    if partner_labels is None:
        return cross_entropy(labels, reduction="sum") / len(labels)
    to_label = cross_entropy(labels, reduction="none")  # [B]
    to_partner = cross_entropy(partner_labels, reduction="none")  # [B]
    return (weights * to_label + (1 - weights) * to_partner).sum() / len(labels)
