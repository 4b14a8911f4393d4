"""What a stage is given, looked at when it begins and again before it writes.

DVC records a stage's inputs as they are when the stage has ended. Whatever changed meanwhile (a
parameter, a branch, images prepared again) would be recorded as what the result was made from, and
kept in DVC's cache as that. What changes in the moment between this look and DVC's, or comes from a
dvc.lock that was merged by hand, is found by the comparison: predictions say which parameters made
them. Contract code: an edit here runs the teacher again.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of_file
from pipeline.runtime.params import PARAMS_FILE, read_params

DVC_FILE = Path("dvc.yaml")
CODE = Path("pipeline")
_READ_WHOLE = 2**24  # bytes; of a larger file, size and time are enough
_SHOWN = 5  # changes in one message


class StageInputs:
    """All that DVC records of a stage, as it is now; nothing where there is no dvc.yaml.

    `params` are its parameters: what stands in params.yaml at each key that dvc.yaml names.
    """

    def __init__(self, stage: str, name: str | None = None, *, exclude: Path | None = None):
        """
        Args:
            name: of the student, for the stages that are one for each.
            exclude: a dependency that the stage itself writes into.
        """
        params = read_params()
        content = _definition(stage)
        if name is not None:
            students = params.get("students")
            item = students.get(name) if isinstance(students, dict) else None
            content, params = content.get("do", {}), params | {"key": name, "item": item}
        self._keys = [_filled(key, params) for key in content.get("params", [])]
        paths = (Path(_filled(path, params)) for path in content.get("deps", []))
        self._paths = [path for path in paths if path != exclude]
        self.params, self._states = self._now()

    def check(self) -> None:
        """Raises: UserError: something is not as it was; the stage must not write its result."""
        params, states = self._now()
        changed = [f"{PARAMS_FILE}: {key}" for key in params if params[key] != self.params[key]]
        changed += [str(path) for path in states if states[path] != self._states[path]]
        if changed:
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            shown = ", ".join(f"`{what}`" for what in changed[:_SHOWN])
            raise UserError(
                f"{shown}{more} changed while this stage ran; expected no change, for the result "
                "would be recorded as made from what is there now. It was not written. Run "
                "`dvc repro` again; set back to what it was, a run goes on from what is finished."
            )

    def _now(self) -> tuple[dict[str, Any], dict[Path, Any]]:
        params = read_params() if self._keys else {}
        return (
            {key: _looked_up(key, params) for key in self._keys},
            {path: _state(path) for path in self._paths},
        )


def _definition(stage: str) -> dict[str, Any]:
    """A stage of dvc.yaml as it is written there.

    Raises:
        UserError: dvc.yaml is not YAML, or lacks the stage.
    """
    try:
        content = yaml.safe_load(DVC_FILE.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"`{DVC_FILE}` is not valid YAML: {error}") from None
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, dict) or not isinstance(stages.get(stage), dict):
        raise UserError(
            f"`{DVC_FILE}` has no stage `{stage}`; expected the pipeline's. `git checkout "
            f"{DVC_FILE}` takes it back."
        )
    return stages[stage]


def _filled(text: str, params: Mapping[str, Any]) -> str:
    """A text of dvc.yaml with its `${...}` filled in."""
    return re.sub(r"\$\{(.+?)\}", lambda found: str(_looked_up(found[1], params)), text)


def _looked_up(key: str, params: Mapping[str, Any]) -> Any:
    """What stands at `views.policy`; None where nothing does."""
    value: Any = params
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _state(path: Path) -> Any:
    """A value that changes with a file's content. For a folder of code: the content of every
    Python file, as `.dvcignore` has DVC see it. For another folder: every file's size and date."""
    if path.is_dir() and path.is_relative_to(CODE):
        return {str(file): sha256_of_file(file) for file in _code_files(path)}
    if path.is_dir():
        files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
        return {str(file): _size_and_time(file) for file in files}
    found = _size_and_time(path)
    return sha256_of_file(path) if found and found[0] <= _READ_WHOLE else found


def _code_files(folder: Path) -> list[Path]:
    """The Python files below the folder, hidden ones left out."""
    return [
        file
        for file in folder.rglob("*.py")
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:  # absent
        return None
    return status.st_size, status.st_mtime_ns
