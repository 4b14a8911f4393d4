"""Which outputs of a network with other classes are those of the dataset."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from pipeline.models.spec import ModelSpec, build
from pipeline.runtime.errors import UserError, counted, did_you_mean

#: ImageNet's 1,000 classes (ILSVRC 2012), in the order of networks' logits, which is ascending.
WORDNET_IDS = Path(__file__).with_name("imagenet_wordnet_ids.txt").read_text("ascii").split()


def imagenet_names() -> list[str]:
    """ImageNet's names as torchvision has them, in the order of `WORDNET_IDS`."""
    models = import_module("torchvision.models")  # here, because it takes a second
    return list(models.ResNet18_Weights.DEFAULT.meta["categories"])


def classes_among(class_names: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """The number of each class of the dataset among those of a network, by name or, for ImageNet,
    by WordNet id; None if one is not among them, or two are the same."""
    found = _numbers_of(class_names, known, with_ids=len(known) == len(WORDNET_IDS))
    if None in found or len(set(found)) < len(found):
        return None
    return [number for number in found if number is not None]


def imagenet_rows(outputs: int, class_names: Sequence[str]) -> list[int] | None:
    """The output of each class of the dataset, of a network with ImageNet's 1,000; None for another
    number of outputs, or if a class is not ImageNet's."""
    if outputs != len(WORDNET_IDS):
        return None
    return classes_among(class_names, imagenet_names())


def rows_of_parameter(
    classes: Sequence[int] | Sequence[str], num_outputs: int, class_names: Sequence[str]
) -> list[int]:
    """The output of each class of the dataset, as `teacher.checkpoint_classes` says: its number, or
    the names of all outputs.

    Raises:
        UserError: the list has another length, a number is no output or occurs twice, or a class is
            not among the names.
    """
    key = "`params.yaml: teacher.checkpoint_classes`"
    numbers = [value for value in classes if isinstance(value, int)]
    if numbers:
        if len(numbers) != len(class_names):
            raise UserError(
                f"{key} has {counted(len(numbers), 'number')}; expected "
                f"{len(class_names)}, the output of each class of the dataset, in the order of the "
                "folders' names."
            )
        outside = [number for number in numbers if not 0 <= number < num_outputs]
        if outside or len(set(numbers)) < len(numbers):
            raise UserError(
                f"{key} has {outside[0] if outside else 'a number twice'}; expected different "
                f"numbers from 0 to {num_outputs - 1}, the checkpoint's outputs."
            )
        return numbers
    names = [str(value) for value in classes]
    if len(names) != num_outputs:
        raise UserError(
            f"{key} has {counted(len(names), 'name')}, but the checkpoint has "
            f"{counted(num_outputs, 'output')}; "
            "expected the name of each output, in their order (or, for each class of the dataset, "
            "the number of its output)."
        )
    found = _numbers_of(class_names, names)
    missing = [name for name, number in zip(class_names, found, strict=True) if number is None]
    if missing or len(set(found)) < len(found):
        culprit = missing[0] if missing else _first_twice(class_names, found)
        raise UserError(
            f"{key} does not say which output is `{culprit}`, a class of the dataset"
            f"{did_you_mean(culprit, names) or '.'} Name one output as the folder, or give the "
            "numbers of the outputs."
        )
    return [number for number in found if number is not None]


def _first_twice(class_names: Sequence[str], found: Sequence[int | None]) -> str:
    return next(n for n, number in zip(class_names, found, strict=True) if found.count(number) > 1)


def _numbers_of(
    class_names: Sequence[str], known: Sequence[str], *, with_ids: bool = False
) -> list[int | None]:
    exact, plain = (_numbers(names) for names in (known, map(_plain, known)))
    if with_ids:
        exact |= _numbers(WORDNET_IDS)
    return [exact.get(name, plain.get(_plain(name))) for name in class_names]


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
    """Keys of the tensors that depend on the number of classes; none of a network for a fixed
    number of them."""
    return frozenset(_shapes_by_classes(spec))


def check_rows_are_classes(spec: ModelSpec) -> None:
    """Refuse a network of whose last layer no rows can be taken for some of the classes."""
    shapes = _shapes_by_classes(spec)
    if not shapes or any(own[1:] != other[1:] for own, other in shapes.values()):
        raise UserError(
            f"network `{spec.network}` has no last layer with one row for each class, so that "
            "`teacher.checkpoint_classes` cannot select some. Remove it, or let `build` make the "
            "last layer so, of `num_classes`."
        )


def _shapes_by_classes(spec: ModelSpec) -> dict[str, tuple[torch.Size, torch.Size]]:
    """The shape of each tensor that has another shape for one more class, and that."""
    with torch.random.fork_rng(devices=[]):
        own = build(spec).state_dict()
        try:
            other = build(replace(spec, class_names=[*spec.class_names, ""])).state_dict()
        except UserError:  # the user's network cannot have another number of classes
            return {}
    shapes = {key: (value.shape, other[key].shape) for key, value in own.items()}
    return {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}
