"""Load weights that were saved elsewhere. No code of the file is executed."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from pipeline.initial_weights import class_rows
from pipeline.initial_weights.checkpoint_file import read_checkpoint
from pipeline.initial_weights.state_dict import (
    Contents,
    Entry,
    Found,
    Network,
    Transform,
    check_key,
    choose,
    find_weights,
    list_contents,
    name_of,
    name_rest,
    read_all,
    tensors_below,
)
from pipeline.models.checkpoint import load_state
from pipeline.models.params import NetworkParams
from pipeline.models.spec import ModelSpec, build, family_module
from pipeline.runtime.errors import UserError, first_line

Versions = Mapping[str, Mapping[str, Any]]  # of modules, by their names: `_metadata`


@dataclass(frozen=True)
class Weights:
    """A state dict for the network, but for the rows of its last layer."""

    root: tuple[str, ...]
    state: Mapping[str, Tensor]
    versions: Versions | None
    used: Sequence[Entry]


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
                lambda number: class_rows.rows_of_parameter(classes, number, spec.class_names),
                **spec.options,
            )
            spec = replace(spec, pretrained_classes=rows)
        return build(spec, state), spec
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
    content = read_checkpoint(path)
    try:
        contents, weights, head = _fitting(network, spec, content, path, key)
    except ValueError as error:  # of a tensor
        raise UserError(f"`{path}` is damaged: {first_line(error)}. Copy it again.") from None
    state = dict(weights.state)
    if classes is not None:
        head = class_rows.last_layer(spec)
    head = head & state.keys()
    outputs = {len(state[name]) for name in head} or {spec.num_classes}
    if classes is not None or outputs != {spec.num_classes}:
        rows = _rows(max(outputs), spec, path, classes)
        state |= {name: state[name][rows] for name in head}
        spec = replace(spec, pretrained_classes=rows)
    load_state(network, state, f"`{path}`", weights.versions)
    if weights.root:
        print(f"  {path}: the weights under `{name_of(weights.root)}`", flush=True)
    if rest := name_rest(contents, weights.used):
        print(f"  {path}: ignored {rest}", flush=True)
    return spec


def _fitting(
    network: nn.Module, spec: ModelSpec, content: Any, path: Path, key: str | None
) -> tuple[Contents, Weights, frozenset[str]]:
    """All that the file holds, the weights in it that fit the network, and the names of those with
    a row for each class if their number may be another than the dataset's."""
    try:
        contents = list_contents(content)
        weights, head = _search(network, spec, contents, key)
    except UserError as error:
        raise UserError(f"`{path}` {error}") from None
    if weights is None:
        _refuse(network, contents, path, key)
    return contents, weights, head


def _search(
    network: nn.Module, spec: ModelSpec, contents: Contents, key: str | None
) -> tuple[Weights | None, frozenset[str]]:
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    expected = Network(shapes)
    if key is not None:
        check_key(contents, expected, key)
    if found := find_weights(contents, expected, key):
        return _take(choose(found, contents, expected, key), network, contents), frozenset()
    try:
        head = class_rows.last_layer(spec)
    except Exception:  # a network of the user, for a fixed number of classes
        head = frozenset()
    expected = Network(shapes, head)
    if found := find_weights(contents, expected, key):
        return _take(choose(found, contents, expected, key), network, contents), head
    return _converted(network, spec, contents, expected, key), head


def _take(found: Found, network: nn.Module, contents: Contents) -> Weights:
    versions = _versions(contents, found.root, found.transform)
    present = network.state_dict()._metadata
    return Weights(found.root, found.state(), {**present, **versions}, list(found.tensors.values()))


def _versions(
    contents: Contents, root: tuple[str, ...], transform: Transform | None
) -> dict[str, dict[str, Any]]:
    relative = {
        path[len(root) :]: version
        for path, version in contents.versions.items()
        if path[: len(root)] == root
    }
    return {
        ".".join(transform(path) if transform else path): version
        for path, version in relative.items()
    }


_MOST_TRIALS = 4  # of conversions; each builds a network


def _converted(
    network: nn.Module, spec: ModelSpec, contents: Contents, expected: Network, key: str | None
) -> Weights | None:
    """The weights of a file that the network's library has to convert: an older version's, or those
    of the repository that it was taken from."""
    found: dict[Found, Weights] = {}
    wrappers = Transform(expected.vocabulary, only_wrappers=True)
    for root, entries in _candidates(contents, expected, key)[:_MOST_TRIALS]:
        named = {".".join(wrappers(entry.path[len(root) :])): entry for entry in entries}
        state = read_all(named)
        stated = _versions(contents, root, wrappers)
        for weights in _conversions(network, spec, state, stated, expected):
            used = [entry for name, entry in named.items() if not _is_extra(name, expected)]
            match = Found(root, dict(enumerate(used)), wrappers)
            found[match] = replace(weights, root=root, used=used)
            break
    return found[choose(list(found), contents, expected, key)] if found else None


def _candidates(
    contents: Contents, expected: Network, key: str | None
) -> list[tuple[tuple[str, ...], list[Entry]]]:
    """The paths that the network's tensors may be below, without those that lead to a single one
    of them."""
    below = {
        root: entries
        for root, entries in tensors_below(contents, key).items()
        if 2 * len(entries) >= len(expected.required)
    }
    return [
        (root, entries)
        for root, entries in below.items()
        if not any(
            other[: len(root)] == root and other != root and len(below[other]) == len(entries)
            for other in below
        )
    ]


def _conversions(
    network: nn.Module,
    spec: ModelSpec,
    state: dict[str, Tensor],
    stated: Versions,
    expected: Network,
) -> Iterator[Weights]:
    heads = [len(state[name]) for name in expected.class_rows if name in state]
    outputs = heads[0] if heads else spec.num_classes
    larger = replace(spec, class_names=[str(number) for number in range(outputs)])
    for versions in ({**network.state_dict()._metadata, **stated}, {}):
        trial = deepcopy(network) if outputs == spec.num_classes else build(larger)
        ordered = OrderedDict(state)
        ordered._metadata = dict(versions)
        try:
            missing, unexpected = trial.load_state_dict(ordered, strict=False)
        except Exception:  # the libraries' errors share no class; it does not fit
            continue
        names = set(missing) & set(expected.required)
        if not names and all(_is_extra(name, expected) for name in unexpected):
            kept = {name: value for name, value in state.items() if name not in unexpected}
            yield Weights((), kept, versions, ())
    family = family_module(spec.family)
    if not hasattr(family, "current_state"):
        return
    *_, last = state.values()  # of the last layer, though it has another name
    for number in dict.fromkeys([outputs, len(last) if last.ndim else outputs]):
        try:
            converted = family.current_state(
                spec.network, state, number, spec.input.channels, **spec.options
            )
        except Exception:  # as above
            continue
        contents = Contents([Entry(tuple(name.split(".")), v) for name, v in converted.items()])
        for found in find_weights(contents, expected)[:1]:
            yield Weights((), found.state(), None, ())


def _is_extra(name: str, expected: Network) -> bool:
    return not expected.could_have(tuple(name.split(".")))


def _rows(
    outputs: int, spec: ModelSpec, path: Path, classes: Sequence[int] | Sequence[str] | None
) -> list[int]:
    """The output of each class."""
    if classes is not None:
        return class_rows.rows_of_parameter(classes, outputs, spec.class_names)
    if outputs == len(class_rows.WORDNET_IDS):
        rows = class_rows.classes_among(spec.class_names, class_rows.imagenet_names())
        if rows is not None:
            print(
                f"  {path}: {outputs:,} outputs, taken as ImageNet's classes, which the folders' "
                f"names are: {spec.num_classes} of them are kept",
                flush=True,
            )
            return rows
    raise UserError(
        f"`{path}` fits the network, but has {outputs:,} outputs, and the dataset has "
        f"{spec.num_classes} classes. Set `teacher.checkpoint_classes` to a list: the number of "
        "the output (from 0) of each class, in the order of the folders' names, or the name of "
        f"each of the {outputs:,} outputs."
    )


def _refuse(network: nn.Module, contents: Contents, path: Path, key: str | None) -> NoReturn:
    """Raise UserError with what does not fit, of the weights that come nearest."""
    below = tensors_below(contents, key)
    if not below:
        raise UserError(
            f"`{path}` is not a state dict; expected a mapping from names to tensors, at any "
            f"depth. It holds {name_rest(contents, ()) or 'nothing'}."
        )
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    expected = Network(shapes)
    transforms = [None, *(Transform(expected.vocabulary, only) for only in (True, False))]
    best: tuple[int, dict[str, Entry]] = (-1, {})
    root, transform = (), None
    for candidate, entries in below.items():
        if 2 * len(entries) < min(len(shapes), len(contents.tensors)):
            continue
        for removal in transforms:
            named = {_name(entry, candidate, removal): entry for entry in entries}
            score = sum(
                1 + expected.fits(name, entry.value.shape)
                for name, entry in named.items()
                if name in shapes
            )
            if score > best[0]:
                best, root, transform = (score, named), candidate, removal
    others = {
        _name(entry, root, transform): str(entry.value)
        for entry in contents.entries
        if not entry.is_tensor and entry.path[: len(root)] == root
    }
    where = f"`{path}`" + (f" (under `{name_of(root)}`)" if root else "")
    load_state(network, read_all(best[1]), where, no_tensors=others)
    # Each name alone fits: several tensors have the same one, or they are an optimizer's.
    paths: dict[str, list[str]] = defaultdict(list)
    for entry in below[root]:
        paths[_name(entry, root, transform)].append(f"`{name_of(entry.path)}`")
    for name, same in paths.items():
        if name in shapes and len(same) > 1:
            raise UserError(
                f"{where} has several tensors for `{name}` of the network: "
                f"{', '.join(same[:10])}; expected one. Save the network's alone."
            )
    raise UserError(f"{where} has weights of an optimizer alone; expected a network's.")


def _name(entry: Entry, root: tuple[str, ...], transform: Transform | None) -> str:
    keys = entry.path[len(root) :]
    return ".".join(transform(keys) if transform else keys)
