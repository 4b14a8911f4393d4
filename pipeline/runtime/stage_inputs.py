"""Refuse a result when a stage's inputs changed while it ran.

DVC records a stage's inputs as they are when the stage has ended. Whatever changed during the run
(a parameter, a branch, the prepared images) would be recorded as what made the result, and DVC's
cache would later restore that result for the new inputs. The comparison finds what changes between
this check and DVC's, and what a dvc.lock that was merged by hand records wrongly: predictions say
which parameters made them.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of_file
from pipeline.runtime.params import PARAMS_FILE, read_params, read_yaml

DVC_FILE = Path("dvc.yaml")
CODE = Path("pipeline")
CODE_SUFFIXES = (".py", ".txt", ".html", ".css", ".js")  # as in .dvcignore
_MAX_HASHED = 2**24  # bytes; a larger file is compared by size and date


class StageInputs:
    """A snapshot of the stage's params and deps, as dvc.yaml lists them; empty without dvc.yaml.

    `params` has the value in params.yaml of each key that dvc.yaml names.
    """

    def __init__(self, stage: str, name: str | None = None, *, exclude: Path | None = None):
        """Take the snapshot.

        Args:
            name: the student's, for a stage that runs once per student.
            exclude: a dependency that the stage writes into.
        """
        params = read_params()
        definition = _definition(stage)
        if name is not None:
            students = params.get("students")
            item = students.get(name) if isinstance(students, dict) else None
            definition = definition.get("do", {})
            params |= {"key": name, "item": item}
        self._keys = [_fill(key, params) for key in definition.get("params", [])]
        paths = (Path(_fill(path, params)) for path in definition.get("deps", []))
        self._paths = [path for path in paths if path != exclude]
        self.params, self._states = self._snapshot()

    def check(self) -> None:
        """Refuse the result if an input has changed; call before writing it."""
        params, states = self._snapshot()
        changed = [f"{PARAMS_FILE}: {key}" for key in params if params[key] != self.params[key]]
        changed += [str(path) for path in states if states[path] != self._states[path]]
        if changed:
            names = ", ".join(f"`{name}`" for name in changed)
            raise UserError(
                f"{names} changed while this stage ran; expected no change, because DVC "
                "would record the new state as what made the result. The result was not written. "
                "Run `dvc repro` again; if you revert the change first, it resumes from what is "
                "finished."
            )

    def _snapshot(self) -> tuple[dict[str, Any], dict[Path, Any]]:
        params = read_params() if self._keys else {}
        return (
            {key: _look_up(key, params) for key in self._keys},
            {path: _state(path) for path in self._paths},
        )


def _definition(stage: str) -> dict[str, Any]:
    """Read a stage's entry of dvc.yaml, and refuse a file without it."""
    try:
        return dict(read_yaml(DVC_FILE)["stages"][stage])
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"`{DVC_FILE}` has no stage `{stage}`; expected the pipeline's. Restore it with "
            f"`git checkout {DVC_FILE}`."
        ) from None


def _fill(text: str, params: Mapping[str, Any]) -> str:
    """Replace each `${key}` of dvc.yaml by its value."""
    return re.sub(r"\$\{(.+?)\}", lambda match: str(_look_up(match[1], params)), text)


def _look_up(key: str, params: Mapping[str, Any]) -> Any:
    """The value at a dotted key such as `views.policy`; None if there is none."""
    value: Any = params
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _state(path: Path) -> Any:
    """A value that changes with a file's content. For a folder of code: the hash of every file of
    CODE_SUFFIXES that is not hidden, the files that DVC sees through `.dvcignore`. For another
    folder: sizes and dates."""
    if path.is_dir() and path.is_relative_to(CODE):
        code = (file for file in path.rglob("*") if file.suffix in CODE_SUFFIXES)
        return {str(file): sha256_of_file(file) for file in code if "/." not in str(file)}
    if path.is_dir():
        files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
        return {str(file): _size_and_time(file) for file in files}
    status = _size_and_time(path)
    return sha256_of_file(path) if status and status[0] <= _MAX_HASHED else status


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:  # absent
        return None
    return status.st_size, status.st_mtime_ns
