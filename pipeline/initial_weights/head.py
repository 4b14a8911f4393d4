"""The last layer of a network that starts from weights, as fine-tuning treats it."""

from torch import nn

from pipeline.initial_weights.class_rows import last_layer
from pipeline.models.spec import ModelSpec
from pipeline.runtime.errors import UserError


def head_parameters(network: nn.Module, spec: ModelSpec) -> frozenset[str]:
    """Names of the parameters with one row per class.

    Raises:
        UserError: there are none.
    """
    found = last_layer(spec) & {name for name, _ in network.named_parameters()}
    if not found:
        raise UserError(
            f"network `{spec.network}` has no layer whose weights have one row per class; "
            "`freeze_epochs` and `backbone_learning_rate_factor` need one, the last layer. Let the "
            "network's `build` make its last layer for `num_classes`, or remove both keys."
        )
    return found
