"""Networks on disk: weights in safetensors, and a JSON file that rebuilds the network and its
input. Nothing here executes pickled code."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor, nn

from pipeline.models.spec import LogitSource, ModelSpec, build, build_from_file, family_module
from pipeline.runtime.errors import UserError, did_you_mean, first_line
from pipeline.runtime.files import (
    canonical_json,
    read_json,
    recovery_hint,
    sha256_of_file,
    write_bytes,
    write_json,
)

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION = "weights.safetensors", "network.json"

_SHOWN = 10  # keys of each kind in a message
_SPEC, _SOURCE = TypeAdapter(ModelSpec), TypeAdapter(LogitSource)


def save(directory: Path, network: nn.Module, spec: ModelSpec) -> None:
    """Write weights and spec. Equal networks give equal bytes."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    write_bytes(directory / WEIGHTS, serialised(state))
    write_json(
        directory / DESCRIPTION,
        {
            "format_version": FORMAT_VERSION,
            **{key: value for key, value in asdict(spec).items() if value is not None},
            "weights_sha256": sha256_of_file(directory / WEIGHTS),
        },
    )


def save_source(directory: Path, source: LogitSource) -> None:
    """Write the description of a teacher without weights, and an empty weights file, which dvc.yaml
    lists as an output."""
    write_bytes(directory / WEIGHTS, serialised({}))
    write_json(directory / DESCRIPTION, {"format_version": FORMAT_VERSION, **asdict(source)})


def logit_source(directory: Path, *, produced_by: str) -> LogitSource | None:
    """Read what `save_source` wrote; None if the directory holds a network.

    Raises:
        UserError: the description is absent, damaged or of another format version.
    """
    content = _read_description(directory, produced_by)
    return _SOURCE.validate_python(content) if "contents_sha256" in content else None


def load(directory: Path, *, produced_by: str) -> tuple[nn.Module, ModelSpec]:
    """Load what `save` wrote.

    Raises:
        UserError: a file is absent, damaged or of another format version, the weights are not those
            that the description names, or there is no network.
    """
    content = _read_description(directory, produced_by)
    if "weights_sha256" not in content:
        raise UserError(
            f"`{directory}` holds no network, but the logits of `{content.get('path')}`; expected "
            "a teacher with weights. Set another `teacher.weights` than logits and run "
            f"`{produced_by}`."
        )
    weights = directory / WEIGHTS
    if not weights.is_file() or sha256_of_file(weights) != content.get("weights_sha256"):
        state = "not the file" if weights.is_file() else "absent; expected the file"
        raise UserError(
            f"`{weights}` is {state} that `{DESCRIPTION}` beside it describes. "
            f"{recovery_hint(weights, produced_by)}"
        )
    spec, state = _SPEC.validate_python(content), load_file(weights)
    if hasattr(family_module(spec.family), "build_from_file"):
        return build_from_file(spec, state), spec
    network = build(spec)
    load_state(network, state, f"`{weights}`")
    return network, spec


def fingerprint(directory: Path, *, produced_by: str) -> str:
    """SHA-256 of the network, its input and its weights, or of the logits of a teacher without a
    network. Reads the description alone."""
    content = _read_description(directory, produced_by)
    return hashlib.sha256(canonical_json(content).encode(errors="replace")).hexdigest()


def _read_description(directory: Path, produced_by: str) -> dict[str, Any]:
    path = directory / DESCRIPTION
    content = read_json(path, produced_by=produced_by)
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"`{path}` has format version {content.get('format_version')}; expected "
            f"{FORMAT_VERSION}. Run `{produced_by}`."
        )
    try:
        if "contents_sha256" in content:
            _SOURCE.validate_python(content)
        elif not (spec := _SPEC.validate_python(content).input).is_possible():
            raise ValueError(f"its input is {spec}")
    except ValueError as error:  # pydantic's error is one
        raise UserError(
            f"`{path}` is damaged ({first_line(error)}). Run `{produced_by}`."
        ) from None
    return content


def load_state(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor of a state dict.

    Args:
        source: of the state, for messages.

    Raises:
        UserError: lists the tensors that do not fit.
    """
    expected = network.state_dict()
    # Batch norm's step counters came late to PyTorch: old checkpoints lack them.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    shared = [k for k in state if k in expected]
    reshaped = [k for k in shared if state[k].shape != expected[k].shape]
    retyped = [k for k in shared if k not in reshaped and not _converts(state[k], expected[k])]
    lines = [
        *_list_keys(
            missing,
            lambda k: f"missing `{k}` {list(expected[k].shape)}{did_you_mean(k, unexpected)}",
        ),
        *_list_keys(unexpected, lambda k: f"unexpected `{k}` {list(state[k].shape)}"),
        *_list_keys(
            reshaped,
            lambda k: f"`{k}` is {list(state[k].shape)}; expected {list(expected[k].shape)}",
        ),
        *_list_keys(
            retyped,
            lambda k: (
                f"`{k}` is {_describe_type(state[k])}; expected "
                f"{_describe_type(expected[k])}, or another precision"
            ),
        ),
    ]
    if lines:
        raise UserError(
            f"{source} does not fit the network:\n  "
            + "\n  ".join(lines)
            + "\nName the network that the checkpoint was made for, with its options."
        )
    network.load_state_dict(state, strict=False)


def _converts(value: Tensor, expected: Tensor) -> bool:
    """Whether a copy changes the floating precision at most."""
    plain = value.layout == torch.strided and not value.is_meta
    return plain and (value.is_floating_point() or not expected.is_floating_point())


def _describe_type(value: Tensor) -> str:
    layout = "" if value.layout == torch.strided else f", {value.layout}"
    contents = ", without contents" if value.is_meta else ""
    return f"{value.dtype}{layout}{contents}".replace("torch.", "")


def _list_keys(keys: list[str], line: Callable[[str], str]) -> list[str]:
    more = [f"... and {len(keys) - _SHOWN} more like it"] if len(keys) > _SHOWN else []
    return [line(key) for key in keys[:_SHOWN]] + more
