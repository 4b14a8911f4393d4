"""Find a network's weights among all that a checkpoint holds.

Every tensor of a checkpoint has a path: the keys that lead to it, split at dots, so that
`{"model": {"fc.weight": ...}}` and `{"model.fc.weight": ...}` are the same. The weights are below
the path under which all of the network's tensors are found, with their shapes.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.initial_weights import torch_file
from pipeline.initial_weights.inert_pickle import Inert
from pipeline.initial_weights.torch_file import StoredTensor, Unreadable
from pipeline.runtime.errors import UserError, counted, did_you_mean

Keys = tuple[str, ...]  # a path, or a tensor's name, split at dots
Shapes = Mapping[str, Sequence[int]]  # of a network's tensors, by their names

_MOST_VALUES, _DEEPEST = 200_000, 200
_CONTAINERS = (list, tuple, Mapping, Inert, Tensor)  # of tensors
_SHOWN = 10  # names in a message
#: What libraries save beside a module's weights: counters, ranges of quantisation-aware training,
#: masks of pruning, and buffers that the code of networks computes.
_NO_WEIGHTS = {
    *("num_batches_tracked", "total_ops", "total_params", "_extra_state"),
    *("weight_fake_quant", "activation_post_process", "weight_mask", "bias_mask"),
    *("attn_mask", "relative_position_index", "relative_coords_table", "relative_coordinates_log"),
    *("attention_bias_idxs", "rel_indices", "position_ids", "inv_freq", "filt", "bands", "k_bias"),
    "drop_path",
}

#: What torch's and Lightning's wrappers call the module in them: `module`, `_orig_mod`,
#: `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`, `_forward_module`.
_WRAPPED = re.compile(r"module|_\w*mod(ule)?")
_OPTIMIZER = re.compile(r"(?<![a-z])optim(izers?)?(?![a-z])")
#: Words for averaged weights, as part of a name: `model_ema`, `swa_state_dict`, `EMAModel`; not
#: Adam's `exp_avg`.
_AVERAGED = re.compile(r"(?<![a-z])(?<!exp_)(ema|swa|averaged?|avg|polyak|shadow)(?![a-z])")


@dataclass(frozen=True)
class Key:
    """Which weights of a checkpoint are meant."""

    value: str | None  # the keys that lead to them, joined by dots; None: see `choose`
    parameter: str  # that says so, for messages: `teacher.checkpoint_key`


@dataclass(frozen=True, eq=False)
class Entry:
    """One value of a checkpoint."""

    path: Keys
    value: Tensor | StoredTensor | str  # a text says what something is that is no tensor

    @property
    def is_tensor(self) -> bool:
        return not isinstance(self.value, str)


@dataclass
class Contents:
    """All values of a checkpoint, and the versions of modules that it states (`_metadata`)."""

    entries: list[Entry] = field(default_factory=list)
    versions: dict[Keys, dict[str, Any]] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.is_tensor]


@dataclass(frozen=True, eq=False)
class Found:
    """A network's tensors in a checkpoint, below a path."""

    root: Keys
    tensors: Mapping[str, Entry]  # by the network's names
    transform: "Transform | None"

    def state(self) -> dict[str, Tensor]:
        return read_all(self.tensors)


def read_all(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors of entries.

    Raises:
        ValueError: the file is damaged.
    """
    values = {name: entry.value for name, entry in entries.items()}
    return {n: v.tensor() if isinstance(v, StoredTensor) else v for n, v in values.items()}


def list_contents(content: Any) -> Contents:
    """List everything in a checkpoint, with its path.

    Raises:
        UserError: it holds too much.
        ValueError: a tensor's sizes are damaged.
    """
    contents = Contents()
    _walk(content, (), frozenset(), contents, set())
    return contents


def _walk(
    value: Any, path: Keys, within: frozenset[int], contents: Contents, barren: set[int]
) -> None:
    """
    Args:
        within: ids of the containers that lead here: one may be in itself.
        barren: ids of containers without tensors, which are not searched again.
    """
    if len(contents.entries) >= _MOST_VALUES:
        raise UserError(f"holds more than {_MOST_VALUES:,} values; expected a checkpoint.")
    value = (torch_file.tensor_of(value) or value) if isinstance(value, Inert) else value
    if isinstance(value, Tensor | StoredTensor):
        contents.entries.append(Entry(path, value))
        return
    before = len(contents.entries)
    if id(value) not in within | barren and len(path) < _DEEPEST:
        for keys, child in _children(value, path, contents):
            _walk(child, (*path, *keys), within | {id(value)}, contents, barren)
    if len(contents.entries) == before and not _is_network(value):
        contents.entries.append(Entry(path, _describe(value)))
    if not any(entry.is_tensor for entry in contents.entries[before:]):
        barren.add(id(value))


def _children(value: Any, path: Keys, contents: Contents) -> Iterator[tuple[Keys, Any]]:
    """The values in a container that can lead to tensors, each with the keys that lead to it."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            if isinstance(key, str):
                yield tuple(key.split(".")), child
            elif isinstance(key, int):
                yield (str(key),), child
    elif isinstance(value, list | tuple):
        for number, child in enumerate(value):
            if isinstance(child, _CONTAINERS):
                yield (str(number),), child
    elif _is_network(value):
        yield from _children_of_network(_state_of(value))
    elif isinstance(value, Inert):
        state = _state_of(value)
        _note_versions(state.get("_metadata"), path, contents)
        yield from _children(value.items, path, contents)
        yield from _children(value.elements, path, contents)
        if value.path == "collections.OrderedDict":  # as protocols 0 and 1 write it
            yield from _children(dict(_pairs(value.args)), path, contents)
        else:
            containers = {k: v for k, v in state.items() if isinstance(v, _CONTAINERS)}
            yield from _children(containers, path, contents)


def _children_of_network(state: Mapping[str, Any]) -> Iterator[tuple[Keys, Any]]:
    """The tensors and parts of a network that was saved whole, as its state dict names them."""
    left_out = state.get("_non_persistent_buffers_set")
    for kind in ("_parameters", "_buffers", "_modules"):
        for keys, child in _children(state.get(kind), (), Contents()):
            persistent = not isinstance(left_out, set) or keys[0] not in left_out
            if isinstance(child, Inert) and (persistent or kind != "_buffers"):
                yield keys, child


def _is_network(value: Any) -> bool:
    return isinstance(value, Inert) and "_modules" in _state_of(value)


def _state_of(value: Inert) -> Mapping[str, Any]:
    state = value.state
    if isinstance(state, tuple) and state:  # with slots
        state = state[0]
    return state if isinstance(state, Mapping) else {}


def _note_versions(versions: Any, path: Keys, contents: Contents) -> None:
    if isinstance(versions, Inert):
        for module, version in versions.items.items():
            number = version.get("version") if isinstance(version, Mapping) else None
            if isinstance(module, str) and isinstance(number, int):
                contents.versions[(*path, *_split(module))] = {"version": number}


def _pairs(args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for pair in args[0] if args and isinstance(args[0], list) else ():
        if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str):
            yield pair[0], pair[1]


def _describe(value: Any) -> str:
    if isinstance(value, Inert) or (isinstance(value, type) and issubclass(value, Inert)):
        return ascii(value.path)[1:-1][:80]
    if isinstance(value, Unreadable):
        return f"a {value.kind}"
    return type(value).__name__


def _split(name: str) -> Keys:
    return tuple(name.split(".")) if name else ()


@dataclass(frozen=True)
class Transform:
    """Removes keys from a path: those of wrappers, or all that no name of the network has."""

    vocabulary: frozenset[str]  # the keys of the network's names
    only_wrappers: bool

    def __call__(self, path: Keys) -> Keys:
        return tuple(key for key in path if not self._removes(key))

    def _removes(self, key: str) -> bool:
        unknown = key not in self.vocabulary
        return unknown and (not self.only_wrappers or bool(_WRAPPED.fullmatch(key)))


class Network:
    """What a network expects of a state dict."""

    def __init__(self, shapes: Shapes, class_rows: Collection[str] = ()):
        """
        Args:
            shapes: of its tensors, by name.
            class_rows: names of the tensors that have one row for each class, of which any number
                fits.
        """
        self.shapes = shapes
        self.class_rows = frozenset(class_rows)
        self.names = {tuple(name.split(".")): name for name in shapes}
        # Batch norm's step counters came late to PyTorch: old checkpoints lack them.
        self.required = [name for name in shapes if not name.endswith("num_batches_tracked")]
        self.vocabulary = frozenset(key for keys in self.names for key in keys)
        self._first = {keys[0] for keys in self.names}
        self._last = {keys[-1] for keys in self.names}

    def fits(self, name: str, shape: Sequence[int]) -> bool:
        first = 1 if name in self.class_rows and len(shape) else 0
        return len(shape) == len(self.shapes[name]) and list(shape[first:]) == list(
            self.shapes[name][first:]
        )

    def could_have(self, path: Keys, keys: Keys) -> bool:
        """Whether a tensor may be a weight of a network like this one: of a further layer, or a
        bias, scale or statistic that this one lacks. `keys`: what a transform leaves of its path.
        """
        if not keys or not _NO_WEIGHTS.isdisjoint(path):
            return False
        numbered = keys[0].isdigit() and any(key.isdigit() for key in self._first)
        return keys[0] in self._first or (numbered and keys[-1] in self._last)


def find_weights(contents: Contents, network: Network, key: str | None = None) -> list[Found]:
    """Every path below which all of the network's tensors are, with their shapes, and nothing else
    of a network like it. Keys are removed from the paths only if none fits without: first those of
    wrappers, then all that are no part of the network's names."""
    below = tensors_below(contents, key)
    roots = [
        root
        for root, entries in below.items()
        if len(entries) >= len(network.required) and not is_of_optimizer(root)
    ]
    wrappers = Transform(network.vocabulary, only_wrappers=True)
    found = [
        match
        for root in sorted(roots, key=len)
        for transform in (None, wrappers)
        if (match := _match(below[root], root, transform, network))
    ]
    if not found:
        unknown = Transform(network.vocabulary, only_wrappers=False)
        matches = (
            _match(below[root], root, unknown, network)
            for root in sorted(roots, key=len, reverse=True)
        )
        found = [match for match in matches if match]
    return distinct(found)


def tensors_below(contents: Contents, key: str | None = None) -> dict[Keys, list[Entry]]:
    """The tensors below each path, or each path that begins with `key`."""
    start = _split(key or "")
    below: dict[Keys, list[Entry]] = defaultdict(list)
    for entry in contents.tensors:
        if entry.path[: len(start)] == start:
            for depth in range(len(start), len(entry.path)):
                below[entry.path[:depth]].append(entry)
    return below


def _match(
    entries: Iterable[Entry], root: Keys, transform: Transform | None, network: Network
) -> Found | None:
    fitting: dict[str, Entry] = {}
    for entry in entries:
        keys = entry.path[len(root) :]
        keys = transform(keys) if transform else keys
        name = network.names.get(keys)
        if name is None:
            if network.could_have(entry.path, keys):
                return None
        elif network.fits(name, entry.value.shape):
            if name in fitting:
                return None  # which one is meant?
            fitting[name] = entry
        elif transform is None:
            return None
    rows = {fitting[name].value.shape[0] for name in network.class_rows if name in fitting}
    if len(rows) > 1 or not all(name in fitting for name in network.required):
        return None
    return Found(root, fitting, transform)


def distinct(found: Iterable[Found]) -> list[Found]:
    """Without those that have the tensors of an earlier one."""
    kept: dict[frozenset[int], Found] = {}
    for match in found:
        kept.setdefault(frozenset(map(id, match.tensors.values())), match)
    return list(kept.values())


def choose(found: Sequence[Found], contents: Contents, network: Network, key: Key) -> Found:
    """Choose the weights that the key names; without one the averaged ones (EMA), or the only ones.

    Raises:
        UserError: there are several, or the averaged ones do not fit.
    """
    averaged: Sequence[Found] = []
    if key.value is not None:
        found = [match for match in found if match.root == _split(key.value)] or found
    else:
        averaged = [match for match in found if _leads_to_average(match.root, contents)]
        if not averaged and not _are_swapped(contents):
            _check_no_averaged(found, contents, network, key)
    found = _unequal(_outermost(averaged or found))
    if len(found) == 1:
        return found[0]
    roots = [name_of(match.root) for match in found]
    raise UserError(
        f"holds {len(found)} sets of weights that fit the network, "
        f"{', '.join(f'`{root}`' for root in roots[:_SHOWN])}; expected one. Set the one to take: "
        f"`{key.parameter}: {roots[0]}`, for example."
    )


def _outermost(found: Sequence[Found]) -> list[Found]:
    """Without those below one that fits as it is."""
    plain = [match.root for match in found if match.transform is None]
    return [
        match
        for match in found
        if not any(len(r) < len(match.root) and match.root[: len(r)] == r for r in plain)
    ]


def _unequal(found: Sequence[Found]) -> list[Found]:
    """Without those that equal an earlier one in every number."""
    if len(found) < 2:
        return list(found)
    kept: list[tuple[Found, dict[str, Tensor]]] = []
    for match in found:
        state = match.state()
        if not any(
            state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
            for _, other in kept
        ):
            kept.append((match, state))
    return [match for match, _ in kept]


def _leads_to_average(root: Keys, contents: Contents) -> bool:
    """Whether the weights below this path are averaged ones (EMA)."""
    return root[:1] == ("state_dict",) if _are_swapped(contents) else _is_averaged(root)


def is_of_optimizer(path: Keys) -> bool:
    return any(_OPTIMIZER.search(_words(key)) for key in path)


def _are_swapped(contents: Contents) -> bool:
    """MMEngine's EMAHook saves the averaged weights as `state_dict`, and as `ema_state_dict` those
    that were trained."""
    starts = {entry.path[:1] for entry in contents.tensors}
    return {("state_dict",), ("ema_state_dict",)} <= starts and any(
        entry.path == ("meta", "mmengine_version") for entry in contents.entries
    )


def _is_averaged(path: Keys) -> bool:
    return any(_AVERAGED.search(_words(key)) for key in path)


def _words(key: str) -> str:
    """`EMAModel` as `ema_model`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key).lower()


def _check_no_averaged(
    found: Sequence[Found], contents: Contents, network: Network, key: Key
) -> None:
    used = {id(entry) for match in found for entry in match.tensors.values()}
    roots = Counter(
        entry.path[: 1 + next(i for i, key in enumerate(entry.path) if _is_averaged((key,)))]
        for entry in contents.tensors
        if id(entry) not in used and _is_averaged(entry.path)
    )
    for root, count in roots.most_common(1):
        if 2 * count >= len(network.required):
            raise UserError(
                f"holds averaged weights (EMA), {count} tensors under `{name_of(root)}`, that do "
                f"not fit the network, which has {len(network.required)}. Save them under the "
                "network's names, or take the others: "
                f"`{key.parameter}: {name_of(found[0].root)}`."
            )


def name_of(path: Keys) -> str:
    return ".".join(path) or '""'


def check_key(contents: Contents, network: Network, key: Key) -> None:
    """Refuse a key at which a checkpoint has nothing."""
    if key.value is None:
        return
    path = _split(key.value)
    below = tensors_below(contents)
    if path in below or not path:
        return
    enough = len(network.required)
    known = sorted(name_of(root) for root in below if root and len(below[root]) >= enough)
    raise UserError(
        f"has nothing at `{key.value}` (`{key.parameter}`){did_you_mean(key.value, known) or '.'} "
        f"Known: {', '.join(f'`{name}`' for name in known[:_SHOWN]) or 'none'}."
    )


def name_rest(contents: Contents, used: Iterable[Entry]) -> str:
    """Count and name what a checkpoint holds beside the weights, each by the first key that leads
    away from them; empty if there is nothing."""
    used = set(used)
    leads = {entry.path[:depth] for entry in used for depth in range(len(entry.path) + 1)}
    rest: dict[Keys, list[Entry]] = defaultdict(list)
    for entry in contents.entries:
        if entry not in used:
            lengths = range(1, len(entry.path) + 1)
            apart = next((n for n in lengths if entry.path[:n] not in leads), len(entry.path))
            rest[entry.path[:apart]].append(entry)
    if not rest:
        return ""
    texts = [f"`{name_of(path)}`{_kind_of(entries)}" for path, entries in rest.items()]
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return f"{counted(len(texts), 'entry', 'entries')}: {', '.join(texts[:_SHOWN])}{more}"


def _kind_of(entries: Sequence[Entry]) -> str:
    count = sum(entry.is_tensor for entry in entries)
    if count > 1:
        return f" ({count} tensors)"
    objects = [e.value for e in entries if not e.is_tensor and "." in e.value]
    return f" ({objects[0]})" if objects else ""
