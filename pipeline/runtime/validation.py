"""Validate what a person or another stage wrote against a pydantic model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.runtime.errors import UserError, did_you_mean
from pipeline.runtime.files import recovery_hint

Model = TypeVar("Model", bound=BaseModel)


class Record(BaseModel):
    """A mapping of a file: typed, frozen, unknown keys refused, nothing converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def read_model(path: Path | str, model: type[Model], *, produced_by: str) -> Model:
    """Read a JSON file that a stage wrote.

    Args:
        produced_by: the command that writes the file, for messages.

    Raises:
        UserError: the file is absent, is not JSON, or lists every key that does not fit the model.
    """
    path = Path(path)
    if not path.is_file():  # reading a device might never end
        raise UserError(f"`{path}` is absent. {recovery_hint(path, produced_by)}")
    again = f"Remove it and run `{produced_by}`."
    try:
        content = path.read_bytes()
        return model.model_validate_json(content)
    except OSError as error:
        raise UserError(f"`{path}` cannot be read ({error.strerror}). {again}") from None
    except ValidationError as error:
        problems = error.errors(include_url=False)
        if problems[0]["type"] == "json_invalid":
            raise UserError(
                f"`{path}` is not a JSON file ({problems[0]['msg']}). {again}"
            ) from None
        lines = [_message(model, problem, str(path), {}) for problem in problems]
        raise UserError("\n".join([*lines, again])) from None


def validate(
    model: type[Model], content: Any, location: str, *, origins: dict[str, str] | None = None
) -> Model:
    """Validate content against a model.

    Args:
        location: of the content, for messages: `params.yaml: teacher`.
        origins: for merged content, the location of each top-level key.

    Raises:
        UserError: lists every problem.
    """
    if not isinstance(content, dict):
        raise UserError(f"`{location}` is {shown(content)}; expected a mapping.")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(
            "\n".join(_message(model, e, location, origins or {}) for e in error.errors())
        ) from None


def _message(model: type[BaseModel], error: Any, location: str, origins: dict[str, str]) -> str:
    *parents, key = names = _names(model, error["loc"]) or [""]
    location = origins.get(str(names[0]), location)
    inside = ".".join(map(str, names))
    separator = "." if ": " in location else ": "  # `params.yaml: teacher.seed`, `x.json: seed`
    full_name = f"{location}{separator}{inside}" if inside else location
    if error["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, parents))
        suggestion = did_you_mean(str(key), known) or "."
        return f"`{full_name}` is unknown{suggestion} Known: {', '.join(known)}."
    if error["type"] == "missing":
        return f"`{full_name}` is missing."
    if error["type"] == "value_error":  # about several keys together
        return f"`{full_name}`: {error['msg'].removeprefix('Value error, ')}."
    expected = error["msg"].removeprefix("Input should be ")
    return f"`{full_name}` is {shown(error['input'])}; expected {expected}."


def _names(model: type[BaseModel], location: Sequence[int | str]) -> list[int | str]:
    """Drop pydantic's marks of a union's branches from a location."""
    names: list[int | str] = []
    for part in location:
        if names and not isinstance(part, int) and not _fields_at(model, names):
            break  # a branch of a union: `int`, `literal['all']`
        names.append(part)
    return names


def _fields_at(model: type[BaseModel], names: Sequence[int | str]) -> dict[str, Any]:
    """The fields of the model at a nested key; empty if the key holds no model."""
    fields, in_mapping = model.model_fields, False
    for name in names:
        if in_mapping:  # the name is a key of a mapping to models
            in_mapping = False
            continue
        annotation = fields[str(name)].annotation if str(name) in fields else None
        models = [
            option
            for option in (annotation, *get_args(annotation))
            if isinstance(option, type) and issubclass(option, BaseModel)
        ]
        fields = models[0].model_fields if models else {}
        in_mapping = get_origin(annotation) in (dict, Mapping)
    return fields


def shown(value: Any) -> str:
    """Return a value's text, cut to one line."""
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
