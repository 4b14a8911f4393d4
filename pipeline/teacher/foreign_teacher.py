"""A teacher whose weights were saved elsewhere, or that is an ONNX file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from pipeline.initial_weights.class_rows import (
    check_rows_are_classes,
    imagenet_rows,
    last_layer,
    rows_of_parameter,
)
from pipeline.initial_weights.foreign_checkpoint import find_foreign_weights
from pipeline.initial_weights.state_dict import Key
from pipeline.models.checkpoint import load_state
from pipeline.models.params import NetworkParams
from pipeline.models.spec import ModelSpec, build, family_module
from pipeline.runtime.errors import UserError
from pipeline.teacher.trial import check_evaluation

_EXPORT_AGAIN = "Export it in evaluation mode, for batches of any size."


def load_foreign(
    spec: ModelSpec,
    path: Path,
    key: str | None = None,
    classes: Sequence[int] | Sequence[str] | None = None,
) -> tuple[nn.Module, ModelSpec]:
    """Build the network with the weights of a file, or the network that the file holds (ONNX).

    Args:
        key: `teacher.checkpoint_key`: which weights of the file; None: the averaged ones (EMA), or
            the only ones.
        classes: `teacher.checkpoint_classes`: which outputs; None: all, in their order.

    Returns:
        The network, and its spec with the numbers of the outputs that it keeps, if not all.

    Raises:
        UserError: the file cannot be read, its weights do not fit the network, or it is unclear
            which weights or which outputs are meant.
    """
    family = family_module(spec.family)
    holds_network = hasattr(family, "build_from_file")
    if not (path.is_file() or (holds_network and path.is_dir())):
        raise UserError(
            f"`{path}` is not a file; `weights: checkpoint` needs one. Put the checkpoint there, "
            "or name it in `teacher.checkpoint`."
        )
    if not holds_network:
        network = build(spec)
        return network, load_foreign_weights(network, spec, path, key, classes)
    selects = hasattr(family, "select_outputs")
    for name, value in (("key", key), ("classes", None if selects else classes)):
        if value is not None:
            raise UserError(
                f"`teacher.checkpoint_{name}` is set, but family `{spec.family}` takes a file as "
                "it is. Remove it."
            )
    try:
        state = family.read_file(path)
        if classes is not None:
            state, rows = family.select_outputs(
                state,
                lambda number: rows_of_parameter(classes, number, spec.class_names),
                **spec.options,
            )
            spec = replace(spec, pretrained_classes=rows)
        network = build(spec, state)
        if not getattr(network, "quantises_by_batch", False):
            check_evaluation(network, spec, _EXPORT_AGAIN)
        return network, spec
    except UserError as error:
        raise UserError(f"`{path}`: {error}") from None


def input_of_file(spec: ModelSpec, params: NetworkParams, path: Path) -> ModelSpec:
    """The spec with what the file itself says of its input (ONNX): a fixed size, unless `params`
    has one, and no normalisation where it takes pixels in 0 to 255.

    Raises:
        UserError: the file normalises, and so would `params`.
    """
    family = family_module(spec.family)
    if not hasattr(family, "fixed_input") or not path.exists():
        return spec
    try:
        size, takes_pixels = family.fixed_input(path, spec.input.channels, **spec.options)
    except UserError as error:
        raise UserError(f"`{path}`: {error}") from None
    new = spec.input
    if size is not None and params.input_size is None:
        new = replace(new, size=size)
    if takes_pixels:
        if params.mean or params.std:
            raise UserError(
                f"`{path}`: the ONNX file takes pixels in 0 to 255 and normalises them itself. "
                "Remove `mean` and `std` from `teacher.network`."
            )
        new = replace(new, mean=[0.0] * new.channels, std=[1 / 255] * new.channels)
    return replace(spec, input=new)


def load_foreign_weights(
    network: nn.Module,
    spec: ModelSpec,
    path: Path,
    key: str | None = None,
    classes: Sequence[int] | Sequence[str] | None = None,
) -> ModelSpec:
    """Load the weights of a file into a network of this spec, and return the spec that it has then.
    Arguments and errors are those of `load_foreign`.
    """
    weights = find_foreign_weights(network, spec, path, Key(key, "teacher.checkpoint_key"))
    state = dict(weights.state)
    if classes is not None:
        check_rows_are_classes(spec)
    head = weights.head if classes is None else last_layer(spec) & state.keys()
    outputs = {len(state[name]) for name in head} or {spec.num_classes}
    if classes is not None or outputs != {spec.num_classes}:
        rows = _rows(max(outputs), spec, path, classes)
        state |= {name: state[name][rows] for name in head}
        spec = replace(spec, pretrained_classes=rows)
    load_state(network, state, f"`{path}`", weights.versions)
    print(*(f"  {remark}\n" for remark in weights.remarks), sep="", end="", flush=True)
    return spec


def _rows(
    outputs: int, spec: ModelSpec, path: Path, classes: Sequence[int] | Sequence[str] | None
) -> list[int]:
    """The output of each class."""
    if classes is not None:
        return rows_of_parameter(classes, outputs, spec.class_names)
    rows = imagenet_rows(outputs, spec.class_names)
    if rows is not None:
        print(
            f"  {path}: {outputs:,} outputs, taken as ImageNet's classes, which the folders' "
            f"names are: {spec.num_classes} of them are kept",
            flush=True,
        )
        return rows
    differ = (
        f"`{path}` fits the network, but has {outputs:,} outputs, and the dataset has "
        f"{spec.num_classes} classes."
    )
    if outputs < spec.num_classes:
        raise UserError(f"{differ} Choose another checkpoint, or remove the other folders.")
    raise UserError(
        f"{differ} Set `teacher.checkpoint_classes` to a list: the number of "
        "the output (from 0) of each class, in the order of the folders' names, or the name of "
        f"each of the {outputs:,} outputs."
    )
