"""Networks on disk: weights in safetensors, and a JSON file that rebuilds the network and its
input. Nothing here executes pickled code."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor, nn

from pipeline.models.spec import (
    InputSpec,
    LogitSource,
    ModelSpec,
    build,
    build_from_file,
    family_module,
)
from pipeline.runtime.errors import UserError, did_you_mean
from pipeline.runtime.files import (
    canonical_json,
    read_json,
    recovery_hint,
    sha256_of_file,
    write_bytes,
    write_json,
)
from pipeline.runtime.validation import Record, read_model

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION = "weights.safetensors", "network.json"

_SHOWN = 10  # keys of each kind in a message


class NetworkFile(Record):
    """network.json beside weights: a ModelSpec, and the weights' hash."""

    format_version: Literal[FORMAT_VERSION]
    family: str
    network: str
    options: Mapping[str, Any]
    class_names: Sequence[str]
    input: InputSpec
    pretrained_classes: Sequence[int] | None = None
    weights_sha256: str

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(**{name: getattr(self, name) for name in ModelSpec.__dataclass_fields__})


class SourceFile(Record):
    """network.json of a teacher without weights: a LogitSource."""

    format_version: Literal[FORMAT_VERSION]
    family: str
    network: str
    class_names: Sequence[str]
    path: str
    contents_sha256: str


def save(directory: Path, network: nn.Module, spec: ModelSpec) -> None:
    """Write weights and spec. Equal networks give equal bytes."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    write_bytes(directory / WEIGHTS, serialised(state))
    file = NetworkFile(
        format_version=FORMAT_VERSION,
        **vars(spec),
        weights_sha256=sha256_of_file(directory / WEIGHTS),
    )
    write_json(directory / DESCRIPTION, file.model_dump(exclude_none=True))


def save_source(directory: Path, source: LogitSource) -> None:
    """Write the description of a teacher without weights, and an empty weights file, which dvc.yaml
    lists as an output."""
    write_bytes(directory / WEIGHTS, serialised({}))
    file = SourceFile(format_version=FORMAT_VERSION, **vars(source))
    write_json(directory / DESCRIPTION, file.model_dump())


def logit_source(directory: Path, *, produced_by: str) -> LogitSource | None:
    """Read what `save_source` wrote; None if the directory holds a network.

    Raises:
        UserError: the description is absent, damaged or of another format version.
    """
    file = _read(directory, produced_by)
    if isinstance(file, NetworkFile):
        return None
    return LogitSource(**file.model_dump(exclude={"format_version"}))


def load(directory: Path, *, produced_by: str) -> tuple[nn.Module, ModelSpec]:
    """Load what `save` wrote.

    Raises:
        UserError: a file is absent, damaged or of another format version, the weights are not those
            that the description names, or there is no network.
    """
    file = _read(directory, produced_by)
    if isinstance(file, SourceFile):
        raise UserError(
            f"`{directory}` holds no network, but the logits of `{file.path}`; expected a teacher "
            f"with weights. Set another `teacher.weights` than logits and run `{produced_by}`."
        )
    weights = directory / WEIGHTS
    if not weights.is_file() or sha256_of_file(weights) != file.weights_sha256:
        state = "not the file" if weights.is_file() else "absent; expected the file"
        raise UserError(
            f"`{weights}` is {state} that `{DESCRIPTION}` beside it describes. "
            f"{recovery_hint(weights, produced_by)}"
        )
    spec, state = file.spec, load_file(weights)
    if hasattr(family_module(spec.family), "build_from_file"):
        return build_from_file(spec, state), spec
    network = build(spec)
    load_state(network, state, f"`{weights}`")
    return network, spec


def fingerprint(directory: Path, *, produced_by: str) -> str:
    """SHA-256 of the network, its input and its weights, or of the logits of a teacher without a
    network. Reads the description alone."""
    content = _read(directory, produced_by).model_dump(exclude_none=True)
    return hashlib.sha256(canonical_json(content).encode(errors="replace")).hexdigest()


def _read(directory: Path, produced_by: str) -> NetworkFile | SourceFile:
    path = directory / DESCRIPTION
    is_source = "contents_sha256" in read_json(path, produced_by=produced_by)
    return read_model(path, SourceFile if is_source else NetworkFile, produced_by=produced_by)


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
