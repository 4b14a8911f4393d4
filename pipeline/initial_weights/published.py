"""`weights: pretrained`: a network with its published weights, for the dataset's classes.

If every class of the dataset is among those of the pretraining, the network keeps their rows of its
last layer and needs no training. Otherwise its last layer is new and has to be trained, as it is
where the pretraining had no classes (DINOv2, CLIP's image towers).
"""

from dataclasses import replace

from torch import nn

from pipeline.initial_weights.class_rows import classes_among, last_layer
from pipeline.models import checkpoint
from pipeline.models.spec import ModelSpec, build, family_module
from pipeline.runtime.errors import UserError


def check_published(family: str) -> None:
    """Refuse a family that publishes no weights, as its own file says by a function."""
    if not hasattr(family_module(family), "pretrained_state"):
        raise UserError(
            f"family `{family}` has no pretrained weights. Set other `weights`: of a student "
            "`scratch` or a file, of a teacher `train` or `checkpoint`."
        )


def load(spec: ModelSpec) -> tuple[nn.Module, ModelSpec]:
    """Load the published weights, on the CPU. The returned spec numbers the classes of the
    pretraining that the logits are for; None if the last layer is new (from torch's generator).

    Raises:
        UserError: the family has no published weights for it, they are neither here nor can be
            downloaded, or they do not fit the network's options.
    """
    check_published(spec.family)
    family = family_module(spec.family)
    network = build(spec)
    state, class_names = family.pretrained_state(spec.network, **spec.options)
    classes = classes_among(spec.class_names, class_names)
    spec = replace(spec, pretrained_classes=classes)
    head = last_layer(spec)
    unfit = [key for key in head if key not in state or len(state[key]) != len(class_names)]
    if unfit and class_names:
        raise UserError(
            f"the pretrained weights of `{spec.network}` have no {len(class_names)} rows "
            f"for {', '.join(f'`{key}`' for key in unfit)}. Remove the network's `options`."
        )
    fresh = network.state_dict()
    rows = {key: fresh[key] if classes is None else state[key][classes] for key in head}
    source = f"the pretrained weights of `{spec.network}`"
    versions = getattr(state, "_metadata", None)
    checkpoint.load_state(network, {**state, **rows}, source, versions)
    return network, spec
