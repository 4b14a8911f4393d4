"""Load weights that were saved elsewhere. No pickled code is executed."""

import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.models.checkpoint import load_state
from pipeline.models.params import NetworkParams
from pipeline.models.spec import ModelSpec, build, family_module
from pipeline.runtime.errors import UserError, first_line

#: The names under which checkpoints keep their state dict; the first present is taken. Averaged
#: weights (EMA) come first, because published accuracies are theirs.
_WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model", "net"),
)
#: The prefixes of averaged weights within one state dict.
_EMA_PREFIXES = ("ema_model.", "model_ema.", "ema.")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel


def load_foreign(spec: ModelSpec, path: Path) -> nn.Module:
    """Build the network with the weights of a file, or the network that the file holds (ONNX).

    Raises:
        UserError: as `build` and `load_foreign_weights`.
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
        load_foreign_weights(network, path)
        return network
    try:
        return build(spec, family.read_file(path))
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


def load_foreign_weights(network: nn.Module, path: Path) -> None:
    """Load a checkpoint: a state dict, bare or under a usual name, with or without the prefixes
    that wrapping a network adds. Averaged weights (EMA) are preferred.

    Raises:
        UserError: the file cannot be read, holds pickled code (which is not executed) or several
            state dicts without a usual name, or its keys or shapes differ.
    """
    state, location = _unwrapped(_read_foreign(path), path)
    if location:
        print(f"  {path}: the weights under `{location}`", flush=True)
    load_state(network, _without_prefixes(state, set(network.state_dict())), f"`{path}`")


def _read_foreign(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_container(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # those of damaged checkpoints share no class
        if found := _PICKLED_CODE.search(str(error)):
            raise UserError(
                f"`{path}` holds pickled objects, which could run code, and was not loaded "
                f"(`{found[1]}`). Save `model.state_dict()` alone, or safetensors."
            ) from None
        raise UserError(
            f"`{path}` is not a checkpoint that can be read ({first_line(error)}). "
            "Expected a PyTorch state dict (.pt, .pth, .th) or safetensors; a .onnx file needs "
            "`family: onnx`."
        ) from None


#: The part of torch's message that names what a pickle asks to call.
_PICKLED_CODE = re.compile(r"GLOBAL ([\w.]+)")


def _check_container(path: Path) -> None:
    """Raise ValueError for a zip of compressed parts, which torch.save does not write, and for a
    tar, which it wrote until 2017 and torch.load would unpack."""
    if tarfile.is_tarfile(path):
        raise ValueError("it is a tar archive")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        size = path.stat().st_size
        if unpacked > size:
            raise ValueError(
                f"it unpacks to {unpacked:,} bytes; expected at most its size, {size:,}"
            )


def _unwrapped(content: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict and its location, as in `model_ema.state_dict`."""
    found = dict(_locate_state_dicts(content, set()))
    usual = ", ".join(f"`{name}`" for name in _WRAPPERS)
    if not found:
        raise UserError(
            f"`{path}` is not a state dict; expected a mapping from names to tensors, bare or "
            f"under one of {usual}."
        )
    depth = 0
    while len(found) > 1:
        name = next((name for name in _WRAPPERS if name in {keys[depth] for keys in found}), None)
        if name is None:
            locations = ", ".join(f"`{'.'.join(keys)}`" for keys in found)
            raise UserError(
                f"`{path}` holds {len(found)} state dicts, {locations}; expected one, or one under "
                f"any of {usual}. Save the teacher's alone."
            )
        found = {keys: state for keys, state in found.items() if keys[depth] == name}
        depth += 1
    ((keys, state),) = found.items()
    return state, ".".join(keys)


def _locate_state_dicts(
    content: Any, seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Each state dict, at any depth, with the keys that lead to it. Tensors of an optimizer have
    numbers, not names.

    Args:
        seen: ids of the mappings that were searched: a mapping can be in several, or in itself.
    """
    if not isinstance(content, Mapping):
        return
    if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        yield (), dict(content)
    elif id(content) not in seen:
        seen.add(id(content))
        for key, value in content.items():
            if isinstance(key, str):
                for keys, state in _locate_state_dicts(value, seen):
                    yield (key, *keys), state


def _without_prefixes(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """The state under the network's keys. Averaged weights are preferred; a prefix that every key
    has is removed if no key is one of the network's."""
    for prefix in _EMA_PREFIXES:
        averaged = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if averaged:
            return _without_prefixes(averaged, expected)
    if expected & state.keys():
        return state
    rest = {key: value for key, value in state.items() if key not in _COUNTERS}
    for prefix in _PREFIXES:
        if rest and all(key.startswith(prefix) for key in rest):
            return _without_prefixes({k.removeprefix(prefix): v for k, v in rest.items()}, expected)
    return state
