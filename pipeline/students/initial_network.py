"""The network of a student and of its baseline before any training: the same for both."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.data.prepared.dataset import Dataset
from pipeline.initial_weights import published
from pipeline.initial_weights.class_rows import imagenet_rows, last_layer
from pipeline.initial_weights.foreign_checkpoint import find_foreign_weights, find_layers
from pipeline.initial_weights.head import head_parameters
from pipeline.initial_weights.state_dict import Key
from pipeline.models.checkpoint import (
    WEIGHTS,
    NetworkFile,
    load_state,
    open_network,
    saved_versions,
    state_bytes,
)
from pipeline.models.params import WeightsFile
from pipeline.models.spec import ModelSpec, build, model_spec, native_input
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.outputs import Start
from pipeline.students.params import StudentParams, TrainingParams
from pipeline.students.start_file import check_start_file


@dataclass(frozen=True)
class InitialNetwork:
    network: nn.Module  # on the CPU
    spec: ModelSpec
    start: Start
    head: Collection[str]  # the parameters of its last layer; empty if no training option needs it
    remarks: Sequence[str] = ()  # about the weights, for the console


@dataclass(frozen=True)
class _Found:
    """Weights to start from."""

    source: str  # for messages and reports
    state: Mapping[str, Tensor]
    head: Collection[str]  # the names of the tensors with a row for each class
    rows: Sequence[int] | None  # of them, those of the dataset's classes; None: a new last layer
    versions: Mapping[str, Mapping[str, Any]] | None = None
    remarks: Sequence[str] = ()


def build_initial_network(
    name: str, student: StudentParams, training: TrainingParams, dataset: Dataset
) -> InitialNetwork:
    """Build the network on the CPU, with fresh, published or given weights. What is fresh is drawn
    from the training's seed.

    Raises:
        UserError: the network cannot be built, or the weights are absent, are not those that
            params.yaml names, or do not fit.
    """
    weights, family = student.network.weights, student.family
    remarks: Sequence[str] = ()
    torch.manual_seed(training.seed)
    if weights == "pretrained":
        native = native_input(family, student.network.name, student.network.options)
        spec = model_spec(family, student.network, dataset, native=native)
        network, loaded = published.load(spec)
        rows = loaded.pretrained_classes
        text = f"published weights, {'new' if rows is None else 'pretrained'} last layer"
    elif isinstance(weights, WeightsFile):
        check_start_file(weights, name)
        network, spec, text, remarks = _from_file(name, student, weights, dataset)
    else:
        spec = model_spec(family, student.network, dataset)
        network, text = build(spec), "from scratch"
    sha256 = hashlib.sha256(state_bytes(network)).hexdigest()
    start = Start(text=text, sha256=sha256, seed=training.seed)
    head = head_parameters(network, spec) if training.separates_head else frozenset()
    return InitialNetwork(network, spec, start, head, remarks)


def _from_file(
    name: str, student: StudentParams, weights: WeightsFile, dataset: Dataset
) -> tuple[nn.Module, ModelSpec, str, Sequence[str]]:
    path, parameter = Path(weights.path), f"students.{name}.network.weights.key"
    file = None
    if path.is_dir():
        if weights.key is not None:
            raise UserError(
                f"`params.yaml: {parameter}` is set, but `{path}` is a network of this pipeline, "
                "which has one set of weights. Remove it."
            )
        file = open_network(path, produced_by="dvc repro")
    spec = model_spec(
        student.family, student.network, dataset, native=None if file is None else file.input
    )
    network = build(spec)
    if file is not None:
        found = _in_folder(network, spec, path, file)
    else:
        found = _in_checkpoint(network, spec, weights, parameter)
    if weights.head == "new":
        found = replace(found, rows=None)
    if found.rows is None and not found.head:
        raise UserError(
            f"network `{spec.network}` has no layer with a row for each class, so that it cannot "
            f"get a new one for the classes of the dataset, which `{path}` lacks. Choose another."
        )
    if weights.partial:
        text, new = _load_layers(network, found)
        return network, spec, text, [*found.remarks, *new]
    state = _with_own_rows(network, found)
    load_state(network, state, f"`{found.source}`", found.versions)
    text = f"{found.source}, {'new last layer' if found.rows is None else 'all layers'}"
    return network, spec, text, found.remarks


def _in_folder(network: nn.Module, spec: ModelSpec, path: Path, file: NetworkFile) -> _Found:
    """The weights of a network that this pipeline wrote, whose classes are known by name."""
    known, rows = list(file.class_names), None
    if set(spec.class_names) <= set(known):
        rows = [known.index(name) for name in spec.class_names]
    return _Found(
        str(path),
        load_file(path / WEIGHTS),
        last_layer(spec),
        rows,
        saved_versions(network, path),
    )


def _in_checkpoint(
    network: nn.Module, spec: ModelSpec, weights: WeightsFile, parameter: str
) -> _Found:
    path, key = Path(weights.path), Key(weights.key, parameter)
    if weights.partial:
        content, head = find_layers(network, path, key), last_layer(spec)
        outputs = max((len(content.state[k]) for k in head if k in content.state), default=0)
    else:
        content = find_foreign_weights(network, spec, path, key)
        outputs = content.outputs or spec.num_classes
        head = content.head or last_layer(spec)
    remarks, rows = list(content.remarks), imagenet_rows(outputs, spec.class_names)
    if rows is None and outputs == spec.num_classes:
        rows = list(range(outputs))
        if weights.head == "kept":
            remarks.append(
                f"{path}: its {outputs:,} outputs are taken as the dataset's classes, in the order "
                "of the folders' names; if they are others, set `head: new`"
            )
    return _Found(str(path), content.state, head, rows, content.versions, remarks)


def _with_own_rows(network: nn.Module, found: _Found) -> dict[str, Tensor]:
    """The state with the rows of the dataset's classes in its last layer; with those of the
    network, which are new, where it has none."""
    fresh, state = network.state_dict(), dict(found.state)
    for key in found.head:
        if found.rows is None:
            state[key] = fresh[key]
        elif key in state and len(state[key]) > max(found.rows):
            state[key] = state[key][list(found.rows)]
    return state


def _load_layers(network: nn.Module, found: _Found) -> tuple[str, list[str]]:
    """Load the layers whose tensors all fit. Returns `r20.pth, 12 of 20 layers`, and a remark that
    names the others."""
    fresh, state = network.state_dict(), _with_own_rows(network, found)
    layers: dict[str, list[str]] = defaultdict(list)
    for key in fresh:
        if key in state or not key.endswith("num_batches_tracked"):  # old checkpoints lack it
            layers[key.rpartition(".")[0]].append(key)
    new = [
        layer
        for layer, keys in layers.items()
        if not all(key in state and state[key].shape == fresh[key].shape for key in keys)
        or (found.rows is None and set(keys) & set(found.head))
    ]
    if len(new) == len(layers):
        raise UserError(
            f"`{found.source}` has no layer with the name and the shape of one of the network's; "
            f"expected some of its {len(layers)}. Name a network of the same family."
        )
    kept = {key: state[key] for layer in layers.keys() - new for key in layers[layer]}
    load_state(network, fresh | kept, f"`{found.source}`", found.versions)
    text = f"{found.source}, {len(layers) - len(new)} of {counted(len(layers), 'layer')}"
    if not new:
        return text, []
    names = ", ".join(f"`{layer}`" for layer in new[:10])
    return text, [f"{found.source}: new are {names}{', ...' if len(new) > 10 else ''}"]
