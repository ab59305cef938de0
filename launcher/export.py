"""Give weights away in the released format: `python -m openmoe.launcher.export checkpoint=RUN to=DIR`."""

import time
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, Field

from openmoe.checkpoint.export import export_released
from openmoe.checkpoint.manager import checkpoint_at
from openmoe.checkpoint.manifest import Manifest
from openmoe.checkpoint.origin import loss_weights_of, model_config_of, tokenizer_of
from openmoe.checkpoint.storage import verify_checkpoint
from openmoe.data.config import PathText
from openmoe.data.tokenizer import Tokenizer, load_tokenizer
from openmoe.launcher.entry import run_command
from openmoe.launcher.errors import ConfigError

DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class ExportPage(BaseModel, strict=True, extra="forbid", frozen=True):
    # The folder of a checkpoint, or of a run.
    checkpoint: PathText
    # A new folder.
    to: PathText
    dtype: Literal["stored", "float32", "bfloat16"]
    # Of one file.
    shard_bytes: int = Field(gt=0)
    # auto, none or a sentencepiece model.
    tokenizer: PathText


def main() -> None:
    run_command(export, ExportPage, "export")


def export(page: ExportPage) -> None:
    """Verify the checkpoint, write the folder, say what is in it."""
    begin = time.monotonic()
    folder = checkpoint_at("checkpoint", page.checkpoint)
    if Path(page.to).exists():
        raise ConfigError(f"to={page.to}: exists already; choose another")
    manifest = verify_checkpoint(folder)
    model = model_config_of(folder, manifest)
    tokenizer = _tokenizer(page, folder, manifest)
    if tokenizer is not None and tokenizer.size > model.vocab_size:
        raise ConfigError(
            f"tokenizer={page.tokenizer}: {tokenizer.size} ids with its sentinels, and the model's "
            f"vocabulary has {model.vocab_size} rows"
        )
    files = export_released(
        folder,
        manifest,
        Path(page.to),
        dtype=DTYPES[page.dtype],
        shard_bytes=page.shard_bytes,
        loss=loss_weights_of(folder, manifest),
        tokenizer=tokenizer,
    )
    size = sum(file.stat().st_size for file in files)
    print(f"{page.to}: step {manifest.step} of {folder}, {size / 2**30:.2f} GiB in {len(files)} files")
    if tokenizer is None:
        print("without a tokenizer (tokenizer=none)")
    print(f"{time.monotonic() - begin:.0f} s")


def _tokenizer(page: ExportPage, folder: Path, manifest: Manifest) -> Tokenizer | None:
    if page.tokenizer == "none":
        return None
    if page.tokenizer == "auto":
        return tokenizer_of(folder, manifest)
    return load_tokenizer(page.tokenizer, "tokenizer")


if __name__ == "__main__":
    main()
