"""What a module of the project imports, read from the source."""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def closure(module: str) -> frozenset[str]:
    """Paths, relative to the root, of all files of ours that importing the module executes."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        for path in _files_of(name):
            if path not in found:
                found.add(path)
                waiting.extend(_imports(path))
    return frozenset(found)


def packages_imported_by(files: Iterable[str]) -> dict[str, set[str]]:
    """For each package that holds some of the files, the other packages that these import."""
    found: dict[str, set[str]] = {}
    for path in files:
        package = _package(path)
        imported = {_package(file) for name in _imports(path) for file in _files_of(name)}
        found.setdefault(package, set()).update(imported - {package, ""})
    return found


def _package(path: str) -> str:
    """`store/format` of `pipeline/store/format/shards.py`; empty for a package's own `__init__`."""
    return "" if path.endswith("__init__.py") else path.removeprefix("pipeline/").rpartition("/")[0]


@cache
def _files_of(name: str) -> tuple[str, ...]:
    """The module's file and the `__init__` of every package above it; none if it is not ours."""
    parts = name.split(".")
    if parts[0] != "pipeline":
        return ()
    packages = ["/".join(parts[:n]) + "/__init__.py" for n in range(1, len(parts))]
    own = "/".join(parts)
    candidates = [*packages, f"{own}.py", f"{own}/__init__.py"]
    return tuple(path for path in candidates if (ROOT / path).is_file())


@cache
def _imports(path: str) -> tuple[str, ...]:
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)
