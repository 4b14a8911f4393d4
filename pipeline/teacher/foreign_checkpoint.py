"""(split from pipeline/models/checkpoint.py)"""

import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.models.checkpoint import load_state
from pipeline.models.spec import ModelSpec, build, build_from_file, family_module
from pipeline.runtime.errors import UserError, first_line

#: Where a checkpoint keeps its state dict, the first that is there: averaged weights (EMA) before
#: those that training ended with, for they are the ones whose accuracy is published.
_WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model", "net"),
)
#: Likewise within one state dict, the prefix of averaged weights.
_EMA_PREFIXES = ("ema_model.", "model_ema.", "ema.")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel


def load_foreign(description: ModelSpec, path: Path) -> nn.Module:
    """The network with the weights of a file made elsewhere, or the network that the file is.

    Raises:
        UserError: as `build` and `load_foreign_weights`.
    """
    _check_is_file(path)
    family = family_module(description.family)
    if not hasattr(family, "build_from_file"):
        network = build(description)
        load_foreign_weights(network, path)
        return network
    try:
        return build_from_file(description, family.read_file(path))
    except UserError as error:
        raise UserError(f"`{path}`: {error}") from None


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"`{path}` is not a file; `weights: checkpoint` needs one. Put the checkpoint there, "
            "or name it in `teacher.checkpoint`."
        )


def load_foreign_weights(network: nn.Module, path: Path) -> None:
    """Load a checkpoint made elsewhere: a state dict, bare or under one of the usual names, with or
    without the prefixes that wrapping a network adds. Of averaged weights (EMA) and others, the
    averaged.

    Raises:
        UserError: absent, unreadable, pickled code (refused unexecuted), several state dicts of
            which none has a usual name, or other keys or shapes.
    """
    _check_is_file(path)
    found, where = _unwrapped(_read_foreign(path), path)
    if where:
        print(f"  {path}: the weights under `{where}`", flush=True)
    load_state(network, _without_prefixes(found, set(network.state_dict())), f"`{path}`")


def _read_foreign(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_container(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_UNREADABLE) as error:
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


#: What torch's message names where it would not call what a pickle asks for.
_PICKLED_CODE = re.compile(r"GLOBAL ([\w.]+)")
#: What reading a damaged checkpoint raises: torch's unpickler has no error of its own.
_UNREADABLE = (
    *(SafetensorError, OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile),
    *(LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, struct.error),
    *(MemoryError, NotImplementedError),
)


def _check_container(path: Path) -> None:
    """Raises: ValueError: a zip of compressed parts, which torch.save does not write; or a tar, as
    it did until 2017, which torch.load would unpack."""
    if tarfile.is_tarfile(path):
        raise ValueError("it is a tar archive")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        size = path.stat().st_size
        if unpacked > size:
            raise ValueError(f"it unpacks to {unpacked:,} bytes; expected at most its own {size:,}")


def _unwrapped(content: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict, and the keys that lead to it, as in `model_ema.state_dict`."""
    way: tuple[str, ...] = ()
    while not _is_state_dict(content):
        found = _ways_to_state_dicts(content)
        usual = [(name,) for name in _WRAPPERS if any(other[0] == name for other in found)]
        if not usual and len(found) != 1:
            raise UserError(_not_one_state_dict([way + other for other in found], path))
        step = usual[0] if usual else found[0]
        for key in step:
            content = content[key]
        way += step
    return dict(content), ".".join(way)


def _not_one_state_dict(ways: list[tuple[str, ...]], path: Path) -> str:
    usual = ", ".join(f"`{name}`" for name in _WRAPPERS)
    if not ways:
        return (
            f"`{path}` is not a state dict; expected a mapping from names to tensors, bare or "
            f"under one of {usual}."
        )
    shown = ", ".join(f"`{'.'.join(way)}`" for way in ways)
    return (
        f"`{path}` holds {len(ways)} state dicts, {shown}; expected one alone, or one under any "
        f"of {usual}. Save the teacher's alone."
    )


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def _ways_to_state_dicts(content: Any, seen: set[int] | None = None) -> list[tuple[str, ...]]:
    """The keys that lead to each, at any depth. An optimiser's tensors are numbered, not named.

    Args:
        seen: ids of the mappings that were looked into: one may stand in several, or in itself.
    """
    seen = set() if seen is None else seen
    if not isinstance(content, Mapping) or id(content) in seen:
        return []
    seen.add(id(content))
    ways = []
    for key, value in content.items():
        if isinstance(key, str) and _is_state_dict(value):
            ways.append((key,))
        elif isinstance(key, str):
            ways += [(key, *way) for way in _ways_to_state_dicts(value, seen)]
    return ways


def _without_prefixes(state: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """The state under the network's own names: of averaged weights and others the averaged; and
    a prefix of every key is removed where no key is the network's."""
    for prefix in _EMA_PREFIXES:
        averaged = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if averaged:
            return _without_prefixes(averaged, own)
    if own & state.keys():
        return state
    rest = {key: value for key, value in state.items() if key not in _COUNTERS}
    for prefix in _PREFIXES:
        if rest and all(key.startswith(prefix) for key in rest):
            return _without_prefixes({k.removeprefix(prefix): v for k, v in rest.items()}, own)
    return state
