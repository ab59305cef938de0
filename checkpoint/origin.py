"""What a checkpoint says of its model beside the tensors: configuration, tokenizer, loss weights."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.manifest import Manifest
from openmoe.checkpoint.released_config import LossWeights
from openmoe.data.config import DataConfig
from openmoe.data.prepare import open_tokenizer
from openmoe.data.shards import TOKENIZER
from openmoe.data.tokenizer import Tokenizer, load_tokenizer
from openmoe.model.config import ModelConfig

Section = TypeVar("Section", bound=BaseModel)


def model_config_of(folder: Path, manifest: Manifest) -> ModelConfig:
    return _validated(folder, ModelConfig, manifest.model)


def loss_weights_of(folder: Path, manifest: Manifest) -> LossWeights:
    """What the model was trained with; the released models' weights where the checkpoint does not say."""
    train = manifest.metadata.get("config", {}).get("train", {})
    known = {name: train[name] for name in LossWeights.model_fields if name in train}
    return _validated(folder, LossWeights, known)


def tokenizer_of(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer in the checkpoint, or the one that its run read its data with.

    Raises CheckpointError where the checkpoint names none, or the run's data now have another one; DataError
    where they are gone.
    """
    if TOKENIZER in manifest.files:
        return load_tokenizer(str(folder / TOKENIZER), "checkpoint")
    advice = "give it with tokenizer=FILE (to export without one: tokenizer=none)"
    config = manifest.metadata.get("config", {})
    if "data" not in config or "curriculum" not in config:
        raise CheckpointError(
            f"{folder}: holds no tokenizer, and does not say which one its model had; {advice}"
        )
    sources = {name for phase in config["curriculum"] for name, rate in phase["mix"].items() if rate > 0}
    data = _validated(folder, DataConfig, config["data"])
    tokenizer = open_tokenizer(data, sorted(sources))
    stated = tokenizer_sha256(manifest)
    if stated not in (None, tokenizer.sha256):
        where = "the embedded text" if data.root is None else f"data.root={data.root}"
        raise CheckpointError(
            f"{folder}: its model's tokenizer has SHA-256 {stated}, the one of {where} is now "
            f"{tokenizer.sha256}; {advice}"
        )
    return tokenizer


def tokenizer_sha256(manifest: Manifest) -> str | None:
    """SHA-256 of the tokenizer that the model was trained with; None where the checkpoint does not say."""
    if TOKENIZER in manifest.files:
        return manifest.files[TOKENIZER].sha256
    stated: str | None = manifest.metadata.get("data", {}).get("identity", {}).get("tokenizer")
    return stated


def require_tokenizer(folder: Path, manifest: Manifest, sha256: str) -> None:
    """Raises CheckpointError where the checkpoint's model was trained with another tokenizer than the one of
    `sha256`: its embedding would mean other tokens. One that does not say is taken."""
    stated = tokenizer_sha256(manifest)
    if stated not in (None, sha256):
        own = folder / TOKENIZER if TOKENIZER in manifest.files else "the file"
        raise CheckpointError(
            f"{folder}: its model's tokenizer has SHA-256 {stated}, the one of the data has {sha256}; give "
            f"{own} as data.tokenizer.path"
        )


def _validated(folder: Path, section: type[Section], values: dict[str, Any]) -> Section:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{folder}: {section.__name__}: {place}: {error.errors()[0]['msg']}") from None
