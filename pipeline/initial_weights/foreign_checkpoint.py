"""Load weights that were saved elsewhere. No code of the file is executed."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from pipeline.initial_weights.checkpoint_file import read_checkpoint
from pipeline.initial_weights.class_rows import last_layer
from pipeline.initial_weights.state_dict import (
    Contents,
    Entry,
    Found,
    Key,
    Network,
    Transform,
    check_key,
    choose,
    distinct,
    find_weights,
    is_of_optimizer,
    list_contents,
    name_of,
    name_rest,
    read_all,
    tensors_below,
)
from pipeline.models.checkpoint import load_state
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


@dataclass(frozen=True)
class FileWeights:
    """The weights of a file that fit a network."""

    state: Mapping[str, Tensor]
    versions: Versions | None  # of the network's modules when the file was written
    #: Names of the tensors with a row for each output, if the file may have another number of
    #: outputs than the network.
    head: frozenset[str]
    remarks: Sequence[str]  # what was taken, and what was not

    @property
    def outputs(self) -> int | None:
        """The number of outputs of the file; None: as many as the network."""
        return max((len(self.state[name]) for name in self.head), default=None)


def find_foreign_weights(network: nn.Module, spec: ModelSpec, path: Path, key: Key) -> FileWeights:
    """Find the weights in a file that fit the network, which is unchanged.

    Raises:
        UserError: the file cannot be read, its weights do not fit the network, or it is unclear
            which weights are meant.
    """
    content = read_checkpoint(path)
    with _refuses_damaged(path):
        with _names(path):
            contents = list_contents(content)
            weights, head = _search(network, spec, contents, key)
        if weights is None:
            _refuse(network, contents, path, key.value)
    return FileWeights(
        weights.state,
        weights.versions,
        head & weights.state.keys(),
        _remarks(contents, weights.root, weights.used, path),
    )


def find_layers(network: nn.Module, path: Path, key: Key) -> FileWeights:
    """Find the weights in a file that come nearest to the network's, for those of its layers that
    fit: averaged ones (EMA), if they fit as well as others.

    Raises UserError as `find_foreign_weights`.
    """
    content = read_checkpoint(path)
    with _refuses_damaged(path):
        with _names(path):
            contents = list_contents(content)
            check_key(contents, Network(_shapes(network)), key)
            nearest = _nearest_set(network, contents, key)
        remarks = _remarks(contents, nearest.root, nearest.named.values(), path)
        return FileWeights(read_all(nearest.named), None, frozenset(), remarks)


@contextmanager
def _refuses_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # of a tensor
        raise UserError(f"`{path}` is damaged: {first_line(error)}. Copy it again.") from None


@contextmanager
def _names(path: Path) -> Iterator[None]:
    """Put the file before the message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"`{path}` {error}") from None


def _remarks(
    contents: Contents, root: tuple[str, ...], used: Iterable[Entry], path: Path
) -> list[str]:
    remarks = [f"{path}: the weights under `{name_of(root)}`"] if root else []
    rest = name_rest(contents, used)
    return [*remarks, f"{path}: ignored {rest}"] if rest else remarks


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _search(
    network: nn.Module, spec: ModelSpec, contents: Contents, key: Key
) -> tuple[Weights | None, frozenset[str]]:
    """The weights that fit the network, and the names of those with a row for each class if their
    number may be another than the dataset's."""
    shapes = _shapes(network)
    expected = Network(shapes)
    check_key(contents, expected, key)
    if found := find_weights(contents, expected, key.value):
        return _take(choose(found, contents, expected, key), network, contents), frozenset()
    head = last_layer(spec)
    expected = Network(shapes, head)
    if found := find_weights(contents, expected, key.value):
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
    network: nn.Module, spec: ModelSpec, contents: Contents, expected: Network, key: Key
) -> Weights | None:
    """The weights of a file that the network's library has to convert: an older version's, or those
    of the repository that it was taken from."""
    found: dict[Found, Weights] = {}
    wrappers = Transform(expected.vocabulary, only_wrappers=True)
    for root, entries in _candidates(contents, expected, key.value)[:_MOST_TRIALS]:
        named = {".".join(wrappers(entry.path[len(root) :])): entry for entry in entries}
        state = read_all(named)
        stated = _versions(contents, root, wrappers)
        for weights in _conversions(network, spec, state, stated, expected):
            taken = {value.data_ptr() for value in weights.state.values()}  # under another name
            used = [
                entry
                for name, entry in named.items()
                if state[name].data_ptr() in taken or not _is_extra(name, expected)
            ]
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
    keys = tuple(name.split("."))
    return not expected.could_have(keys, keys)


@dataclass(frozen=True)
class _Nearest:
    """The tensors of a file that come nearest to a network's."""

    root: tuple[str, ...]
    transform: Transform | None
    entries: Sequence[tuple[str, Entry]]  # with the names that they have in the network

    @property
    def named(self) -> Mapping[str, Entry]:
        return dict(self.entries)


def _nearest(network: nn.Module, contents: Contents, key: str | None) -> _Nearest:
    scored = _scored(network, contents, key)
    return max(scored, key=lambda each: each[0], default=(0, _Nearest((), None, ())))[1]


def _nearest_set(network: nn.Module, contents: Contents, key: Key) -> _Nearest:
    """The one set of weights that comes nearest; of several, as `choose` does."""
    shapes, highest = _shapes(network), 0
    sets: dict[Found, _Nearest] = {}  # of the highest score
    for score, nearest in _scored(network, contents, key.value):
        used = [(name, e) for name, e in nearest.entries if name in shapes]
        is_one = len({name for name, _ in used}) == len(used)
        if score < max(highest, 1) or not is_one or any(is_of_optimizer(e.path) for _, e in used):
            continue
        if score > highest:
            highest, sets = score, {}
        sets[Found(nearest.root, dict(used), nearest.transform)] = nearest
    if sets:
        return sets[choose(distinct(sets), contents, Network(shapes), key)]
    nearest = _nearest(network, contents, key.value)
    if nearest.named.keys() & shapes.keys():
        raise UserError(
            "has several tensors for each of the network's, or an optimizer's alone; expected one "
            "set of weights. Save the network's alone."
        )
    return nearest


def _scored(
    network: nn.Module, contents: Contents, key: str | None
) -> Iterator[tuple[int, _Nearest]]:
    """The tensors below each path, by each way to name them, with the number of the network's
    tensors that they have, those of its shape counted twice."""
    below = tensors_below(contents, key)
    if not below:
        raise UserError(
            "is not a state dict; expected a mapping from names to tensors, at any depth. It holds "
            f"{name_rest(contents, ()) or 'nothing'}."
        )
    shapes = _shapes(network)
    expected = Network(shapes)
    transforms = [None, *(Transform(expected.vocabulary, only) for only in (True, False))]
    for root, entries in below.items():
        if 2 * len(entries) < min(len(shapes), len(contents.tensors)):
            continue
        for transform in transforms:
            nearest = _Nearest(
                root, transform, [(_name(entry, root, transform), entry) for entry in entries]
            )
            score = sum(
                1 + expected.fits(name, entry.value.shape)
                for name, entry in nearest.named.items()
                if name in shapes
            )
            yield score, nearest


def _refuse(network: nn.Module, contents: Contents, path: Path, key: str | None) -> NoReturn:
    """Raise UserError with what does not fit, of the weights that come nearest."""
    with _names(path):
        nearest = _nearest(network, contents, key)
    root, transform = nearest.root, nearest.transform
    others = {
        _name(entry, root, transform): str(entry.value)
        for entry in contents.entries
        if not entry.is_tensor and entry.path[: len(root)] == root
    }
    where = f"`{path}`" + (f" (under `{name_of(root)}`)" if root else "")
    shapes = _shapes(network)  # what no name of the network has keeps its whole name
    named = {n if n in shapes else _name(e, root, None): e for n, e in nearest.entries}
    load_state(network, read_all(named), where, no_tensors=others)
    # Each name alone fits: several tensors have the same one, or they are an optimizer's.
    paths: dict[str, list[str]] = defaultdict(list)
    for entry in tensors_below(contents, key)[root]:
        paths[_name(entry, root, transform)].append(f"`{name_of(entry.path)}`")
    for name, same in paths.items():
        if name in network.state_dict() and len(same) > 1:
            raise UserError(
                f"{where} has several tensors for `{name}` of the network: "
                f"{', '.join(same[:10])}; expected one. Save the network's alone."
            )
    raise UserError(f"{where} has weights of an optimizer alone; expected a network's.")


def _name(entry: Entry, root: tuple[str, ...], transform: Transform | None) -> str:
    keys = entry.path[len(root) :]
    return ".".join(transform(keys) if transform else keys)
