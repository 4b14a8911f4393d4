"""Which of the project's files a module executes when it is imported, read from the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def closure(module: str) -> set[str]:
    """Paths, relative to the root, of all files of ours that importing the module executes."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        for path in _files_of(name):
            if path not in found:
                found.add(path)
                waiting.extend(_imports((ROOT / path).read_text("utf-8")))
    return found


def _files_of(name: str) -> list[str]:
    """The module's file and the `__init__` of every package above it; none if it is not ours."""
    parts = name.split(".")
    if parts[0] != "pipeline":
        return []
    packages = ["/".join(parts[:n]) + "/__init__.py" for n in range(1, len(parts))]
    own = "/".join(parts)
    candidates = [*packages, f"{own}.py", f"{own}/__init__.py"]
    return [path for path in candidates if (ROOT / path).is_file()]


def _imports(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
