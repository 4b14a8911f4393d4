"""`weights: pretrained`: a network with its published weights, for the dataset's classes.

If every class of the dataset is among those of the pretraining, the network keeps their rows of its
last layer and needs no training. Otherwise its last layer is new and has to be trained.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pipeline.models import checkpoint
from pipeline.models.spec import ModelSpec, build, family_module
from pipeline.runtime.errors import UserError

#: ImageNet's 1,000 classes (ILSVRC 2012), in the order of networks' logits, which is ascending.
WORDNET_IDS = Path(__file__).with_name("imagenet_wordnet_ids.txt").read_text("ascii").split()


def load(spec: ModelSpec) -> tuple[nn.Module, ModelSpec]:
    """Load the published weights, on the CPU. The returned spec numbers the classes of the
    pretraining that the logits are for; None if the last layer is new (from torch's generator).

    Raises:
        UserError: the family has no published weights for it, they are neither here nor can be
            downloaded, or they do not fit the network's options.
    """
    family = family_module(spec.family)
    if not hasattr(family, "pretrained_state"):
        raise UserError(
            f"family `{spec.family}` has no pretrained weights. Set `weights: train`, or "
            "`weights: checkpoint` with a file."
        )
    state, class_names = family.pretrained_state(spec.network)
    classes = classes_among(spec.class_names, class_names)
    spec = replace(spec, pretrained_classes=classes)
    network = build(spec)
    head = last_layer(spec)
    unfit = [key for key in head if key not in state or len(state[key]) != len(class_names)]
    if unfit:
        raise UserError(
            f"the pretrained weights of `{spec.network}` have no {len(class_names)} rows "
            f"for {', '.join(f'`{key}`' for key in unfit)}. Remove the network's `options`."
        )
    fresh = network.state_dict()
    rows = {key: fresh[key] if classes is None else state[key][classes] for key in head}
    checkpoint.load_state(network, {**state, **rows}, f"the pretrained weights of `{spec.network}`")
    return network, spec


def classes_among(class_names: Sequence[str], pretrained: Sequence[str]) -> list[int] | None:
    """The number of each class of the dataset among those of the pretraining, by name or, for
    ImageNet, by WordNet id; None if one is not among them, or two are the same."""
    exact, plain = (_numbers(names) for names in (pretrained, map(_plain, pretrained)))
    if len(pretrained) == len(WORDNET_IDS):
        exact |= _numbers(WORDNET_IDS)
    found = [exact.get(name, plain.get(_plain(name))) for name in class_names]
    if None in found or len(set(found)) < len(found):
        return None
    return [number for number in found if number is not None]


def _numbers(names: Iterable[str]) -> dict[str, int | None]:
    """Number the names; None for a name of several classes."""
    numbers: dict[str, int | None] = {}
    for number, name in enumerate(names):
        numbers[name] = None if name in numbers else number
    return numbers


def _plain(name: str) -> str:
    """A name without the differences between folders and lists of classes."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def last_layer(spec: ModelSpec) -> frozenset[str]:
    """Keys of the tensors with one row per class."""
    with torch.random.fork_rng(devices=[]):
        own = build(spec).state_dict()
        other = build(replace(spec, class_names=[*spec.class_names, ""])).state_dict()
    return frozenset(key for key, value in own.items() if value.shape != other[key].shape)
