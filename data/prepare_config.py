"""The page of configuration of the command that prepares data."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from openmoe.data.config import PathText, SourceName, TokenizerConfig


class InputConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """What to prepare, where to, and how."""

    # A folder with one sub-folder per source, or the name of a dataset that `datasets` can stream. Null: only
    # verify the output.
    input: PathText | None = None
    # The prepared folder: made where missing, gone on with where unfinished, added to where complete.
    output: PathText
    # Processes; they never change the result.
    workers: int = Field(default=1, ge=1, le=1024)
    # The sub-folders to prepare; null is all.
    sources: list[SourceName] | None = Field(default=None, min_length=1)
    # Of each record of jsonl, parquet, arrow or a dataset.
    text_field: str = Field(default="text", min_length=1)
    # Of a dataset: its configuration and the split to read.
    dataset_config: str | None = Field(default=None, min_length=1)
    dataset_split: str = Field(default="train", min_length=1)
    # Share of the documents held back for validation where a source has no valid/ folder.
    validation_fraction: float = Field(default=0.05, gt=0, le=0.5)
    # Raw bytes that make one shard, the unit of work; a compressed file is never cut.
    shard_bytes: int = Field(default=2**26, ge=1, le=2**40)
    # A record that can't be read: stop and say where, or leave it out, count it and list it.
    on_corrupt: Literal["stop", "skip"] = "stop"
    # Compare the sha256 of every file of the output at the end.
    verify: bool = False

    @model_validator(mode="after")
    def _check(self) -> "InputConfig":
        if self.input is None and not self.verify:
            raise ValueError("input=null; allowed a folder or a dataset's name, or null with verify=true")
        return self


class PrepareConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """All of `conf/prepare.yaml`."""

    data: InputConfig
    # How to train a tokenizer, or which one to use; where the output exists it must be the output's own.
    tokenizer: TokenizerConfig = TokenizerConfig()
