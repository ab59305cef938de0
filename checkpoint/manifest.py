"""`manifest.json`: what a checkpoint holds, with the size and SHA-256 of each of its files.

JSON in one canonical form that ends with the digest of the rest, so that a change of any byte is noticed.
Nothing in a checkpoint is a pickle: reading one from a stranger runs no code.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.files import FileEntry, require_plain

MANIFEST_NAME = "manifest.json"
FORMAT = "openmoe-checkpoint"
VERSION = 1


class _Part(BaseModel, strict=True, extra="forbid", frozen=True):
    pass


class TensorEntry(_Part):
    """One tensor: its global shape, and its type as torch names it ("float32")."""

    shape: list[int]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorEntry":
        return cls(shape=list(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Manifest(_Part):
    """Everything in a checkpoint but the tensors themselves."""

    format: Literal["openmoe-checkpoint"]
    version: Literal[1]
    step: int = Field(ge=0)  # updates made
    tokens_seen: int = Field(ge=0)  # row positions
    milestone: bool  # kept for good
    model: dict[str, Any]  # the model's configuration
    metadata: dict[str, Any]  # phase, data state, W&B run id: whatever the training loop wants back
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    def text(self) -> str:
        """The file's content; the digest covers all lines before its own.

        Raises TypeError where JSON would give something else back than was put in (a tuple, a number as a
        key).
        """
        values = self.model_dump()
        body = json.dumps(values, indent=1, sort_keys=True, allow_nan=False)
        if json.loads(body) != values:
            raise TypeError(
                "the metadata of a checkpoint must be JSON: dict with str keys, list, str, number, bool, None"
            )
        digest = hashlib.sha256(body.encode()).hexdigest()
        return body.removesuffix("\n}") + f',\n "sha256_of_the_above": "{digest}"\n}}\n'


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`, its own digest checked.

    Raises CheckpointError where it is missing, damaged or of another format version.
    """
    path = folder / MANIFEST_NAME
    try:
        require_plain(path)
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}: no checkpoint that can be read") from None
    try:
        values = json.loads(content)
        version = values["version"] if values["format"] == FORMAT else "?"
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: damaged: not the manifest of a checkpoint") from None
    if version != VERSION:
        raise CheckpointError(
            f"{path}: version {version!r} of the checkpoint format; this program reads {VERSION}"
        )
    try:
        values.pop("sha256_of_the_above", None)
        manifest = Manifest.model_validate(values)
        if manifest.text().encode() == content:
            return manifest
    except (ValidationError, ValueError, TypeError):
        pass
    raise CheckpointError(f"{path}: damaged: its SHA-256 differs from the one it states")
