"""Read a pickle without running anything that it names.

Python's own unpickler reads it, but each class or function that the file names becomes an `Inert`:
a class of ours that keeps what it is called with. Nothing of the file is imported or called.
"""

import pickle
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, ClassVar

_MOST_NAMES = 10_000  # of classes and functions in one file


class Inert:
    """Stands for what a pickle makes of a class or function: what it was called with, the state
    that was set, and what was put into it as into a mapping or a list."""

    path: ClassVar[str]  # MODULE.NAME of the class or function

    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]
    elements: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> "Inert":
        self = object.__new__(cls)
        vars(self).update(args=args, state=None, items={}, elements=[])
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *args: Any, **_: Any) -> "Inert":  # of a method, got by `getattr`
        return type(self)(*args)

    # What an unpickler calls on the objects that it makes.

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.elements.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        self.elements.extend(values)

    add = append


class InertUnpickler(pickle.Unpickler):
    """Makes containers, texts and numbers as the pickle says, and an `Inert` of all else."""

    def __init__(self, file: BinaryIO, load_persistent: Callable[[Any], Any] | None = None):
        super().__init__(file, encoding="utf-8", errors="replace")
        self._load_persistent = load_persistent
        self._named: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> type[Inert]:
        path = f"{module}.{name}"
        if path not in self._named:
            if len(self._named) == _MOST_NAMES:
                raise pickle.UnpicklingError(f"it names more than {_MOST_NAMES:,} classes")
            self._named[path] = type("Inert", (Inert,), {"path": path})
        return self._named[path]

    def persistent_load(self, pid: Any) -> Any:
        if self._load_persistent is None:
            raise pickle.UnpicklingError("it refers to objects outside it")
        return self._load_persistent(pid)
