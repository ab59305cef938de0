"""What a user reads when a run can't start or go on, and with which exit code."""

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """A configuration that cannot be run; one line: key, value, what is allowed. Exit code 2."""


def describe(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first fault as one line, with the number of further ones."""
    faults = error.errors()
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return _fault(faults[0], schema) + more


def _fault(fault: ErrorDetails, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{key}: missing"
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key; allowed here: {', '.join(_siblings(fault['loc'], schema))}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], dict):
        return f"{key}: {message}" if key else message  # a check over several keys names them itself
    shown = repr(fault["input"])
    return f"{key}={shown if len(shown) <= 80 else shown[:77] + '...'}: {message[0].lower()}{message[1:]}"


def _siblings(loc: tuple[int | str, ...], schema: type[BaseModel]) -> list[str]:
    """Field names of the section that holds the last part of `loc`."""
    for part in loc[:-1]:
        field = schema.model_fields.get(str(part))
        if (
            field is None
            or not isinstance(field.annotation, type)
            or not issubclass(field.annotation, BaseModel)
        ):
            return ["the keys that --cfg job prints"]
        schema = field.annotation
    return list(schema.model_fields)
