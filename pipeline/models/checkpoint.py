"""Networks on disk: weights in safetensors, and a JSON file that rebuilds the network and its
input. Nothing here executes pickled code."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor, nn

from pipeline.models.spec import InputSpec, ModelSpec, build, family_module
from pipeline.runtime.errors import UserError, did_you_mean, first_line
from pipeline.runtime.files import (
    canonical_json,
    read_json,
    recovery_hint,
    sha256_of_file,
    write_bytes,
    write_json,
)
from pipeline.runtime.outputs import Start
from pipeline.runtime.validation import Record, read_model

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION = "weights.safetensors", "network.json"

_VERSIONS = "module_versions"  # in the metadata of the weights, if not those of the classes

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
    start: Start | None = None  # of a student or a baseline

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(**{name: getattr(self, name) for name in ModelSpec.__dataclass_fields__})


class LogitSource(Record):
    """A teacher without a network: logits that another system computed."""

    family: str
    network: str
    class_names: Sequence[str]
    path: str
    contents_sha256: str  # of the logits, as the family defines it


class SourceFile(LogitSource):
    """network.json of a teacher without a network."""

    format_version: Literal[FORMAT_VERSION]


def state_bytes(network: nn.Module) -> bytes:
    """The state dict in safetensors. Equal networks give equal bytes."""
    state, storages = {}, set()
    for key, tensor in network.state_dict().items():
        contents = tensor.detach().cpu().contiguous()
        storage = contents.untyped_storage().data_ptr()
        state[key] = contents.clone() if storage in storages else contents  # tied weights
        storages.add(storage)
    versions = _other_versions(network)
    return serialised(state, {_VERSIONS: json.dumps(versions)} if versions else None)


def _other_versions(network: nn.Module) -> dict[str, int]:
    """The versions of modules that are not their class's: a library sets them when it loads
    weights of an older version, and needs them to load these again."""
    return {
        name: module._version
        for name, module in network.named_modules()
        if module._version != type(module)._version
    }


def save(directory: Path, network: nn.Module, spec: ModelSpec, start: Start | None = None) -> None:
    """Write weights and spec. Equal networks give equal bytes."""
    write_bytes(directory / WEIGHTS, state_bytes(network))
    file = NetworkFile(
        format_version=FORMAT_VERSION,
        **vars(spec),
        weights_sha256=sha256_of_file(directory / WEIGHTS),
        start=start,
    )
    write_json(directory / DESCRIPTION, file.model_dump(exclude_none=True))


def save_source(directory: Path, source: LogitSource) -> None:
    """Write the description of a teacher without weights, and an empty weights file, which dvc.yaml
    lists as an output."""
    write_bytes(directory / WEIGHTS, serialised({}))
    description = {"format_version": FORMAT_VERSION, **source.model_dump()}
    write_json(directory / DESCRIPTION, description)


def logit_source(directory: Path, *, produced_by: str) -> LogitSource | None:
    """Read what `save_source` wrote; None if the directory holds a network.

    Raises:
        UserError: the description is absent, damaged or of another format version.
    """
    file = _read(directory, produced_by)
    return file if isinstance(file, LogitSource) else None


def load(directory: Path, *, produced_by: str) -> tuple[nn.Module, ModelSpec]:
    """Load what `save` wrote. Refuses what `open_network` refuses."""
    file = open_network(directory, produced_by=produced_by)
    spec, state = file.spec, load_file(directory / WEIGHTS)
    if hasattr(family_module(spec.family), "build_from_file"):
        return build(spec, state), spec
    network = build(spec)
    versions = saved_versions(network, directory)
    load_state(network, state, f"`{directory / WEIGHTS}`", versions)
    return network, spec


def open_network(directory: Path, *, produced_by: str) -> NetworkFile:
    """Read the description that `save` wrote, and check that the weights are those it describes.

    Raises:
        UserError: a file is absent, damaged or of another format version, the weights are not those
            that the description names, or there is no network.
    """
    file = _read(directory, produced_by)
    if isinstance(file, LogitSource):
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
    return file


def saved_versions(network: nn.Module, directory: Path) -> dict[str, dict[str, Any]]:
    """The versions of the modules whose weights are in the directory; `network` has the same."""
    with safe_open(directory / WEIGHTS, "pt") as file:
        changed = json.loads((file.metadata() or {}).get(_VERSIONS, "{}"))
    versions = network.state_dict()._metadata
    return {**versions, **{name: {"version": version} for name, version in changed.items()}}


def fingerprint(directory: Path, *, produced_by: str) -> str:
    """SHA-256 of the network, its input and its weights, or of the logits of a teacher without a
    network. Reads the description alone."""
    content = _read(directory, produced_by).model_dump(exclude_none=True)
    return hashlib.sha256(canonical_json(content).encode(errors="replace")).hexdigest()


def read_start(directory: Path, *, produced_by: str) -> Start | None:
    """Read how the network of a student or a baseline started. Reads the description alone."""
    return getattr(_read(directory, produced_by), "start", None)


def _read(directory: Path, produced_by: str) -> NetworkFile | SourceFile:
    path = directory / DESCRIPTION
    is_source = "contents_sha256" in read_json(path, produced_by=produced_by)
    return read_model(path, SourceFile if is_source else NetworkFile, produced_by=produced_by)


def load_state(
    network: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    versions: Mapping[str, Mapping[str, Any]] | None = None,
    no_tensors: Mapping[str, str] | None = None,
) -> None:
    """Load every tensor of a state dict, by the rules of the network's library for states of other
    versions.

    Args:
        source: of the state, for messages.
        versions: of the modules when the state was saved, by their names, as in its `_metadata`;
            None: the present ones.
        no_tensors: what the source holds instead of a tensor, by name, for messages.

    Raises:
        UserError: lists the tensors that do not fit.
    """
    present = network.state_dict()
    stated = OrderedDict(state)
    stated._metadata = present._metadata if versions is None else dict(versions)
    retyped = [
        key
        for key in state
        if key in present
        and state[key].shape == present[key].shape
        and not _converts(state[key], present[key])
    ]
    problem = ""
    if not retyped:
        try:
            result = network.load_state_dict(stated, strict=False)
        except Exception as error:  # those of libraries share no class
            problem = first_line(error)
        else:
            if not result.unexpected_keys and not _without_counters(result.missing_keys):
                return
    lines = _misfits(state, present, retyped, no_tensors or {}) or [problem]
    raise UserError(
        f"{source} does not fit the network:\n  "
        + "\n  ".join(lines)
        + "\nName the network that the checkpoint was made for, with its options."
    )


def _without_counters(names: Iterable[str]) -> list[str]:
    """Without batch norm's step counters, which came late to PyTorch: old checkpoints lack them."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _misfits(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    retyped: Sequence[str],
    no_tensors: Mapping[str, str],
) -> list[str]:
    absent = [k for k in _without_counters(expected) if k not in state]
    replaced = [k for k in absent if k in no_tensors]
    missing = [k for k in absent if k not in no_tensors]
    unexpected = [k for k in state if k not in expected]
    reshaped = [k for k in state if k in expected and state[k].shape != expected[k].shape]
    lines = [
        *(
            f"missing `{k}` {list(expected[k].shape)}{did_you_mean(k, unexpected)}"
            for k in missing[:_SHOWN]
        ),
        *(f"unexpected `{k}` {list(state[k].shape)}" for k in unexpected[:_SHOWN]),
        *(
            f"`{k}` is {list(state[k].shape)}; expected {list(expected[k].shape)}"
            for k in reshaped[:_SHOWN]
        ),
        *(
            f"`{k}` is {_describe_type(state[k])}; expected {_describe_type(expected[k])}, or "
            "another precision"
            for k in retyped[:_SHOWN]
        ),
        *(
            f"`{k}` is {no_tensors[k]}; expected a tensor {list(expected[k].shape)}"
            for k in replaced[:_SHOWN]
        ),
    ]
    count = len(absent + unexpected + reshaped) + len(retyped)
    return [*lines, "..."] if count > len(lines) else lines


def _converts(value: Tensor, expected: Tensor) -> bool:
    """Whether a copy changes the floating precision at most."""
    plain = value.layout == torch.strided and not value.is_meta
    return plain and (value.is_floating_point() or not expected.is_floating_point())


def _describe_type(value: Tensor) -> str:
    layout = "" if value.layout == torch.strided else f", {value.layout}"
    contents = ", without contents" if value.is_meta else ""
    return f"{value.dtype}{layout}{contents}".replace("torch.", "")
