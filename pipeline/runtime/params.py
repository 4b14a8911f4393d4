"""Load one section of params.yaml and validate it against the model of its owner."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from pipeline.runtime.errors import UserError, did_you_mean
from pipeline.runtime.validation import Record, shown, validate

PARAMS_FILE = Path("params.yaml")


class Section(Record):
    """A section of params.yaml."""


Model = TypeVar("Model", bound=Section)

_MAX_VALUES = 100_000  # in one file, with the values that aliases repeat
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Read YAML 1.2 numbers, as DVC does: `5e-4` is a number, not text. Refuse duplicate keys, and
    aliases that make a small file a large one."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _check_node(node, {})
        return node


def _check_node(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the values of a node, with those that aliases repeat.

    Args:
        counts: by id, of the nodes seen before; 0 while their parts are being counted.

    Raises:
        yaml.MarkedYAMLError: too many values, a node that contains itself, or a duplicate key.
    """

    def refuse(problem: str, at: yaml.Node = node) -> NoReturn:
        raise yaml.MarkedYAMLError(None, None, problem, at.start_mark)

    if id(node) in counts:
        return counts[id(node)] or refuse("an alias refers to a node that contains it")
    counts[id(node)] = 0
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        parts, keys = [part for pair in node.value for part in pair], set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in keys:
                    refuse(f"duplicate key `{key.value}`: remove one", key)
                keys.add((key.tag, key.value))
    counts[id(node)] = 1 + sum(_check_node(part, counts) for part in parts)
    if counts[id(node)] > _MAX_VALUES:
        refuse(f"more than {_MAX_VALUES:,} values, counting what aliases repeat")
    return counts[id(node)]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), "-+0123456789"
)

#: PyYAML raises these for a text that is not a value of its type, `2024-13-45`, or deep nesting.
_NOT_A_VALUE = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """Read all of params.yaml, without validation.

    Raises:
        UserError: the file is absent, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)  # a subclass of SafeLoader
    except FileNotFoundError:
        raise UserError(f"`{path}` is absent. Run this from the project's folder.") from None
    except OSError as error:
        raise UserError(f"`{path}` cannot be read ({error.strerror}).") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        problem = str(error).replace('in "<unicode string>", line', "at line")
        raise UserError(f"`{path}` is not valid YAML: {problem}") from None
    except _NOT_A_VALUE as error:
        raise UserError(
            f"`{path}` is not valid YAML: a value is nested too deeply, or is not valid for its "
            f"type ({error})."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"`{path}` is {shown(content)}; expected a mapping of sections.")
    return content


def load_section(model: type[Model], name: str, *, path: Path = PARAMS_FILE) -> Model:
    """Load section `name` of params.yaml and validate it.

    Raises:
        UserError: lists every problem of the section, with the keys' full names.
    """
    params = read_params(path)
    if name not in params:
        raise UserError(f"`{path}: {name}` is missing; expected a section of that name.")
    return validate(model, params[name], f"{path}: {name}")


_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def student_names() -> list[str]:
    """List the students' names, in the order of the file.

    Raises:
        UserError: there is no student, or a name has other characters.
    """
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
    if problems:
        raise UserError("\n".join(problems))
    return list(students)


def check_student(name: str) -> None:
    """Refuse a name that is not a student's.

    Raises:
        UserError: names the nearest student.
    """
    known = student_names()
    if name not in known:
        raise UserError(
            f"`{PARAMS_FILE}: students` has no `{name}`{did_you_mean(name, known) or '.'} "
            f"Known: {', '.join(known)}."
        )
