"""What a user reads when a run can't start or go on, and with which exit code."""

import traceback
from dataclasses import dataclass
from typing import get_args

import torch
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from openmoe.checkpoint.errors import CheckpointError, SaveCancelled
from openmoe.data.errors import DataError
from openmoe.parallel.topology import TopologyError
from openmoe.parallel.watchdog import LostContact, is_lost_contact, reason
from openmoe.train.loop import NonFiniteLoss


class ConfigError(ValueError):
    """A configuration that cannot be run; one line: key, value, what is allowed. Exit code 2."""


USER_ERRORS = (ConfigError, DataError, CheckpointError, TopologyError)


@dataclass(frozen=True)
class Failure:
    """How a command ends that does not end well."""

    code: int
    line: str  # all that a user needs, unless there is a traceback
    traceback: str = ""

    def text(self, who: str = "") -> str:
        """What is printed; `who` is "rank 3: " or nothing."""
        if self.traceback:
            return f"{who}{self.traceback}".rstrip()
        return self.line if self.code == 130 else f"error: {who}{self.line}"


def failure_of(error: BaseException) -> Failure:
    """Exit code 2 for what can't be run, 3 for a failure on the way, 130 for Ctrl-C; a traceback only where
    nobody foresaw the error."""
    if isinstance(error, KeyboardInterrupt):
        return Failure(130, "interrupted")
    if isinstance(error, USER_ERRORS):
        return Failure(2, one_line(error))
    if is_lost_contact(error):
        return Failure(3, f"lost contact with another process: {reason(error)}")
    # SaveCancelled: a second Ctrl-C on another process; OSError: a full disk, a lost file.
    foreseen = isinstance(error, NonFiniteLoss | LostContact | SaveCancelled | OSError)
    if foreseen or _out_of_memory(error):
        return Failure(3, one_line(error))
    return Failure(3, one_line(error), "".join(traceback.format_exception(error)))


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__


def _out_of_memory(error: BaseException) -> bool:
    """numpy raises MemoryError, a CUDA device OutOfMemoryError, the CPU a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def describe(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first fault as one line, with the number of further ones."""
    faults = error.errors()
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return _fault(faults[0], schema) + more


def _fault(fault: ErrorDetails, schema: type[BaseModel]) -> str:
    key, section = _place(fault["loc"], schema)
    context = fault.get("ctx", {})
    if fault["type"] == "union_tag_invalid":
        return f"{key}.name={_shown(context['tag'])}: allowed {context['expected_tags']}"
    if fault["type"] == "union_tag_not_found":
        return f"{key}.name: missing"
    if fault["type"] == "missing":
        return f"{key}: missing"
    if fault["type"] == "extra_forbidden":
        allowed = ", ".join(section.model_fields) if section else "the keys that --cfg job prints"
        return f"{key}: unknown key; allowed here: {allowed}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], dict):
        return f"{key}: {message}" if key else message  # a check over several keys names them itself
    return f"{key}={_shown(fault['input'])}: {message[0].lower()}{message[1:]}"


def _place(loc: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The key as a user writes it, and the section that holds it. pydantic's `loc` also has the tag of the
    chosen alternative after a section that has several, and "[key]" after a bad key of a mapping."""
    key, holder = "", None
    section: type[BaseModel] | None = schema
    alternatives: dict[int | str, type[BaseModel]] = {}
    for part in loc:
        if part in alternatives:
            section, alternatives = alternatives[part], {}
        elif isinstance(part, int):
            key += f"[{part}]"
        elif part != "[key]":
            key += f"{'.' if key else ''}{_name(part)}"
            holder = section
            field = section.model_fields.get(part) if section else None
            models = _models(field.annotation) if field else []
            section = models[0] if len(models) == 1 else None
            if len(models) > 1:
                alternatives = {get_args(model.model_fields["name"].annotation)[0]: model for model in models}
    return key, holder


def _models(annotation: object) -> list[type[BaseModel]]:
    """The sections that a field of this type can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _name(part: str) -> str:
    return part if part.replace("_", "").isalnum() and len(part) <= 80 else _shown(part)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
