"""Load one section of params.yaml and validate it against the model of its owner."""

import re
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node

from pipeline.runtime.errors import UserError, did_you_mean, first_line
from pipeline.runtime.validation import Model, Record, shown, validate

PARAMS_FILE = Path("params.yaml")


class Section(Record):
    """A section of params.yaml."""


_MAX_VALUES = 100_000  # in one file, with the values that aliases repeat

#: ruamel.yaml raises these for deep nesting, and for a text that is not a value of its type, such
#: as `2024-13-45`.
_NOT_A_VALUE = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


class _Composer(Composer):
    """Refuses aliases that make a small file a large one, or one without end."""

    def get_single_node(self) -> Node | None:
        root = super().get_single_node()
        waiting, count = [root], 0
        while waiting:
            node = waiting.pop()
            parts = node.value if isinstance(node, CollectionNode) else []
            parts = list(chain(*parts)) if isinstance(node, MappingNode) else parts
            waiting += parts
            count += len(parts)
            if count > _MAX_VALUES:
                problem = f"more than {_MAX_VALUES:,} values, counting what aliases repeat"
                raise MarkedYAMLError(None, None, problem, node.start_mark)
        return root


@lru_cache(maxsize=2)  # params.yaml and dvc.yaml, which a stage reads in turn
def _parse(text: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    return yaml.load(text)


def read_yaml(path: Path) -> Any:
    """Read a YAML file by the library that DVC reads with, so that both get the same values.

    Raises:
        FileNotFoundError: the file is absent.
        UserError: it cannot be read, or is not YAML.
    """
    try:
        return deepcopy(_parse(path.read_text("utf-8")))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"`{path}` cannot be read ({error.strerror}).") from None
    except MarkedYAMLError as error:
        problem = str(error.problem).partition(" with value ")[0]  # of a duplicate key: maybe long
        if mark := error.problem_mark:
            problem += f" at line {mark.line + 1}, column {mark.column + 1}"
    except (YAMLError, UnicodeDecodeError) as error:
        problem = first_line(error)
    except _NOT_A_VALUE as error:
        problem = f"a value is nested too deeply, or is not valid for its type ({error})"
    raise UserError(f"`{path}` is not valid YAML: {problem}.")


def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """Read all of params.yaml, without validation. Refuses a file that is no mapping in YAML."""
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"`{path}` is absent. Run this from the project's folder.") from None
    if not isinstance(content, dict):
        raise UserError(f"`{path}` is {shown(content)}; expected a mapping of sections.")
    return content


def load_section(model: type[Model], name: str) -> Model:
    """Load section `name` of params.yaml and validate it."""
    params, where = read_params(), f"{PARAMS_FILE}: {name}"
    if name not in params:
        raise UserError(f"`{where}` is missing; expected a section of that name.")
    return validate(model, params[name], where)


_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def load_with_overrides(
    model: type[Model],
    section: str,
    overrides: Any,
    student: str,
    *,
    inherit: bool = True,
) -> Model:
    """Load a section, overridden key by key by a student's values. A key that the student sets to
    null is removed, so the model's default holds.

    Args:
        inherit: False ignores the section's values.

    Raises:
        UserError: names each bad key by the place where it is written.
    """
    defaults, where = read_params().get(section), f"{PARAMS_FILE}: students.{student}.{section}"
    if not isinstance(defaults, Mapping):
        raise UserError(f"`{PARAMS_FILE}: {section}` is missing; expected a section of that name.")
    if not isinstance(overrides, Mapping):
        raise UserError(f"`{where}` is {shown(overrides)}; expected a mapping.")
    kept = {key: value for key, value in defaults.items() if inherit and key not in overrides}
    merged = kept | {key: value for key, value in overrides.items() if value is not None}
    origins = dict.fromkeys(overrides, where)
    return validate(model, merged, f"{PARAMS_FILE}: {section}", origins=origins)


def student_names() -> list[str]:
    """List the students' names, in the order of the file. Refuses a file without a student, and
    names with other characters."""
    students = read_params().get("students")
    if not isinstance(students, Mapping) or not students:
        raise UserError(
            f"`{PARAMS_FILE}: students` defines no student; expected a mapping of at least one "
            "`NAME: {family, network, training: {}, distillation: {}}`."
        )
    problems = [
        f"`{PARAMS_FILE}: students` has the name {name!r}; expected lower-case letters, "
        "digits, `_` and `-`, starting with a letter or digit."
        for name in students
        if not isinstance(name, str) or not _NAME.fullmatch(name)
    ]
    if "teacher" in students:
        problems.append(
            f"`{PARAMS_FILE}: students` has the name 'teacher', under which every table and chart "
            "has the teacher; expected another name."
        )
    if problems:
        raise UserError("\n".join(problems))
    return list(students)


def check_student(name: str) -> None:
    """Refuse a name that is not a student's, and name the nearest student."""
    known = student_names()
    if name not in known:
        raise UserError(
            f"`{PARAMS_FILE}: students` has no `{name}`{did_you_mean(name, known) or '.'} "
            f"Known: {', '.join(known)}."
        )


def paired_views(params: Mapping[str, Any], student: str) -> str:
    """A student's `distillation.paired_views`, for code that loads no method; it is `both` by
    default. The section's is another method's if the student names its own."""
    section, own = params["distillation"], params["students"][student].get("distillation") or {}
    same_method = own.get("method") in (None, section.get("method", "kd"))
    inherited = section.get("paired_views") if same_method else None
    return own.get("paired_views", inherited) or "both"
