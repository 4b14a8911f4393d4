"""Validate what a person or another stage wrote against a pydantic model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from pipeline.runtime.errors import UserError, did_you_mean
from pipeline.runtime.files import read_json

Model = TypeVar("Model", bound=BaseModel)

_SHOWN = 10  # problems of one file that a stage wrote


class Record(BaseModel):
    """A mapping of a file: typed, frozen, unknown keys refused, nothing converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def read_model(path: Path | str, model: type[Model], *, produced_by: str) -> Model:
    """Read a JSON file that a stage wrote by the command `produced_by`. Refuses one that is absent,
    is not JSON, or does not fit the model, with the keys that do not fit."""
    content = read_json(path, produced_by=produced_by)
    try:
        return model.model_validate_json(to_json(content))  # strict: a list is a Sequence in JSON
    except ValidationError as error:
        lines = [_message(model, content, each, str(path), {}) for each in error.errors()[:_SHOWN]]
        again = f"Remove it and run `{produced_by}`."
        raise UserError("\n".join([*lines, again])) from None


def validate(
    model: type[Model], content: Any, location: str, *, origins: dict[str, str] | None = None
) -> Model:
    """Validate content against a model. Refuses it with a list of every problem.

    Args:
        location: of the content, for messages: `params.yaml: teacher`.
        origins: for merged content, the location of each top-level key.
    """
    if not isinstance(content, dict):
        raise UserError(f"`{location}` is {shown(content)}; expected a mapping.")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(
            "\n".join(_message(model, content, e, location, origins or {}) for e in error.errors())
        ) from None


def _message(
    model: type[BaseModel], content: Any, error: Any, location: str, origins: dict[str, str]
) -> str:
    names = _names(content, error)
    location = origins.get(str(names[0]), location) if names else location
    separator = "." if ": " in location else ": "  # `params.yaml: teacher.seed`, `x.json: seed`
    full_name = separator.join([location, ".".join(map(str, names))]) if names else location
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = sorted(_fields_at(model, names[:-1]))
        suggestion = did_you_mean(str(names[-1]), known) or "."
        return f"`{full_name}` is unknown{suggestion} Known: {', '.join(known)}."
    if error["type"] == "missing":
        field = _fields_at(model, names[:-1]).get(str(names[-1]))
        advice = f" {field.description}." if field and field.description else ""
        return f"`{full_name}` is missing.{advice}"
    if error["type"] == "value_error":  # about several keys together
        return f"`{full_name}`: {error['msg'].removeprefix('Value error, ')}."
    expected = error["msg"].removeprefix("Input should be ")
    if error["type"] in ("model_type", "dict_type"):
        expected = "a mapping"
    return f"`{full_name}` is {shown(error['input'])}; expected {expected}."


def _names(content: Any, error: Any) -> list[int | str]:
    """The keys of an error's location, without pydantic's marks of a union's branches."""
    names: list[int | str] = []
    for place, part in enumerate(error["loc"], start=1):
        missing = error["type"] == "missing" and place == len(error["loc"])
        is_key = isinstance(content, dict) and (part in content or missing)
        if not is_key and not (isinstance(content, list) and isinstance(part, int)):
            continue
        names.append(part)
        content = content[part] if isinstance(content, list) else content.get(part)
    return names


def _fields_at(model: type[BaseModel], names: Sequence[int | str]) -> Mapping[str, Any]:
    """The fields of the model at a nested key."""
    fields = model.__pydantic_fields__
    for name in names:
        if name in fields:  # else the index of a list, or the key of a mapping
            fields = _fields_of(fields[name].annotation)
    return fields


def _fields_of(annotation: Any) -> dict[str, Any]:
    """The fields of a model, or those of all the models in a union."""
    fields = dict(getattr(annotation, "__pydantic_fields__", {}))
    for option in get_args(annotation):
        fields |= _fields_of(option)
    return fields


def none_or_mapping(value: Any) -> Any:
    """Validate, before pydantic does, a parameter that is `none` or a mapping of parameters."""
    if value == "none":
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"it is {value!r}; expected `none`, or a mapping of its parameters")
    return value


def shown(value: Any) -> str:
    """Return a value's text, cut to one line."""
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
