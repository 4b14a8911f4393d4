"""`weights: pretrained`: a network with its published weights, for the dataset's classes.

Where every class of the dataset is one of the pretraining's, the network keeps the rows of its last
layer that belong to them, and answers at once; otherwise its last layer starts afresh and it has to
be trained. Contract code: an edit here runs the teacher again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.models import checkpoint
from pipeline.models.spec import ModelSpec, build, family_module
from pipeline.runtime.errors import UserError
from pipeline.teacher.imagenet_classes import WORDNET_IDS


def load(description: ModelSpec) -> tuple[nn.Module, ModelSpec]:
    """The network with its published weights, on the CPU; the description names the classes of the
    pretraining that its logits are for, or None where the last layer is new (from torch's global
    generator).

    Raises:
        UserError: the family has no published weights for it, they cannot be had, or they do not
            fit the network's options.
    """
    family = family_module(description.family)
    if not hasattr(family, "pretrained_state"):
        raise UserError(
            f"family `{description.family}` has no pretrained weights. Set `weights: train`, or "
            "`weights: checkpoint` with a file."
        )
    state, class_names = family.pretrained_state(description.network)
    classes = classes_among(description.class_names, class_names)
    description = replace(description, pretrained_classes=classes)
    network = build(description)
    head = last_layer(description)
    unfit = [key for key in head if key not in state or len(state[key]) != len(class_names)]
    if unfit:
        raise UserError(
            f"the pretrained weights of `{description.network}` have no {len(class_names)} rows "
            f"for {', '.join(f'`{key}`' for key in unfit)}. Leave the network's `options` away."
        )
    if classes is None:
        own = network.state_dict()
        fitted = {**state, **{key: own[key] for key in head}}
    else:
        fitted = {**state, **{key: state[key][classes] for key in head}}
    checkpoint.load_state(network, fitted, f"the pretrained weights of `{description.network}`")
    return network, description


def classes_among(class_names: Sequence[str], pretrained: Sequence[str]) -> list[int] | None:
    """For each class of the dataset its number among the pretraining's, by name or, where those
    are ImageNet's, by WordNet id; None if any is not among them, or two are the same."""
    exact, plain = (_numbers(names) for names in (pretrained, map(_plain, pretrained)))
    if len(pretrained) == len(WORDNET_IDS):
        exact |= _numbers(WORDNET_IDS)
    found = [exact.get(name, plain.get(_plain(name))) for name in class_names]
    if None in found or len(set(found)) < len(found):
        return None
    return [number for number in found if number is not None]


def _numbers(names: Iterable[str]) -> dict[str, int | None]:
    """The number of each name; None for a name that several classes have."""
    numbers: dict[str, int | None] = {}
    for number, name in enumerate(names):
        numbers[name] = None if name in numbers else number
    return numbers


def _plain(name: str) -> str:
    """A name without what folders and lists of classes write differently."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def last_layer(description: ModelSpec) -> frozenset[str]:
    """Keys of the tensors that have one row for each class."""
    with torch.random.fork_rng(devices=[]):
        own, other = (
            _shapes(replace(description, class_names=[*description.class_names, *more]))
            for more in ([], [""])
        )
    return frozenset(key for key, shape in own.items() if shape != other[key])


def _shapes(description: ModelSpec) -> Mapping[str, torch.Size]:
    state: Mapping[str, Tensor] = build(description).state_dict()
    return {key: value.shape for key, value in state.items()}
